"""Kimi K2, appendix D: a low threshold clips few heads, early, and does not change the loss."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from benchmarks.evidence import plotting
from benchmarks.evidence.runner import Measure, lookup
from benchmarks.evidence.summaries import (
    largest_logits,
    last_clip,
    loss_of,
    mean_sd,
    over_seeds,
    paired_difference,
    seeds_of,
)
from benchmarks.evidence.training import Run
from benchmarks.report import markdown

TITLE = "A low threshold does not change the loss"
CLAIM = (
    "QK-clip with a low threshold does not change the loss, and stops clipping before the end of a"
    " short training whose learning rate falls to 0."
)
SOURCE = "Kimi K2, arXiv 2507.20534, appendix D"
PUBLISHED = "τ = 30: equal losses; 12.7 % of the heads ever clipped, none after step 70,000"
SEEDS = (0, 1, 2, 3, 4)
RATE = 0.016  # the best of muon in token-efficiency
STEPS = 800
THRESHOLDS = (None, 30.0, 20.0, 12.0, 6.0)
LOW = "30"  # the threshold of the paper


def runs(threshold: float | None) -> list[Run]:
    """Returns the trainings at one threshold."""
    return seeds_of(Run(RATE, 0, threshold=threshold, steps=STEPS), SEEDS)


def study(measure: Measure) -> dict[str, Any]:
    """Trains at each threshold, and compares with no QK-clip at equal seeds."""
    measure([run for threshold in THRESHOLDS for run in runs(threshold)])
    plain = measure(runs(None))
    lines = {f"{threshold:g}": measure(runs(threshold)) for threshold in THRESHOLDS if threshold}
    return {
        "none": {
            "loss": loss_of(plain),
            "max_logit": over_seeds(max(largest_logits(r)) for r in plain),
        },
        **{name: compare(records, plain) for name, records in lines.items()},
    }


def compare(records: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarizes the trainings at one threshold."""
    return {
        "loss": loss_of(records),
        "minus_plain": paired_difference(records, plain),
        "ever_clipped": over_seeds(record["ever_clipped"] for record in records),
        "last_clip": over_seeds(map(last_clip, records)),
        "max_logit": over_seeds(max(largest_logits(record)) for record in records),
    }


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: at τ = 30 a loss within two standard errors, and no clip in the last tenth."""
    line = ours[LOW]
    difference = line["minus_plain"]
    equal = abs(difference["mean"]) <= 2 * difference["sd"] / len(SEEDS) ** 0.5
    return plotting.judge(equal, 0 < line["last_clip"]["mean"] < 0.9 * STEPS)


def one_line(ours: Mapping[str, Any]) -> str:
    """Summarizes the result in one line."""
    line = ours[LOW]
    share = f"{line['ever_clipped']['mean']:.1%} of the heads ever clipped"
    return f"τ = {LOW}: loss changes by {mean_sd(line['minus_plain'], 4)}; {share}"


def section(ours: Mapping[str, Any]) -> str:
    """Describes the result in a paragraph and a table."""
    columns = ("τ", "loss", "minus no clip, same seed", "heads ever clipped", "last clip at step")
    rows = [["none", mean_sd(ours["none"]["loss"]), "", "", ""]]
    rows += [
        [
            name,
            mean_sd(line["loss"]),
            mean_sd(line["minus_plain"], 4),
            f"{line['ever_clipped']['mean']:.1%}",
            mean_sd(line["last_clip"], 0),
        ]
        for name, line in ours.items()
        if name != "none"
    ]
    free, lowest = ours["none"]["max_logit"], f"{THRESHOLDS[-1]:g}"
    return f"""\
Down to τ = 12 the loss does not change. At τ = {lowest} it is
{ours[lowest]["minus_plain"]["mean"]:.3f} higher.

The learning rate is {RATE:g}, the best in [Fewer tokens than AdamW](#fewer-tokens-than-adamw), and
the trainings have {STEPS} steps. Without QK-clip the largest logit is {mean_sd(free, 0)}, so heads
reach each of these thresholds.

At τ = {LOW}, {ours[LOW]["ever_clipped"]["mean"]:.1%} of the heads are ever clipped. The last clip
is at step {ours[LOW]["last_clip"]["mean"]:.0f} on average. After its warmup the learning rate falls
at every step. [Whether the clip stops by
itself](#whether-the-clip-stops-by-itself) has a constant rate.

At τ = 12 most heads are clipped at some time, and the last clip is at step
{ours["12"]["last_clip"]["mean"]:.0f}. The loss equals the loss without QK-clip at the same seed,
within its spread. τ = {lowest} is too low: every head is clipped at some time, and clips last until
the end.

{markdown(columns, rows)}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws the loss relative to no clip, and the number of clipped heads at each step."""
    ours, measure = result["ours"], lookup(result["runs"])
    figure, (left, right) = plotting.panels(2)
    names = [name for name in ours if name != "none"]
    plotting.bars(left, {f"τ = {name}": ours[name]["minus_plain"] for name in names})
    left.axvline(0, color="black", linewidth=0.8)
    left.set_title("validation loss minus no clip, same seed")
    for threshold, color in zip(THRESHOLDS[1:], plotting.COLORS, strict=False):
        each = [record["clipped"] for record in measure(runs(threshold))]
        share = ours[f"{threshold:g}"]["ever_clipped"]["mean"]
        label = f"τ = {threshold:g}: {share:.0%} of heads ever"
        right.plot(plotting.smooth(each), color=color, label=label)
    right.set(xlabel="step", title="heads clipped, mean of seeds and 20 steps")
    right.legend(frameon=False, fontsize="small")
    return figure

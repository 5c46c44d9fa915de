"""Kimi K2, appendix D: a low threshold does not change the loss; few heads, early."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from benchmarks.evidence import drawing
from benchmarks.evidence.measures import (
    last_clip,
    loss_of,
    over_seeds,
    paired,
    peaks,
    seeds_of,
    table,
    text,
)
from benchmarks.evidence.runner import Ask, lookup
from benchmarks.evidence.tasks import Run

TITLE = "A low threshold does no harm"
CLAIM = "QK-clip with a low threshold leaves the loss as it is, and stops clipping by itself."
SOURCE = "Kimi K2, arXiv 2507.20534, appendix D"
PUBLISHED = "τ = 30: losses alike; 12.7 % of the heads ever clipped, none after step 70,000"
SEEDS = (0, 1, 2, 3, 4)
RATE = 0.016  # the best of muon in token-efficiency
STEPS = 800
THRESHOLDS = (None, 30.0, 20.0, 12.0, 6.0)
LOW = "30"  # that of the paper


def runs(threshold: float | None) -> list[Run]:
    """Gives the trainings at one threshold."""
    return seeds_of(Run(RATE, 0, threshold=threshold, steps=STEPS), SEEDS)


def study(ask: Ask) -> dict[str, Any]:
    """Trains at each threshold, and compares seed by seed with no clip."""
    ask([run for threshold in THRESHOLDS for run in runs(threshold)])
    plain = ask(runs(None))
    lines = {f"{threshold:g}": ask(runs(threshold)) for threshold in THRESHOLDS if threshold}
    return {
        "none": {"loss": loss_of(plain), "max_logit": over_seeds(max(peaks(r)) for r in plain)},
        **{name: compare(records, plain) for name, records in lines.items()},
    }


def compare(records: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Reads off the trainings at one threshold."""
    return {
        "loss": loss_of(records),
        "minus_plain": paired(records, plain),
        "ever_clipped": over_seeds(record["ever_clipped"] for record in records),
        "last_clip": over_seeds(map(last_clip, records)),
        "max_logit": over_seeds(max(peaks(record)) for record in records),
    }


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: at τ = 30 a loss within two standard errors, and no clip in the last tenth."""
    line = ours[LOW]
    difference = line["minus_plain"]
    alike = abs(difference["mean"]) <= 2 * difference["sd"] / len(SEEDS) ** 0.5
    return drawing.judge(alike, 0 < line["last_clip"]["mean"] < 0.9 * STEPS)


def short(ours: Mapping[str, Any]) -> str:
    """Says it in a line."""
    line = ours[LOW]
    share = f"{line['ever_clipped']['mean']:.1%} of the heads ever clipped"
    return f"τ = {LOW}: {text(line['minus_plain'], 4)} of loss; {share}"


def tell(ours: Mapping[str, Any]) -> str:
    """Says it in three sentences, and a table."""
    columns = ("τ", "loss", "minus no clip, same seed", "heads ever clipped", "last clip at step")
    rows = [["none", text(ours["none"]["loss"]), "", "", ""]]
    rows += [
        [
            name,
            text(line["loss"]),
            text(line["minus_plain"], 4),
            f"{line['ever_clipped']['mean']:.1%}",
            text(line["last_clip"], 0),
        ]
        for name, line in ours.items()
        if name != "none"
    ]
    free, lowest = ours["none"]["max_logit"], f"{THRESHOLDS[-1]:g}"
    return f"""\
At the best learning rate the largest logit is {text(free, 0)} without a clip, so that each of these
thresholds is one that heads run into, in {STEPS} steps.
Down to τ = 12, where most heads are clipped at some time, the loss with the same seed is that
without a clip, to within its spread; at τ = {LOW}, {ours[LOW]["ever_clipped"]["mean"]:.1%} of the
heads are ever clipped, none after step {ours[LOW]["last_clip"]["mean"]:.0f} on average. A threshold
can be too low: at τ = {lowest} every head is clipped to the end, and the loss is
{ours[lowest]["minus_plain"]["mean"]:.3f} worse.

{table(columns, rows)}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws the loss against no clip, and how many heads each step clips."""
    ours, ask = result["ours"], lookup(result["runs"])
    figure, (left, right) = drawing.panels(2)
    names = [name for name in ours if name != "none"]
    drawing.bars(left, {f"τ = {name}": ours[name]["minus_plain"] for name in names})
    left.axvline(0, color="black", linewidth=0.8)
    left.set_title("validation loss minus that without clip, same seed")
    for threshold, color in zip(THRESHOLDS[1:], drawing.COLOURS, strict=False):
        each = [record["clipped"] for record in ask(runs(threshold))]
        share = ours[f"{threshold:g}"]["ever_clipped"]["mean"]
        label = f"τ = {threshold:g}: {share:.0%} of heads ever"
        right.plot(drawing.smooth(each), color=color, label=label)
    right.set(xlabel="step", title="heads clipped, mean of seeds and 20 steps")
    right.legend(frameon=False, fontsize="small")
    return figure

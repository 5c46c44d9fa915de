"""Kimi K2, appendix D, over 20,000 steps: whether QK-clip stops acting by itself."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import optax
from matplotlib.figure import Figure

from benchmarks.evidence import plotting
from benchmarks.evidence.runner import Measure, lookup
from benchmarks.evidence.summaries import (
    SEEDS,
    loss_of,
    mean_sd,
    over_seeds,
    paired_difference,
    seeds_of,
)
from benchmarks.evidence.training import BATCH_SIZE, LOGGED, SEQ_LEN, Run, curves, finite
from benchmarks.report import markdown

TITLE = "Whether the clip stops by itself"
CLAIM = "QK-clip acts on few heads, early, and stops by itself while training goes on."
SOURCE = "Kimi K2, arXiv 2507.20534, appendix D; its schedule, section 2.5"
PUBLISHED = "τ = 30: 12.7 % of the heads clipped in the first 70,000 steps, none after them"
STEPS = 20_000
# Kimi K2, section 2.5: constant for 10 of 15.5 trillion tokens, then a cosine to a tenth.
WARMUP, CONSTANT, LAST_RATE = 500, 10 / 15.5, 0.1
TENTHS = 10  # parts of a training whose clips are compared


@dataclasses.dataclass(frozen=True)
class Long(Run):
    """A training of 20,000 steps with the schedule of Kimi K2."""

    steps: int = STEPS

    batch_size: ClassVar[int] = 2
    resumable: ClassVar[bool] = True
    saved_every: ClassVar[int] = 1000

    def schedule(self) -> optax.Schedule:
        """Builds the learning rates: warmup, constant, cosine decay to a tenth."""
        constant = round(CONSTANT * self.steps)
        parts = [
            optax.linear_schedule(self.learning_rate / WARMUP, self.learning_rate, WARMUP),
            optax.constant_schedule(self.learning_rate),
            optax.cosine_decay_schedule(
                self.learning_rate, max(1, self.steps - constant), LAST_RATE
            ),
        ]
        return optax.join_schedules(parts, [WARMUP, constant])

    def measure(self, saved: pathlib.Path | None = None) -> dict[str, Any]:
        """Trains.

        Returns:
          `logged`, `losses`, `max_logits` and `validation_loss` as `Run`; between two logged steps
          `clipped`, the mean fraction of heads clipped at a step; `ever_clipped`, the fraction of
          heads at each logged step; `last_clip`, the last step with a clip, 0 if there is none.
        """
        metrics, validation_loss = self.train(saved)
        record = curves(metrics)
        heads = np.size(record["max_logits"][0])
        fractions = np.array(record["clipped"]) / heads
        steps, ever = record["logged"], [m["qk_clip/ever_clipped_fraction"] for m in metrics]
        with_clip = np.flatnonzero(fractions)
        return record | {
            "clipped": [finite(part.mean()) for part in np.split(fractions, steps[:-1])],
            "ever_clipped": [finite(ever[step - 1]) for step in steps],
            "last_clip": int(with_clip[-1]) + 1 if len(with_clip) else 0,
            "validation_loss": validation_loss,
        }


RUN = Long(0.016, 0, threshold=30.0)  # at the best rate of low-threshold
LOWER = Long(0.016, 0, threshold=15.0)  # at which the clip acts; no clip acts in `RUN`
LEVELS = (12.0, 15.0, 20.0, 25.0)  # lower thresholds that heads may exceed
JUDGED = "20"  # of them
BEFORE = int(CONSTANT * TENTHS) - 1  # the last tenth at the full learning rate


def study(measure: Measure) -> dict[str, Any]:
    """Trains with each seed.

    Returns:
      `summary` of the trainings with `RUN`; `above`, for each level, the fraction of heads whose
      largest logit between two logged steps is above it, by tenth; `ever`, the fraction ever above
      it; `lower`, the `summary` of the trainings with `LOWER`, and `minus_first`, their loss minus
      the loss of the others.
    """
    measure([*seeds_of(RUN), *seeds_of(LOWER)])  # in parallel
    records, lower = measure(seeds_of(RUN)), measure(seeds_of(LOWER))
    logits = [np.reshape(r["max_logits"], (len(r["logged"]), -1)) for r in records]  # [point, head]
    return summary(records) | {
        "above": {f"{x:g}": by_tenth((each > x).mean(1) for each in logits) for x in LEVELS},
        "ever": {f"{x:g}": over_seeds((m > x).any(0).mean() for m in logits) for x in LEVELS},
        "lower": summary(lower) | {"minus_first": paired_difference(lower, records)},
    }


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarizes trainings that differ in their seed only.

    Returns:
      `clipped`, the fraction of heads that a step clips, by tenth of the training; `ever_clipped`,
      the fraction of heads, at the end of each tenth; `last_clip`, the last step with a clip;
      `largest`, the largest logit, by tenth; `loss`.
    """
    points = len(records[0]["logged"])
    last = [points * (tenth + 1) // TENTHS - 1 for tenth in range(TENTHS)]  # points of the tenths
    largest = (np.reshape(r["max_logits"], (points, -1)).max(1) for r in records)
    return {
        "clipped": by_tenth(np.array(record["clipped"]) for record in records),
        "ever_clipped": [over_seeds(r["ever_clipped"][at] for r in records) for at in last],
        "last_clip": over_seeds(record["last_clip"] for record in records),
        "largest": by_tenth(largest, np.max),
        "loss": loss_of(records),
    }


def by_tenth(points: Iterable[np.ndarray], reduce: Any = np.mean) -> list[dict[str, Any]]:
    """Reduces the points of each tenth, and summarizes over seeds."""
    tenths = [[reduce(part) for part in np.split(each, TENTHS)] for each in points]
    return [over_seeds(column) for column in np.transpose(tenths)]


def acts(ours: Mapping[str, Any]) -> bool:
    """Whether the clip ever acts."""
    return ours["ever_clipped"][-1]["mean"] > 0


def fades(fractions: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last tenth at the full rate has less than a tenth of the busiest tenth."""
    return fractions[BEFORE]["mean"] < 0.1 * max(one["mean"] for one in fractions)


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: clips, and heads above a lower threshold, fade before the rate falls.

    Three conditions: the clip acts at the threshold of the paper; few heads exceed `JUDGED` in the
    last tenth at the full rate; and with `LOWER` the clip acts, and has faded in that tenth.
    """
    return plotting.judge(*conditions(ours).values())


def conditions(ours: Mapping[str, Any]) -> dict[str, bool]:
    """Returns the conditions of the verdict in words, and which of them hold."""
    lower = ours["lower"]
    return {
        f"the clip acts at τ = {RUN.threshold:g}": acts(ours),
        f"few heads exceed {JUDGED} before the learning rate falls": fades(ours["above"][JUDGED]),
        f"at τ = {LOWER.threshold:g} the clip acts, and has faded before the rate falls": (
            acts(lower) and fades(lower["clipped"])
        ),
    }


def one_line(ours: Mapping[str, Any]) -> str:
    """Summarizes the result in one line."""
    lower = ours["lower"]
    first, late = (share(lower["clipped"][at]) for at in (0, BEFORE))
    return (
        f"τ = {RUN.threshold:g}: {share(ours['ever_clipped'][-1])} of the heads ever clipped;"
        f" τ = {LOWER.threshold:g}: {share(lower['ever_clipped'][-1])} of the heads, a step clips"
        f" {first} in the first tenth, {late} before the rate falls"
    )


def share(fraction: Mapping[str, Any]) -> str:
    """Formats a fraction as a percentage; a small one keeps two digits."""
    percent = 100 * fraction["mean"]
    return f"{percent:.0f}%" if percent == 0 or percent >= 10 else f"{percent:.2g}%"


def section(ours: Mapping[str, Any]) -> str:
    """Describes the result in a paragraph and a table."""
    parts = [finding(ours), needs(ours), clips(ours["lower"]), above_a_level(ours)]
    constant = round(CONSTANT * STEPS)
    parts.append(f"""\
The `gqa` model trains for {STEPS:,} steps of {RUN.batch_size} x {SEQ_LEN} bytes, with
{len(SEEDS)} seeds. In [A low threshold](#a-low-threshold-does-not-change-the-loss) the batch is
{BATCH_SIZE // RUN.batch_size} times as large. The learning rate is {RUN.learning_rate:g}, the best
there, and the decay is {RUN.weight_decay:g}. The schedule is Kimi K2's. After a warmup of {WARMUP}
steps the rate is constant until step {constant:,}, and then falls to a tenth as a cosine. The loss
is {mean_sd(ours["loss"])}.""")
    parts.append(f"""\
The table shows some tenths of the training. "Above" is a mean over the windows of
{STEPS // LOGGED} steps in a tenth: the fraction of heads whose largest logit in the window is above
the value. "Ever" is the fraction of heads that exceed it in some window.""")
    return "\n\n".join([*parts, table(ours)])


def finding(ours: Mapping[str, Any]) -> str:
    """States the result in one paragraph."""
    first = f"At τ = {RUN.threshold:g}, as in the paper, the clip acts."
    if not acts(ours):
        first = (
            f"At τ = {RUN.threshold:g}, as in the paper, the clip never acts: no logit reaches"
            f" {RUN.threshold:g}. So these trainings equal ones without QK-clip."
        )
    lower = ours["lower"]
    if not acts(lower):
        return f"{first} At τ = {LOWER.threshold:g} it never acts either."
    fade = "has faded" if fades(lower["clipped"]) else "still acts"
    return f"{first} At τ = {LOWER.threshold:g} it acts, and {fade} when the learning rate falls."


def needs(ours: Mapping[str, Any]) -> str:
    """Describes the conditions of the verdict, and which of them hold."""
    found = conditions(ours).items()
    listed = "; ".join(f"{text} ({'yes' if held else 'no'})" for text, held in found)
    return (
        f"The conditions of the verdict: {listed}. *Few* and *faded* mean"
        " less than a tenth of the busiest tenth of the training."
    )


def above_a_level(ours: Mapping[str, Any]) -> str:
    """Describes the heads above a lower threshold, in the trainings without a clip."""
    first, late, last = (share(ours["above"][JUDGED][at]) for at in (0, BEFORE, -1))
    calm = "few heads exceed it before the learning rate falls"
    if not fades(ours["above"][JUDGED]):
        calm = "high logits do not end on their own at the full learning rate"
    return f"""\
**Heads above {JUDGED}.** In the first tenth of the steps {first} of the heads are above it. In the
last tenth before the learning rate falls {late} are, and in the last tenth of all {last}. So
{calm}."""


def clips(lower: Mapping[str, Any]) -> str:
    """Describes the trainings with the lower threshold."""
    first, late, last = (share(lower["clipped"][at]) for at in (0, BEFORE, -1))
    return f"""\
**A lower threshold.** With τ = {LOWER.threshold:g} many heads exceed the threshold. In the first
tenth a step clips {first} of the heads on average. In the last tenth before the rate
falls it clips {late}, and in the last tenth of all {last}. {share(lower["ever_clipped"][-1])} of
the heads are ever clipped. The last clip is at step {lower["last_clip"]["mean"]:,.0f}, on average.
The loss is {mean_sd(lower["loss"])}. Minus the loss with τ = {RUN.threshold:g} at the same seed it
is {mean_sd(lower["minus_first"])}."""


def table(ours: Mapping[str, Any]) -> str:
    """Generates the table, with a column for some tenths of the training."""
    shown, tenth = (0, 1, 2, 4, 5, 7, 9), STEPS // TENTHS
    parts = [f"{at * tenth + 1:,} to {(at + 1) * tenth:,}" for at in shown]
    lines = [
        (f"above {level}", above, ours["ever"][level]) for level, above in ours["above"].items()
    ]
    lower, name = ours["lower"], f"τ = {LOWER.threshold:g}"
    lines.append((f"clipped at a step, {name}", lower["clipped"], lower["ever_clipped"][-1]))
    rows = [[name, *(share(line[at]) for at in shown), share(ever)] for name, line, ever in lines]
    for tau, run in ((f"τ = {RUN.threshold:g}", ours), (name, lower)):
        largest = [f"{run['largest'][at]['mean']:.0f}" for at in shown]
        rows.append([f"largest logit, {tau}", *largest, ""])
    return markdown(("steps", *parts, "ever"), rows)


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws the largest logits of all heads, and the fraction of heads above lower thresholds."""
    measure = lookup(result["runs"])
    figure, panels = plotting.panels(3)
    for axes, run in zip(panels, (RUN, LOWER), strict=False):
        (record,) = measure([run])
        logits = np.reshape(record["max_logits"], (len(record["logged"]), -1))
        axes.plot(record["logged"], logits, color=plotting.COLORS[0], linewidth=1, alpha=0.6)
        axes.axhline(run.threshold or np.inf, color=plotting.LIMIT, linewidth=1)
        axes.set(title=f"each head's largest logit; red: τ = {run.threshold:g}")
        if run == RUN:
            for level, color in zip(LEVELS, plotting.COLORS, strict=False):
                above = (logits > level).mean(1)
                panels[-1].plot(record["logged"], above, color=color, label=f"above {level:g}")
        else:
            label = f"clipped at a step, τ = {run.threshold:g}"
            panels[-1].plot(record["logged"], record["clipped"], color="black", label=label)
    panels[-1].set(title="fraction of heads")
    panels[-1].legend(frameon=False, fontsize="small")
    for axes in panels:
        axes.axvline(CONSTANT * STEPS, color="black", linestyle="dashed", linewidth=1)
        axes.set(xlabel="step; the rate falls after the dashed line")
    return figure

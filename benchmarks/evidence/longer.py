"""Kimi K2, appendix D, over 20,000 steps: whether QK-clip stops acting by itself."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import optax
from matplotlib.figure import Figure

from benchmarks.evidence import plotting
from benchmarks.evidence.runner import Measure, lookup
from benchmarks.evidence.summaries import largest_logits, loss_of, mean_sd, over_seeds, seeds_of
from benchmarks.evidence.training import SEQ_LEN, Run, curves, finite
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


# As published, at the best rate of low-threshold; and the setting that clips most in
# exploding-logits, three times that rate without weight decay.
LINES = {
    "best rate, decay 0.1, τ = 30": Long(0.016, 0, threshold=30.0),
    "three times the rate, no decay, τ = 100": Long(0.05, 0, threshold=100.0, weight_decay=0.0),
}
PAPER, HOT = LINES
SEEDS = (0,)  # a training takes as long as 50 of the others


def runs(name: str) -> list[Run]:
    """Returns the trainings of one line."""
    return seeds_of(LINES[name], SEEDS)


def study(measure: Measure) -> dict[str, Any]:
    """Trains both lines with each seed."""
    return {name: summary(measure(runs(name))) for name in LINES}


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarizes the trainings of one line; `by_tenth` is the fraction of heads clipped a step."""
    tenths = [[part.mean() for part in np.split(np.array(r["clipped"]), TENTHS)] for r in records]
    logits = [np.split(np.array(largest_logits(r)), TENTHS) for r in records]
    return {
        "by_tenth": [over_seeds(column) for column in np.transpose(tenths)],
        "ever_clipped": [
            over_seeds(r["ever_clipped"][at - 1] for r in records)
            for at in np.linspace(0, len(records[0]["logged"]), TENTHS + 1).astype(int)[1:]
        ],
        "last_clip": over_seeds(record["last_clip"] for record in records),
        "max_logit": over_seeds(max(largest_logits(record)) for record in records),
        "last_logit": over_seeds(part[-1].max() for part in logits),
        "loss": loss_of(records),
    }


def stops(line: Mapping[str, Any]) -> bool:
    """Whether no seed clips in the last tenth, on average over seeds."""
    return line["by_tenth"][-1]["mean"] == 0


def fades(line: Mapping[str, Any]) -> bool:
    """Whether the last tenth clips less than a tenth of what the busiest tenth clips."""
    return line["by_tenth"][-1]["mean"] < 0.1 * max(one["mean"] for one in line["by_tenth"])


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: at the published setting the clip acts, and no head is clipped at the end."""
    line = ours[PAPER]
    acts = line["ever_clipped"][-1]["mean"] > 0
    return plotting.judge(acts, stops(line)) if acts else "not reproduced"


def one_line(ours: Mapping[str, Any]) -> str:
    """Summarizes the result in one line."""
    line = ours[PAPER]
    ever, last = line["ever_clipped"][-1], line["last_clip"]
    return f"{share(ever)} of the heads ever clipped, none after step {mean_sd(last, 0)} of {STEPS}"


def share(fraction: Mapping[str, Any]) -> str:
    """Formats a fraction as a percentage; a small one keeps two digits."""
    percent = 100 * fraction["mean"]
    return f"{percent:.0f}%" if percent == 0 or percent >= 10 else f"{percent:.2g}%"


def answer(line: Mapping[str, Any]) -> str:
    """Says whether the clip stopped."""
    last = f"the last clip is at step {mean_sd(line['last_clip'], 0)}"
    if stops(line):
        return f"the clip stops by itself: {last} of {STEPS:,}"
    return ("the clip fades but does not stop: " if fades(line) else "it does not stop: ") + last


def section(ours: Mapping[str, Any]) -> str:
    """Describes the result in a paragraph and a table."""
    shown, tenth = (0, 1, 2, 4, 6, 9), STEPS // TENTHS
    parts = [f"steps {at * tenth + 1:,} to {(at + 1) * tenth:,}" for at in shown]
    columns = ("", *parts, "ever clipped", "last clip at step", "largest logit", "loss")
    rows = [
        [
            name,
            *(share(line["by_tenth"][at]) for at in shown),
            share(line["ever_clipped"][-1]),
            mean_sd(line["last_clip"], 0),
            mean_sd(line["max_logit"], 0),
            mean_sd(line["loss"]),
        ]
        for name, line in ours.items()
    ]
    run, hot = LINES[PAPER], LINES[HOT]
    constant = round(CONSTANT * STEPS)
    return f"""\
At the published setting {answer(ours[PAPER])}. At three times the rate without weight decay
{answer(ours[HOT])}. The table has the fraction of heads that a step clips. Both train the `gqa`
model on {run.batch_size} x {SEQ_LEN} bytes a step. The schedule is Kimi K2's: the rate is constant
until step {constant:,}, after a warmup of {WARMUP}, and then falls to a tenth as a cosine. A clip
that stops before step {constant:,} does not stop because the rate falls. The first line has the
rate {run.learning_rate:g}, τ = {run.threshold:g} and decay {run.weight_decay:g}; the second
{hot.learning_rate:g}, τ = {hot.threshold:g} and no decay.

{markdown(columns, rows)}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws the fraction of heads clipped a step, and ever clipped, over the steps."""
    measure = lookup(result["runs"])
    figure, (left, right) = plotting.panels(2)
    for name, color in zip(LINES, plotting.COLORS, strict=False):
        for record in measure(runs(name)):
            label = name if record["settings"]["seed"] == 0 else None
            left.plot(record["logged"], record["clipped"], color=color, alpha=0.7, label=label)
            right.plot(record["logged"], record["ever_clipped"], color=color, alpha=0.7)
    for axes in (left, right):
        axes.axvline(CONSTANT * STEPS, color=plotting.LIMIT, linestyle="dashed", linewidth=1)
        axes.set(xlabel="step; the rate falls after the dashed line")
    left.set(title="fraction of heads clipped, mean of 400 steps")
    right.set(title="fraction of heads ever clipped", ylim=(0, 1.05))
    left.legend(frameon=False, fontsize="small")
    return figure

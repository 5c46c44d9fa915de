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
from benchmarks.evidence.summaries import largest_logits, loss_of, over_seeds, seeds_of
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


# The rate is the best of low-threshold. No head reaches the published threshold here, so the second
# line has the next one of low-threshold.
LINES = {f"τ = {tau:g}": Long(0.016, 0, threshold=tau) for tau in (30.0, 20.0)}
PAPER, LOWER = LINES
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
        "logit_by_tenth": [
            over_seeds(parts[tenth].max() for parts in logits) for tenth in range(TENTHS)
        ],
        "loss": loss_of(records),
    }


def acts(line: Mapping[str, Any]) -> bool:
    """Whether the clip ever acts."""
    return line["ever_clipped"][-1]["mean"] > 0


def stops(line: Mapping[str, Any]) -> bool:
    """Whether no head is clipped in the last tenth."""
    return line["by_tenth"][-1]["mean"] == 0


def fades(line: Mapping[str, Any]) -> bool:
    """Whether the last tenth clips less than a tenth of what the busiest tenth clips."""
    return line["by_tenth"][-1]["mean"] < 0.1 * max(one["mean"] for one in line["by_tenth"])


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: the clip acts at τ = 30; at the threshold where it acts it fades, and stops."""
    line = ours[PAPER] if acts(ours[PAPER]) else ours[LOWER]
    if not acts(line):
        return "not reproduced"
    return plotting.judge(acts(ours[PAPER]), fades(line), stops(line))


def one_line(ours: Mapping[str, Any]) -> str:
    """Summarizes the result in one line."""
    texts = (f"{name}: {ever(line)}, {last(line)}" for name, line in ours.items())
    return "; ".join(texts)


def ever(line: Mapping[str, Any]) -> str:
    """Formats the heads ever clipped."""
    return f"{share(line['ever_clipped'][-1])} of the heads ever clipped"


def last(line: Mapping[str, Any]) -> str:
    """Formats the last step with a clip."""
    return f"the last at step {line['last_clip']['mean']:,.0f}" if acts(line) else "none"


def share(fraction: Mapping[str, Any]) -> str:
    """Formats a fraction as a percentage; a small one keeps two digits."""
    percent = 100 * fraction["mean"]
    return f"{percent:.0f}%" if percent == 0 or percent >= 10 else f"{percent:.2g}%"


def answer(line: Mapping[str, Any]) -> str:
    """States whether the clip stopped."""
    if not acts(line):
        return "the clip never acts: no logit reaches it"
    how = "stops by itself" if stops(line) else "fades" if fades(line) else "does not stop"
    return f"{ever(line)}, and the clip {how}, {last(line)} of {STEPS:,}"


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
            f"{line['last_clip']['mean']:,.0f}" if acts(line) else "",
            f"{line['max_logit']['mean']:.0f}",
            f"{line['loss']['mean']:.3f}",
        ]
        for name, line in ours.items()
    ]
    run, constant = LINES[PAPER], round(CONSTANT * STEPS)
    logits = [one["mean"] for one in ours[PAPER]["logit_by_tenth"]]
    return f"""\
With {PAPER}, as in the paper, {answer(ours[PAPER])}. With {LOWER}, {answer(ours[LOWER])}. The table
has the fraction of heads that a step clips. With weight decay of {run.weight_decay:g} logits do not
keep growing here: with {PAPER} the largest of a tenth of the steps is between {min(logits):.0f} and
{max(logits):.0f}. The `gqa` model trains on {run.batch_size} x {SEQ_LEN} bytes a step at the rate
{run.learning_rate:g}, the best of [A low threshold](#a-low-threshold-does-not-change-the-loss),
with one seed. The schedule is Kimi K2's: the rate is constant until step {constant:,}, after a
warmup of {WARMUP}, and then falls to a tenth as a cosine. A clip that stops before step
{constant:,} does not stop because the rate falls.

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

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
from benchmarks.evidence.summaries import loss_of, over_seeds, seeds_of
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
SEEDS = (0,)  # a training takes as long as 50 of the others
LEVELS = (12.0, 15.0, 20.0, 25.0)  # lower thresholds that heads may exceed
JUDGED = "20"  # of them


def study(measure: Measure) -> dict[str, Any]:
    """Trains with each seed.

    Returns:
      `clipped`, the fraction of heads that a step clips, by tenth of the training; `ever_clipped`,
      the fraction of heads, at the end of each tenth; `last_clip`; `above`, for each level, the
      fraction of heads whose largest logit between two logged steps is above it, by tenth; `ever`,
      the fraction ever above it; `largest`, the largest logit, by tenth; `loss`.
    """
    records = measure(seeds_of(RUN, SEEDS))
    logits = [np.reshape(r["max_logits"], (len(r["logged"]), -1)) for r in records]  # [point, head]
    return {
        "clipped": by_tenth(np.array(record["clipped"]) for record in records),
        "ever_clipped": [
            over_seeds(record["ever_clipped"][at] for record in records)
            for at in ends(len(records[0]["logged"]))
        ],
        "last_clip": over_seeds(record["last_clip"] for record in records),
        "above": {f"{x:g}": by_tenth((each > x).mean(1) for each in logits) for x in LEVELS},
        "ever": {f"{x:g}": over_seeds((m > x).any(0).mean() for m in logits) for x in LEVELS},
        "largest": by_tenth((each.max(1) for each in logits), np.max),
        "loss": loss_of(records),
    }


def by_tenth(points: Iterable[np.ndarray], reduce: Any = np.mean) -> list[dict[str, Any]]:
    """Reduces the points of each tenth, and summarizes over seeds."""
    tenths = [[reduce(part) for part in np.split(each, TENTHS)] for each in points]
    return [over_seeds(column) for column in np.transpose(tenths)]


def ends(points: int) -> list[int]:
    """Returns the index of the last point of each tenth."""
    return [points * (tenth + 1) // TENTHS - 1 for tenth in range(TENTHS)]


def acts(ours: Mapping[str, Any]) -> bool:
    """Whether the clip ever acts."""
    return ours["ever_clipped"][-1]["mean"] > 0


def fades(above: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last tenth at the full rate has less than a tenth of the busiest tenth."""
    last = above[int(CONSTANT * TENTHS) - 1]["mean"]
    return last < 0.1 * max(one["mean"] for one in above)


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: the clip acts, and few heads exceed a threshold before the rate falls."""
    return plotting.judge(acts(ours), fades(ours["above"][JUDGED]))


def one_line(ours: Mapping[str, Any]) -> str:
    """Summarizes the result in one line."""
    at = int(CONSTANT * TENTHS) - 1
    first, late = (share(ours["above"][JUDGED][i]) for i in (0, at))
    return (
        f"τ = {RUN.threshold:g}: {share(ours['ever_clipped'][-1])} of the heads ever clipped; above"
        f" {JUDGED}: {first} of the heads in the first tenth, {late} before the rate falls"
    )


def share(fraction: Mapping[str, Any]) -> str:
    """Formats a fraction as a percentage; a small one keeps two digits."""
    percent = 100 * fraction["mean"]
    return f"{percent:.0f}%" if percent == 0 or percent >= 10 else f"{percent:.2g}%"


def section(ours: Mapping[str, Any]) -> str:
    """Describes the result in a paragraph and a table."""
    shown, tenth = (0, 1, 2, 4, 5, 7, 9), STEPS // TENTHS
    parts = [f"{at * tenth + 1:,} to {(at + 1) * tenth:,}" for at in shown]
    rows = [
        [f"above {level}", *(share(above[at]) for at in shown), share(ours["ever"][level])]
        for level, above in ours["above"].items()
    ]
    largest = [f"{ours['largest'][at]['mean']:.0f}" for at in shown]
    rows.append(["largest logit", *largest, ""])
    constant, at = round(CONSTANT * STEPS), int(CONSTANT * TENTHS) - 1
    does = "acts" if acts(ours) else "never acts: no logit reaches τ"
    goes_on = "few heads exceed" if fades(ours["above"][JUDGED]) else "heads go on exceeding"
    below = f"; here logits stay below {RUN.threshold:g}" if not acts(ours) else ""
    return f"""\
With τ = {RUN.threshold:g}, as in the paper, the clip {does}, and at the full learning rate
{goes_on} a lower threshold such as {JUDGED}. In the first tenth of the steps
{share(ours["above"][JUDGED][0])} of the heads are above it, and {share(ours["above"][JUDGED][at])}
in the last tenth before the rate falls. In the last tenth of all
{share(ours["above"][JUDGED][-1])} are: here it is the falling rate that ends the high logits. With
weight decay they do not keep growing either. The table has the fraction of heads whose largest
logit of {STEPS // LOGGED} steps is above a value. The clip never acts, so a training without it has
the same figures. The `gqa` model trains on {RUN.batch_size} x {SEQ_LEN} bytes a step at the rate
{RUN.learning_rate:g}, the best of [A low threshold](#a-low-threshold-does-not-change-the-loss),
with decay {RUN.weight_decay:g} and one seed. The batch there is
{BATCH_SIZE // RUN.batch_size} times as large{below}. The loss is
{ours["loss"]["mean"]:.3f}. The schedule is Kimi K2's: the rate is constant
until step {constant:,}, after a warmup of {WARMUP}, and then falls to a tenth as a cosine.

{markdown(("steps", *parts, "ever"), rows)}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws the largest logits of all heads, and the fraction of heads above lower thresholds."""
    figure, (left, right) = plotting.panels(2)
    (record,) = lookup(result["runs"])(seeds_of(RUN, SEEDS))
    logits = np.reshape(record["max_logits"], (len(record["logged"]), -1))
    left.plot(record["logged"], logits, color=plotting.COLORS[0], linewidth=1, alpha=0.6)
    left.axhline(RUN.threshold or np.inf, color=plotting.LIMIT, linewidth=1)
    left.set(title=f"largest logit of {STEPS // LOGGED} steps, each head; the line is τ")
    for level, color in zip(LEVELS, plotting.COLORS, strict=False):
        above = (logits > level).mean(1)
        right.plot(record["logged"], above, color=color, label=f"above {level:g}")
    right.set(title="fraction of heads")
    right.legend(frameon=False, fontsize="small")
    for axes in (left, right):
        axes.axvline(CONSTANT * STEPS, color="black", linestyle="dashed", linewidth=1)
        axes.set(xlabel="step; the rate falls after the dashed line")
    return figure

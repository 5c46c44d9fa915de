"""The scale of the update that keeps the best learning rate while the width grows."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import muonclip_jax as mc
from benchmarks.evidence import plotting
from benchmarks.evidence.runner import Measure
from benchmarks.evidence.summaries import (
    SEEDS,
    joined,
    loss_of,
    mean_sd,
    over_seeds,
    paired_difference,
)
from benchmarks.evidence.training import (
    ADAM_B2,
    HEAD_DIM,
    SEQ_LEN,
    Run,
    Scale,
    dimension_numbers,
    finite,
)
from benchmarks.report import markdown
from examples.language_model.config import Config
from examples.language_model.models import gqa
from examples.language_model.training.optimizer import make_schedule

TITLE = "Learning rate and width"
CLAIM = (
    "The spectral scale √(n_out / n_in) keeps the best learning rate while the width grows;"
    " √max(1, n_out / n_in) and r √max(n_in, n_out) do not."
)
SOURCE = "Scion, arXiv 2502.07529; dion; Megatron-LM, pull request 3715"
PUBLISHED = "one rate for all widths with the spectral scale"
WIDTHS = (64, 128, 256, 512)
KEY_HEADS = 2  # at each width, as model families of one kind have it
ADAM_RATE = 0.008  # the best of AdamW at width 64 in token-efficiency
# The rules, and where the search for the best rate at the least width starts.
RULES: dict[str, tuple[Scale, float]] = {
    "√max(1, n_out / n_in)": (None, 2.0**-4),
    "0.2 √max(n_in, n_out)": (0.2, 2.0**-5),
    "√(n_out / n_in)": ("spectral", 2.0**-4),
}
SPECTRAL = "√(n_out / n_in)"
STEADY = 0.15  # octaves per doubling: less than half a grid step over all widths


@dataclasses.dataclass(frozen=True)
class Wide(Run):
    """A training of a wider model, `Run` otherwise.

    Query heads and hidden units grow with the width; the width of a head and the key heads do not.
    Each head is a matrix. The learning rate is the matrices'. AdamW's rates follow muP: `ADAM_RATE`
    for the embedding and the norms, and in proportion to 1 / width for the output head.

    Attributes:
      width: Of the residual stream.
    """

    steps: int = 64
    weight_decay: float = 0.0
    per_head: bool = True
    width: int = WIDTHS[0]

    batch_size: ClassVar[int] = 4
    validation_bytes: ClassVar[int] = 2**14
    layers: ClassVar[int] = 1

    def model(self) -> nn.Module:
        """Builds the model."""
        heads = self.width // HEAD_DIM
        return gqa.GQA(self.layers, self.width, heads, KEY_HEADS, HEAD_DIM, hidden=self.width)

    def schedule(self) -> optax.Schedule:
        """Builds the learning rates of the matrices and of AdamW."""
        of_one = make_schedule(Config(steps=self.steps, learning_rate=1.0))
        rates = np.array([self.learning_rate, ADAM_RATE])
        return lambda step: jnp.asarray(rates * of_one(step))

    def transformation(self, shapes: Any, learning_rate: Any) -> optax.GradientTransformation:
        """Builds the optimizer."""
        of_matrices, of_adam = learning_rate
        tx = mc.muonclip(
            of_matrices,
            adam_learning_rate=of_adam,
            consistent_rms=self.consistent_rms,
            weight_decay=self.weight_decay,
            adam_b2=ADAM_B2,
            threshold=None,
            muon_weight_dimension_numbers=dimension_numbers(shapes),
            layout=self.model().layout,
            per_head=self.per_head,
        )
        return optax.chain(tx, optax.stateless(self._slow_head))

    def _slow_head(self, updates: Any, params: Any) -> Any:
        """Scales the update of the output head by 1 / width."""
        del params
        kernel = updates["lm_head"]["kernel"] * (WIDTHS[0] / self.width)
        return {**updates, "lm_head": {"kernel": kernel}}

    def measure(self, saved: pathlib.Path | None = None) -> dict[str, Any]:
        """Trains, and returns the validation loss."""
        return {"validation_loss": self.train(saved)[1]}


def study(measure: Measure) -> dict[str, Any]:
    """Finds the best rate of each rule at each width, and its drift."""
    best, rates = {name: start for name, (_, start) in RULES.items()}, {}
    for width in WIDTHS:
        found = search(measure, width, best)
        rates |= {(name, width): one for name, one in found.items()}
        best = {name: rate for name, (rate, _) in found.items()}  # where the next search starts
    # Other seeds train at the three rates around the best, and at the best of the least width.
    measure([run for (name, width) in rates for run in around(name, width, rates)])
    return {name: summary(measure, name, rates) for name in RULES}


Found = dict[tuple[str, int], tuple[float, list[float]]]


def search(
    measure: Measure, width: int, start: Mapping[str, float]
) -> dict[str, tuple[float, list[float]]]:
    """Searches on a grid of factors of 2, with one seed.

    Returns:
      By rule, the rate whose loss is below the losses at half and at twice the rate, and all rates
      that were tried.
    """
    best = dict(start)
    tried: dict[str, set[float]] = {name: set() for name in RULES}
    while True:
        for name in RULES:
            tried[name] |= {best[name] / 2, best[name], 2 * best[name]}
        runs = [run_of(name, width, rate) for name in RULES for rate in sorted(tried[name])]
        losses = {
            (run.consistent_rms, run.learning_rate): record["validation_loss"]
            for run, record in zip(runs, measure(runs), strict=True)
        }
        before = dict(best)
        for name, (rule, _) in RULES.items():
            best[name] = min(tried[name], key=lambda rate, rule=rule: _loss(losses[rule, rate]))
        if best == before:
            return {name: (best[name], sorted(tried[name])) for name in RULES}


def _loss(loss: float | None) -> float:
    return math.inf if loss is None else loss


def run_of(name: str, width: int, rate: float, seed: int = SEEDS[0]) -> Wide:
    """Returns one training."""
    return Wide(rate, seed, consistent_rms=RULES[name][0], width=width)


def around(name: str, width: int, rates: Found) -> list[Wide]:
    """Returns the trainings of all seeds that the summary of a rule at a width needs."""
    best, carried = rates[name, width][0], rates[name, WIDTHS[0]][0]
    needed = {best / 2, best, 2 * best} | ({carried} if width == WIDTHS[-1] else set())
    return [run_of(name, width, rate, seed) for rate in sorted(needed) for seed in SEEDS]


def summary(measure: Measure, name: str, rates: Found) -> dict[str, Any]:
    """Summarizes one rule.

    Returns:
      `widths`, by width: `rate`, the best of the grid; `loss` there; `best`, the interpolated best
      rate over seeds, as a logarithm to base 2; `losses`, over seeds by rate. `drift`, the slope of
      `best` over the logarithm of the width. `carried`: the loss at the largest width with the best
      rate of the least width, minus the loss with its own.
    """
    widths, best = {}, []
    for width in WIDTHS:
        rate, tried = rates[name, width]
        three = [_all_seeds(measure, name, width, at) for at in (rate / 2, rate, 2 * rate)]
        by_seed = [[r["validation_loss"] for r in records] for records in zip(*three, strict=True)]
        best.append([math.log2(rate) + vertex(*losses) for losses in by_seed])
        widths[str(width)] = {
            "rate": rate,
            "loss": loss_of(three[1]),
            "best": over_seeds(map(finite, best[-1])),
            "losses": {str(at): loss_of(measure([run_of(name, width, at)])) for at in tried}
            | {str(r * rate): loss_of(one) for r, one in zip((0.5, 1, 2), three, strict=True)},
        }
    own, carried = rates[name, WIDTHS[-1]][0], rates[name, WIDTHS[0]][0]
    ends = (_all_seeds(measure, name, WIDTHS[-1], rate) for rate in (carried, own))
    drifts = np.polyfit(np.log2(WIDTHS), np.array(best), 1)[0]
    return {
        "widths": widths,
        "drift": over_seeds(finite(drift) for drift in drifts),
        "carried": paired_difference(*ends),
    }


def _all_seeds(measure: Measure, name: str, width: int, rate: float) -> list[dict[str, Any]]:
    return measure([run_of(name, width, rate, seed) for seed in SEEDS])


def vertex(below: float | None, at: float, above: float | None) -> float:
    """Returns where the parabola through the losses at -1, 0 and 1 is lowest, within [-1, 1].

    Example:
      >>> vertex(1.0, 0.0, 1.0), vertex(0.5, 0.0, 1.0), vertex(2.0, 1.0, 0.0)
      (0.0, -0.16666666666666666, 1.0)
    """
    if below is None or above is None:
        return 0.0
    slope, bend = (above - below) / 2, above + below - 2 * at
    if bend <= 0:
        return -math.copysign(1.0, slope)
    return max(-1.0, min(1.0, -slope / bend))


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: the best rate is steady with the spectral scale, and moves with the others."""
    moving = (trend(ours[name]) == "moving" for name in RULES if name != SPECTRAL)
    return plotting.judge(trend(ours[SPECTRAL]) == "steady", *moving)


def trend(line: Mapping[str, Any]) -> str:
    """Classifies a drift: `steady`; `moving`, by two deviations too; or `unclear`."""
    drift, sd = abs(line["drift"]["mean"]), line["drift"]["sd"]
    return "steady" if drift <= STEADY else "moving" if drift > 2 * sd else "unclear"


def one_line(ours: Mapping[str, Any]) -> str:
    """Summarizes the result in one line."""
    texts = (f"{2 ** line['drift']['mean']:.2f} with {name}" for name, line in ours.items())
    return f"when the width doubles, the best rate changes by a factor of {', '.join(texts)}"


def factor(line: Mapping[str, Any]) -> str:
    """Returns by what the best rate is multiplied when the width doubles, with its deviation."""
    low, mid, high = (
        2 ** (line["drift"]["mean"] + sign * line["drift"]["sd"]) for sign in (-1, 0, 1)
    )
    return f"{mid:.2f} ({low:.2f} to {high:.2f})"


def section(ours: Mapping[str, Any]) -> str:
    """Describes the result in a paragraph and a table."""
    columns = (
        "scale",
        *(f"best rate, width {width}" for width in WIDTHS),
        "times, per doubling (one deviation down, up)",
        f"loss at width {WIDTHS[-1]}",
        f"increase there with the rate of width {WIDTHS[0]}",
    )
    rows = [
        [
            name,
            *(f"{2 ** line['widths'][str(width)]['best']['mean']:.2g}" for width in WIDTHS),
            factor(line),
            mean_sd(line["widths"][str(WIDTHS[-1])]["loss"]),
            mean_sd(line["carried"]),
        ]
        for name, line in ours.items()
    ]
    names = {
        found: [name for name in ours if trend(ours[name]) == found]
        for found in ("steady", "moving", "unclear")
    }
    texts = (
        ("steady", "The best rate does not move with the width under {}."),
        ("moving", "It moves under {}."),
        ("unclear", "It is unclear whether it moves under {}."),
    )
    return f"""\
{" ".join(text.format(joined(names[found])) for found, text in texts if names[found])}

Why "partly": the verdict needs a steady rate with the spectral scale √(n_out / n_in), and a moving
one with both other scales.

A rate is steady if it changes by a factor of at most {2**STEADY:.2f} when the width doubles. It
moves if it
changes by more than that, and by more than two standard deviations. The table has the rates of the
matrices. Each of {len(SEEDS)} seeds has its own best rate, interpolated by a parabola through three
rates a factor of two apart.

The model has {Wide.layers} layer, heads of {HEAD_DIM}, {KEY_HEADS} key heads and, at width n, n
hidden units. It trains for {Wide.steps} steps of {Wide.batch_size} x {SEQ_LEN}
bytes without decay, and the loss is measured on {Wide.validation_bytes:,} bytes. Each head is a
matrix, as in Kimi K3, so queries, keys and values have {HEAD_DIM} outputs at each width. There
√max(1, n_out / n_in) and √(n_out / n_in) differ. The other matrices are square, and both are 1.

AdamW follows muP: {ADAM_RATE:g} for the embedding and the norms, and {ADAM_RATE:g} times
{WIDTHS[0]} / width for the output head. Hidden kernels start with a variance of 1 / n_in, and the
output head and the residual branches start at zero.

{markdown(columns, rows)}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws the loss over the rate, one panel for each rule and one line for each width."""
    figure, axes = plotting.panels(len(RULES), sharey=True)
    for one, (name, line) in zip(axes, result["ours"].items(), strict=True):
        tried: set[float] = set()
        for color, (width, found) in zip(plotting.COLORS, line["widths"].items(), strict=False):
            losses = {float(rate): loss for rate, loss in found["losses"].items() if loss["mean"]}
            rates = sorted(losses)
            means, sds = ([losses[rate][x] for rate in rates] for x in ("mean", "sd"))
            style = {"color": color, "marker": "o", "ms": 3, "capsize": 2}
            one.errorbar(rates, means, sds, label=f"width {width}", **style)
            one.axvline(2 ** found["best"]["mean"], color=color, linestyle="dashed", linewidth=1)
            tried |= {*rates}
        plotting.by_rate(one, sorted(tried))
        one.set_xticks(sorted(tried), [f"{rate:.2g}" for rate in sorted(tried)])
        one.set_title(name)
    axes[0].set_ylabel("validation loss, nats per byte")
    axes[0].legend(frameon=False, title="dashed: best rate")
    return figure

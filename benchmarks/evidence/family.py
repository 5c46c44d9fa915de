"""The Muon family: each transform beside plain Muon, at equal seeds and its own best rate."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import optax
from matplotlib.figure import Figure

import muonclip_jax as mc
from benchmarks.evidence import plotting
from benchmarks.evidence.runner import Measure
from benchmarks.evidence.summaries import (
    joined,
    largest_logits,
    loss_of,
    mean_sd,
    over_seeds,
    paired_difference,
    seeds_of,
)
from benchmarks.evidence.training import ADAM_B2, Run, curves, dimension_numbers
from benchmarks.report import markdown
from examples.language_model.models.layers import VOCABULARY

TITLE = "The Muon family"
CLAIM = (
    "Cautious weight decay, NorMuon, MuonEq and Muon+ lower the loss a little, and"
    " Sinkhorn-balanced momentum replaces AdamW on the embedding and the output head."
)
SOURCE = (
    "modded-nanogpt and nanochat; NorMuon, arXiv 2510.05491; MuonEq, arXiv 2603.28254; Muon+, arXiv"
    " 2602.21545; DeepSeek-V4.1 report, section 2.5"
)
PUBLISHED = (
    "1.3 % (cautious decay), 0.6 % (NorMuon) of a speedrun's time; MuonEq -0.001 to -0.003 of loss"
)
RATES = (0.01, 0.02, 0.04, 0.08)
PLAIN, PLUS = "muon", "Muon+"
# Arguments of `mc.muonclip`; Muon+ is a chain.
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "cautious decay": {"cautious_weight_decay": True},
    "NorMuon": {"neuron_b2": 0.95},
    "MuonEq": {"preconditioning": "outputs"},
    PLUS: {},
    "Sinkhorn": {
        "overrides": {"embed/embedding": mc.Sinkhorn(-2), "lm_head/kernel": mc.Sinkhorn(-1)}
    },
}


@dataclasses.dataclass(frozen=True)
class Variant(Run):
    """A training with one transform of the family.

    Attributes:
      variant: One of `VARIANTS`.
    """

    steps: int = 100
    variant: str = PLAIN

    def transformation(self, shapes: Any, learning_rate: Any) -> optax.GradientTransformation:
        """Builds the optimizer."""
        if self.variant == PLUS:
            return muon_plus(shapes, learning_rate, self.weight_decay, self.consistent_rms)
        return mc.muonclip(
            learning_rate,
            weight_decay=self.weight_decay,
            consistent_rms=self.consistent_rms,
            adam_b2=ADAM_B2,
            threshold=None,
            **VARIANTS[self.variant],
        )

    def measure(self, saved: pathlib.Path | None = None) -> dict[str, Any]:
        """Trains.

        Returns:
          `validation_loss`; `losses`, see `Run.measure`; `max_logit`, the largest.
        """
        metrics, validation_loss = self.train(saved)
        record = curves(metrics)
        return {
            "validation_loss": validation_loss,
            "losses": record["losses"],
            "max_logit": max(largest_logits(record)),
        }


def muon_plus(
    shapes: Any,
    learning_rate: Any,
    weight_decay: float,
    consistent_rms: Any,
    normalize: bool = True,
) -> optax.GradientTransformation:
    """Builds Muon+ as a chain; without `normalize` it is plain Muon."""
    numbers = dimension_numbers(shapes)
    matrices = optax.chain(
        mc.scale_by_muon(nesterov=False, weight_dimension_numbers=numbers),
        mc.normalize_matrices("matrix", numbers) if normalize else optax.identity(),
        mc.scale_by_shape(numbers, consistent_rms=consistent_rms),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    rest = optax.adamw(learning_rate, b2=ADAM_B2, weight_decay=weight_decay)
    rows = mc.routing_table(shapes).rows
    labels = jax.tree.structure(shapes).unflatten(row.optimizer for row in rows)
    return optax.partition({"muon": matrices, "adamw": rest}, labels)


def study(measure: Measure) -> dict[str, Any]:
    """Finds the best rate of each variant with one seed, and compares there at equal seeds."""
    runs = {name: [Variant(rate, 0, variant=name) for rate in RATES] for name in VARIANTS}
    measure([run for line in runs.values() for run in line])
    losses = {name: [r["validation_loss"] for r in measure(line)] for name, line in runs.items()}
    best = {
        name: seeds_of(min(zip(losses[name], line, strict=True), key=lambda pair: pair[0])[1])
        for name, line in runs.items()
    }
    measure([run for line in best.values() for run in line])
    records = {name: measure(line) for name, line in best.items()}
    return {
        name: {
            "learning_rate": best[name][0].learning_rate,
            "losses": {str(rate): loss for rate, loss in zip(RATES, losses[name], strict=True)},
            "loss": loss_of(records[name]),
            "minus_plain": paired_difference(records[name], records[PLAIN]),
            "max_logit": over_seeds(record["max_logit"] for record in records[name]),
        }
        for name in VARIANTS
    }


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: each transform of Muon lowers the loss, and Sinkhorn does not raise it."""
    lower = [effect(ours[name]) == "lower" for name in VARIANTS if name not in (PLAIN, "Sinkhorn")]
    return plotting.judge(*lower, effect(ours["Sinkhorn"]) != "higher")


def effect(line: Mapping[str, Any]) -> str:
    """Compares a loss with plain Muon's: `lower` or `higher` by two deviations, or `equal`."""
    gain = line["minus_plain"]
    if abs(gain["mean"]) <= 2 * gain["sd"]:
        return "equal"
    return "lower" if gain["mean"] < 0 else "higher"


def one_line(ours: Mapping[str, Any]) -> str:
    """Summarizes the result in one line."""
    texts = (f"{name} {mean_sd(ours[name]['minus_plain'], 4)}" for name in ours if name != PLAIN)
    return f"loss minus plain Muon: {'; '.join(texts)}"


def section(ours: Mapping[str, Any]) -> str:
    """Describes the result in a paragraph and a table."""
    columns = ("", "best rate", "loss", "minus plain Muon, same seed", "largest logit")
    rows = [
        [
            name,
            f"{line['learning_rate']:g}",
            mean_sd(line["loss"]),
            "" if name == PLAIN else mean_sd(line["minus_plain"], 4),
            mean_sd(line["max_logit"], 0),
        ]
        for name, line in ours.items()
    ]
    names = {
        found: [name for name in VARIANTS if name != PLAIN and effect(ours[name]) == found]
        for found in ("lower", "equal", "higher")
    }
    below = [n for n in names["equal"] + names["higher"] if n != "Sinkhorn"]
    ends = [n for n in ours if ours[n]["learning_rate"] in (RATES[0], RATES[-1])]
    texts = (
        (
            "lower",
            "The loss is lower than with plain Muon, by more than two deviations, with {}.",
        ),
        ("higher", "It is higher with {}."),
        ("equal", "There is no clear difference with {}."),
    )
    effects = " ".join(t.format(joined(names[found])) for found, t in texts if names[found])
    weak = f"The loss is not clearly lower with {joined(below)}." if below else ""
    edge = "None is at an end of this grid."
    if ends:
        edge = f"At an end of this grid is the best rate of {joined(ends)}."
    return f"""\
{effects}

Why "partly": the verdict needs a lower loss from each transform of Muon, and no higher one from
Sinkhorn-balanced momentum. {weak}

All variants train for {Variant(0.0, 0).steps} steps with the settings and the decay of plain Muon.
Each has its best rate of {joined([f"{rate:g}" for rate in RATES])}, found with the first seed.
{edge} In [Steps to a fixed loss](#steps-to-a-fixed-loss) the scale, the momentum and the model are
others, so its results can differ.

AdamW and Sinkhorn-balanced momentum have the learning rate of the matrices. Sinkhorn-balanced
momentum trains the embedding and the output head of {VOCABULARY} bytes, which have no rare tokens.

{markdown(columns, rows)}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws the loss over the rates, and the difference from plain Muon."""
    ours = result["ours"]
    figure, (left, right) = plotting.panels(2)
    for name, line in ours.items():
        left.plot(RATES, list(line["losses"].values()), marker="o", markersize=3, label=name)
    plotting.by_rate(left, RATES)
    left.set_title("validation loss, nats per byte, first seed")
    left.legend(frameon=False)
    plotting.bars(right, {n: line["minus_plain"] for n, line in ours.items() if n != PLAIN})
    right.axvline(0, color=plotting.LIMIT, linewidth=1)
    right.set_title("minus plain Muon, same seed")
    return figure

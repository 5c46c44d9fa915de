"""One optimizer of `steps-to-target`: its trainings, its best rate, and its steps to the target."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import optax
from optax import contrib

import muonclip_jax as mc
from benchmarks.evidence.runner import Measure
from benchmarks.evidence.summaries import loss_of, mean_or_infinity, over_seeds, seeds_of
from benchmarks.evidence.token_efficiency import crossing
from benchmarks.evidence.training import (
    ADAM_B2,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    WIDTH,
    Run,
    dimension_numbers,
    finite,
)
from examples.language_model.models import gqa

ADAMW, OPTAX, MUON, NORMUON = "AdamW", "optax.contrib.muon", "mc.muon", "mc.muon, NorMuon"
PER_HEAD = "mc.muon, per head"
PASSING = 3.09  # standard errors below the target; modded-nanogpt, rule 3: p < 0.001, one-sided
CLIPPED, THRESHOLD = "mc.muonclip", 30.0
# Arguments of `mc.muon`; the two baselines and `mc.muonclip` are built from none.
VARIANTS: dict[str, dict[str, Any]] = {
    ADAMW: {},
    OPTAX: {},
    MUON: {},
    PER_HEAD: {"per_head": mc.MultiHeadLayout(value="value")},
    NORMUON: {"neuron_b2": 0.95},
    "mc.muon, cautious decay": {"cautious_weight_decay": True},
    "mc.muon, Sinkhorn": {
        "overrides": {"embed/embedding": mc.Sinkhorn(-2), "lm_head/kernel": mc.Sinkhorn(-1)}
    },
    CLIPPED: {},
}


@dataclasses.dataclass(frozen=True)
class Target(Run):
    """A training with one of the optimizers.

    Attributes:
      variant: One of `VARIANTS`.
    """

    variant: str = MUON

    alone: ClassVar[bool] = True  # in one process, which compiles each optimizer once
    batch_size: ClassVar[int] = 4
    validation_bytes: ClassVar[int] = 2**15
    layers: ClassVar[int] = 2

    def model(self) -> nn.Module:
        """Builds the model."""
        return gqa.GQA(self.layers, WIDTH, HEADS, HEADS // 2, HEAD_DIM, HIDDEN)

    def transformation(self, shapes: Any, learning_rate: Any) -> optax.GradientTransformation:
        """Builds the optimizer: weight decay on every parameter, and else its defaults."""
        if self.variant == ADAMW:
            return optax.adamw(learning_rate, b2=ADAM_B2, weight_decay=self.weight_decay)
        if self.variant == CLIPPED:
            return mc.muonclip(
                learning_rate, weight_decay=self.weight_decay, adam_b2=ADAM_B2, threshold=None
            )
        settings: dict[str, Any] = {
            "weight_decay": self.weight_decay,
            "adam_weight_decay": self.weight_decay,
            "adam_b2": ADAM_B2,
        }
        if self.variant == OPTAX:
            numbers = dimension_numbers(shapes)
            return contrib.muon(learning_rate, muon_weight_dimension_numbers=numbers, **settings)
        return mc.muon(learning_rate, **settings, **VARIANTS[self.variant])

    def measure(self, saved: pathlib.Path | None = None) -> dict[str, Any]:
        """Trains, and returns the validation loss."""
        return {"validation_loss": self.train(saved)[1]}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The settings of all optimizers, and the start of the search for rates and steps.

    Attributes:
      run: A training; each optimizer changes its variant, rate and steps.
      target: Validation loss to reach, nats per token.
      spread: Standard deviation of the loss over seeds, for `passes`.
      budgets: Steps of a training, each a full schedule; ascending.
      first: Index of the first budget, and learning rate, of AdamW, of `mc.muonclip` and of the
        others.
      seeds: Of the trainings that count.
      tuning_seeds: Of the trainings that choose the rates; none of `seeds`.
      factor: Between two learning rates of the search.
    """

    run: Target
    target: float
    spread: float
    budgets: tuple[int, ...]
    first: Mapping[str, tuple[int, float]]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    factor: float

    def passes(self, loss: Mapping[str, Any]) -> bool:
        """Whether the mean loss over seeds is below the target by `PASSING` standard errors."""
        if loss["mean"] is None:
            return False
        return (self.target - loss["mean"]) * loss["n"] ** 0.5 >= PASSING * self.spread

    def start(self, name: str) -> tuple[int, float]:
        """Returns where the search of an optimizer starts."""
        return self.first.get(name, self.first[MUON])


def geometric(first: int, last: int, parts: int) -> tuple[int, ...]:
    """Returns budgets from first to last, with `parts` of them in a doubling."""
    count = round(parts * math.log2(last / first))
    return tuple(round(first * 2 ** (i / parts)) for i in range(count + 1))


def line(measure: Measure, protocol: Protocol, name: str) -> dict[str, Any]:
    """Measures one optimizer: its rate, its losses by budget, and its steps to the target."""
    at, start = protocol.start(name)
    threshold = THRESHOLD if name == CLIPPED else None
    run = dataclasses.replace(protocol.run, variant=name, threshold=threshold)
    tuning = tuned(measure, dataclasses.replace(run, steps=protocol.budgets[at]), start, protocol)
    rate = min(tuning, key=lambda rate: mean_or_infinity(tuning[rate]))
    run = dataclasses.replace(run, learning_rate=rate)
    losses = climb(measure, run, at, protocol)
    steps = sorted(losses)
    of_seed = {s: [losses[n][i] for n in steps] for i, s in enumerate(protocol.seeds)}
    each = [finite(crossing(steps, of, protocol.target)) for of in of_seed.values()]
    return {
        "learning_rate": rate,
        "tuning": {f"{rate:g}": loss for rate, loss in tuning.items()},
        "budgets": {str(n): over_seeds(map(finite, losses[n])) for n in steps},
        "each": each,
        "steps": over_seeds(each),
        "unreached": [s for s, of in of_seed.items() if min(of) > protocol.target],
        "at_once": [s for s, of in of_seed.items() if of[0] <= protocol.target],
        "diverged": [
            *(f"rate {rate:g}" for rate, loss in tuning.items() if loss["mean"] is None),
            *(f"{n} steps" for n in steps if math.inf in losses[n]),
        ],
    }


def tuned(
    measure: Measure, run: Target, start: float, protocol: Protocol
) -> dict[float, dict[str, Any]]:
    """Trains at neighboring rates until the best of them is not at an end.

    Returns:
      The loss over the tuning seeds by rate, in ascending order.
    """
    losses: dict[float, dict[str, Any]] = {}
    wanted = [-1, 0, 1]
    while True:
        rates = [float(f"{start * protocol.factor**i:.3g}") for i in wanted]
        at = [dataclasses.replace(run, learning_rate=rate) for rate in rates]
        measure([one for line in at for one in seeds_of(line, protocol.tuning_seeds)])
        losses = {
            one.learning_rate: loss_of(measure(seeds_of(one, protocol.tuning_seeds))) for one in at
        }
        best = min(losses, key=lambda rate: mean_or_infinity(losses[rate]))
        if best == rates[0]:
            wanted = [wanted[0] - 1, *wanted]
        elif best == rates[-1]:
            wanted = [*wanted, wanted[-1] + 1]
        else:
            return losses


def climb(measure: Measure, run: Target, at: int, protocol: Protocol) -> dict[int, list[float]]:
    """Trains with neighboring budgets: up to one that passes, down to one that no seed reaches.

    Returns:
      The losses of the seeds by budget, infinity if a training diverged.
    """
    losses: dict[int, list[float]] = {}

    def train(index: int) -> list[float]:
        steps = protocol.budgets[index]
        records = measure(seeds_of(dataclasses.replace(run, steps=steps), protocol.seeds))
        found = (record["validation_loss"] for record in records)
        losses[steps] = [math.inf if loss is None else loss for loss in found]
        return losses[steps]

    up = at
    while not passed(train(up), protocol) and up + 1 < len(protocol.budgets):
        up += 1
    down = at
    while min(train(down)) <= protocol.target and down > 0:
        down -= 1
    return losses


def passed(losses: Sequence[float], protocol: Protocol) -> bool:
    """Whether all seeds reach the target, and their mean passes."""
    return max(losses) <= protocol.target and protocol.passes(over_seeds(map(finite, losses)))

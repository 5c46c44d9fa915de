"""Sinkhorn-balanced momentum beside AdamW on an embedding whose tokens have Zipf's frequencies."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import muonclip_jax as mc
from benchmarks.evidence import plotting
from benchmarks.evidence.runner import Measure
from benchmarks.evidence.summaries import mean_sd, over_seeds, seeds_of, tune
from benchmarks.evidence.training import finite
from benchmarks.report import markdown

TITLE = "Sinkhorn-balanced momentum for embeddings"
CLAIM = (
    "On an embedding with Zipf's frequencies, Sinkhorn-balanced momentum reaches a lower loss than"
    " AdamW, and a higher error of rare tokens."
)
SOURCE = "DeepSeek-V4.1 report, section 2.5; Emerging-Optimizers, pull request 299"
PUBLISHED = "loss 0.0013 against AdamW's 0.0040; error of rare tokens 0.210 against 0.155"
VOCABULARY, WIDTH, BATCH, STEPS = 4096, 128, 1024, 400
FREQUENT, RARE = slice(0, 100), slice(VOCABULARY // 2, VOCABULARY)
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
OPTIMIZERS = {"adamw": None, "sinkhorn": mc.Sinkhorn()}
TARGETS = {"exact": 0.0, "noisy": 1.0}
ADAM_B2 = 0.95  # as in the trainings of the other experiments


@dataclasses.dataclass(frozen=True)
class Table:
    """One training of an embedding E, which starts at 0, on targets T with entries from N(0, 1).

    A step draws `BATCH` tokens, the i-th most frequent with a probability proportional to 1 / i.
    The loss is the mean of (E[token] − T[token] − noise)².

    Attributes:
      learning_rate: Peak of the schedule, a linear decay to 0.
      seed: Seed of the targets and the tokens.
      optimizer: One of `OPTIMIZERS`, the override of `mc.muon`.
      noise: Standard deviation of the noise in each target of each step.
    """

    learning_rate: float
    seed: int
    optimizer: str
    noise: float = 0.0

    @property
    def program(self) -> "Table":
        """A training with the same compiled program."""
        return Table(0.0, 0, self.optimizer)

    def measure(self) -> dict[str, Any]:
        """Trains, and returns mean squared errors to the targets without noise.

        Returns:
          `validation_loss`, over tokens as they occur; `frequent` and `rare`, over the tokens of
          `FREQUENT` and `RARE`.
        """
        numbers = (jnp.float32(self.learning_rate), jnp.float32(self.noise))
        errors = np.asarray(_training(self.optimizer)(self.seed, *numbers), np.float64)
        return {
            "validation_loss": finite(errors @ frequencies()),
            "frequent": finite(errors[FREQUENT].mean()),
            "rare": finite(errors[RARE].mean()),
        }


def frequencies() -> np.ndarray:
    """Returns the probability of each token, the most frequent first."""
    p = 1 / np.arange(1, VOCABULARY + 1)
    return p / p.sum()


@functools.cache
def _training(optimizer: str) -> Any:
    """Returns a compiled training: seed, rate and noise to the squared error of each token."""
    cumulative = jnp.asarray(np.cumsum(frequencies()), jnp.float32)

    @jax.jit
    def train(seed, rate, noise):
        key = jax.random.key(seed)
        T = jax.random.normal(key, (VOCABULARY, WIDTH))
        tx = mc.muon(
            lambda step: rate * (1 - step / STEPS),
            overrides={"wte": OPTIMIZERS[optimizer]},
            adam_b2=ADAM_B2,
            adam_nesterov=False,
        )

        def step(carry, i):
            params, state = carry
            for_tokens, for_noise = jax.random.split(jax.random.fold_in(key, i))
            uniform = jax.random.uniform(for_tokens, (BATCH,))
            tokens = jnp.minimum(jnp.searchsorted(cumulative, uniform), VOCABULARY - 1)
            targets = T[tokens] + noise * jax.random.normal(for_noise, (BATCH, WIDTH))
            grads = jax.grad(lambda p: jnp.mean((p["wte"][tokens] - targets) ** 2))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"wte": jnp.zeros_like(T)}
        end: Any = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(STEPS))[0]
        return jnp.mean((end[0]["wte"] - T) ** 2, axis=1)

    return train


def study(measure: Measure) -> dict[str, Any]:
    """Tunes both optimizers on both kinds of targets, and summarizes the errors of the tokens."""
    return {
        targets: {name: _line(measure, Table(0.0, 0, name, noise)) for name in OPTIMIZERS}
        for targets, noise in TARGETS.items()
    }


def _line(measure: Measure, table: Any) -> dict[str, Any]:
    tuned = tune(measure, table, RATES)
    best = dataclasses.replace(table, learning_rate=tuned["learning_rate"])
    records = measure(seeds_of(best))
    parts = ("frequent", "rare")
    return tuned | {part: over_seeds(record[part] for record in records) for part in parts}


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: on exact targets the loss is lower, and the error of rare tokens higher."""
    ours = ours["exact"]
    loss, rare = (ours["sinkhorn"][x]["mean"] - ours["adamw"][x]["mean"] for x in ("loss", "rare"))
    return plotting.judge(loss < 0, rare > 0)


def one_line(ours: Mapping[str, Any]) -> str:
    """Summarizes the result in one line."""
    texts = (
        f"{targets} targets: loss {mean_sd(lines['sinkhorn']['loss'], 4)}, AdamW"
        f" {mean_sd(lines['adamw']['loss'], 4)}"
        for targets, lines in ours.items()
    )
    return "; ".join(texts)


def section(ours: Mapping[str, Any]) -> str:
    """Describes the result in a paragraph and a table."""
    columns = ("targets", "optimizer", "best rate", "loss", "frequent tokens", "rare tokens")
    rows = [
        [targets, name, f"{line['learning_rate']:g}"]
        + [mean_sd(line[part], 4) for part in ("loss", "frequent", "rare")]
        for targets, lines in ours.items()
        for name, line in lines.items()
    ]
    return f"""\
The published lower loss of Sinkhorn-balanced momentum does not appear: AdamW reaches the lower loss
here. The error of rare tokens is higher with Sinkhorn-balanced momentum, as published.

Why "partly": the verdict has these two conditions, and one holds. Sinkhorn-balanced momentum gives
the updates of all tokens equal norms, and balances the features as far as that allows.

This experiment has no language model. An embedding of {VOCABULARY} tokens and width {WIDTH} is
fitted to random targets of variance 1, in {STEPS} steps of {BATCH} tokens with Zipf's frequencies.
Errors are mean squared distances to the targets, and the loss weights tokens by their frequency.
Frequent tokens are the first {FREQUENT.stop}; rare tokens are the second half. Noisy targets have
new noise of variance 1 in each step. Both optimizers are tuned for the loss over {len(RATES)}
rates. The published figures are from 1500 steps with a cosine schedule and probabilities
proportional to 1 / i^1.1. Sinkhorn stores one buffer, AdamW two.

{markdown(columns, rows)}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws the loss over the learning rate."""
    figure, axes = plotting.panels(len(TARGETS))
    for one, (targets, lines) in zip(axes, result["ours"].items(), strict=True):
        for name, line in lines.items():
            plotting.band(one, RATES, list(line["losses"].values()), name)
        plotting.by_rate(one, RATES)
        one.set(title=f"{targets} targets", ylabel="loss", yscale="log")
        one.legend(frameon=False)
    return figure

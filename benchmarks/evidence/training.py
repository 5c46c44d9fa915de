"""One training. Its fields determine its result, so that each runs once."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import muonclip_jax as mc
from benchmarks.evidence import checkpoint
from examples.language_model import data
from examples.language_model.config import Config
from examples.language_model.models import gqa, mla
from examples.language_model.models.presets import Latent
from examples.language_model.training.optimizer import ADAM_B2, WEIGHT_DECAY, make_schedule
from examples.language_model.training.step import (
    TrainState,
    initial_state,
    make_loss,
    make_train_step,
)

BATCH_SIZE, SEQ_LEN = 8, 128
VALIDATION_BYTES = 2**16
LOGGED = 50  # points on a curve
SAVED, READ = 100, 500  # steps between checkpoints, and whose metrics are on the device
DIGITS, LOGIT_DIGITS = 5, 4  # of the recorded numbers

LAYERS, WIDTH, HIDDEN, HEADS, HEAD_DIM = 4, 64, 192, 4, 16

Scale: TypeAlias = float | Literal["spectral"] | None  # `consistent_rms` of `mc.muonclip`


def _multi_head(key_heads: int, max_logit: str) -> nn.Module:
    sizes = (LAYERS, WIDTH, HEADS, key_heads, HEAD_DIM, HIDDEN)
    return gqa.GQA(*sizes, max_logit=max_logit)


def _latent(max_logit: str) -> nn.Module:
    del max_logit  # exact
    return mla.MLA(LAYERS, WIDTH, Latent(HEADS, 48, 32, 16, 8, 16), HIDDEN)


MODELS = {
    "mha": functools.partial(_multi_head, HEADS),
    "gqa": functools.partial(_multi_head, HEADS // 2),
    "mla": _latent,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
      learning_rate: Peak of the schedule: linear warmup over 5 % of the steps, then linear decay to
        0.
      seed: Seed of the weights and the batches.
      attention: One of `MODELS`.
      optimizer: `muon`, Algorithm 1 of Kimi K2 without QK-clip; `adamw`; `mc.muon` and
        `optax.muon`, both with their common defaults.
      threshold: Threshold of QK-clip; None never clips.
      steps: Optimizer steps.
      weight_decay: Applied to every parameter, times the learning rate.
      consistent_rms: See `mc.muonclip`; None is Keller Jordan's scale.
      per_head: Whether each head of the query, key and value kernels is a separate matrix.
      ns_coeffs: See `mc.ns_coefficients`.
      ns_steps: The same.
      ns_method: See `mc.newton_schulz`.
      ns_dtype: The same.
      shared_key: See `mc.qk_clip`.
      max_logit: See `mc.dot_product_attention`.
    """

    learning_rate: float
    seed: int
    attention: str = "gqa"
    optimizer: str = "muon"
    threshold: float | None = None
    steps: int = 400
    weight_decay: float = WEIGHT_DECAY
    consistent_rms: Scale = 0.2
    per_head: bool = False
    ns_coeffs: str = "jordan"
    ns_steps: int = 5
    ns_method: str = "auto"
    ns_dtype: str = "float32"
    shared_key: str = "query"
    max_logit: str = "exact"

    batch_size: ClassVar[int] = BATCH_SIZE
    micro_batches: ClassVar[int] = 1
    seq_len: ClassVar[int] = SEQ_LEN
    saved_every: ClassVar[int] = SAVED
    validation_bytes: ClassVar[int] = VALIDATION_BYTES
    validation_rows: ClassVar[int] = 32  # evaluated at a time

    @property
    def program(self) -> Self:
        """A training with the same compiled program, of which these fields are arguments."""
        return dataclasses.replace(self, learning_rate=0.0, seed=0, threshold=None, steps=0)

    def model(self) -> nn.Module:
        """Builds the model."""
        return MODELS[self.attention](self.max_logit)

    def schedule(self) -> optax.Schedule:
        """Builds the learning rates of the steps, which `transformation` gets."""
        return make_schedule(Config(steps=self.steps, learning_rate=self.learning_rate))

    def transformation(self, shapes: Any, learning_rate: Any) -> optax.GradientTransformation:
        """Builds the optimizer for parameters of these shapes."""
        return optimizer(self, shapes, learning_rate)

    def train_step(self, model: nn.Module, tx: optax.GradientTransformation) -> Callable[..., Any]:
        """Builds the train step, see `make_train_step`."""
        return make_train_step(model, tx, self.shared_key)

    def tau(self, learning_rate: Any) -> float:
        """Returns the threshold of a step with this learning rate; infinity never clips."""
        del learning_rate
        return math.inf if self.threshold is None else self.threshold

    def corpus(self) -> data.Corpus:
        """Returns the text."""
        return corpus()

    def measure(self, saved: pathlib.Path | None = None) -> dict[str, Any]:
        """Trains.

        Args:
          saved: File of the checkpoint, from which the training continues if it exists.

        Returns:
          `validation_loss`, nats per byte after the last step, or None if the training diverged;
          `logged`, the steps of the curves; `losses`, the mean training loss since the previous
          logged step; `max_logits` [layer][head], the maximum since then; `clipped`, the number of
          clipped heads at every step; `ever_clipped`, the fraction of heads.
        """
        metrics, validation_loss = self.train(saved)
        return curves(metrics) | {"validation_loss": validation_loss}

    def train(self, saved: pathlib.Path | None = None) -> tuple[list[dict[str, Any]], float | None]:
        """Trains, and returns the metrics of every step and the validation loss."""
        init, step, evaluate = _program(self.program)
        train, schedule = self.corpus().train, self.schedule()

        def inputs(i: int) -> tuple[Any, Any, Any]:
            rate = jnp.float32(schedule(i))
            text = data.batch(train, self.seed, i + 1, self.batch_size, self.seq_len)
            micro = text.reshape(self.micro_batches, -1, self.seq_len + 1)
            return micro, rate, np.float32(self.tau(rate))

        state, metrics = init(self.seed), []
        if saved and saved.exists():
            state, metrics = checkpoint.load(saved, jax.eval_shape(step, state, *inputs(0)))
        for i in range(len(metrics), self.steps):
            state, seen = step(state, *inputs(i))
            metrics.append(seen)
            if len(metrics) % READ == 0:
                metrics[-READ:] = jax.device_get(metrics[-READ:])
            if saved and ((i + 1) % self.saved_every == 0 or i + 1 == self.steps):
                checkpoint.save(saved, state, metrics)
        return jax.device_get(metrics), finite(evaluate(state))


def curves(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the curves of a training, at `LOGGED` steps, from the metrics of every step."""
    logged = np.unique(np.linspace(0, len(metrics), LOGGED + 1).astype(int))[1:]
    losses = np.array([step["loss"] for step in metrics])
    heads = np.array([np.concatenate(list(step["max_logits"].values())) for step in metrics])
    parts = [slice(first, last) for first, last in zip([0, *logged[:-1]], logged, strict=True)]
    return {
        "logged": logged.tolist(),
        "losses": [finite(losses[part].mean()) for part in parts],
        "max_logits": [
            [[finite(x, LOGIT_DIGITS) for x in layer] for layer in heads[part].max(axis=0)]
            for part in parts
        ],
        "clipped": [int(step["qk_clip/clipped_heads"]) for step in metrics],
        "ever_clipped": finite(metrics[-1]["qk_clip/ever_clipped_fraction"]),
    }


def finite(x: Any, digits: int = DIGITS) -> float | None:
    """Rounds a number for JSON, which has no NaN."""
    return float(f"{float(x):.{digits}g}") if math.isfinite(x) else None


@functools.cache
def corpus() -> data.Corpus:
    """Reads the text: the source files of Python's standard library."""
    return data.load(None, SEQ_LEN)


@functools.cache
def _program(run: Run) -> tuple[Any, Any, Any]:
    """Builds the functions of a training: initial state, step and validation loss."""
    model = run.model()
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    make = functools.partial(run.transformation, shapes["params"])

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, text: Any, learning_rate: Any, threshold: Any) -> Any:
        return run.train_step(model, make(learning_rate))(state, text, threshold)

    loss = jax.jit(lambda state, text: make_loss(model)(state.params, text, state.balance)[0])
    count = run.validation_bytes // run.seq_len
    rows = data.evenly_spaced(run.corpus().validation, count, run.seq_len)
    size = min(run.validation_rows, len(rows))
    parts = np.split(rows[: len(rows) // size * size], len(rows) // size)
    init = jax.jit(lambda seed: initial_state(model, make(run.schedule()(0)), seed))
    return init, step, lambda state: float(np.mean([loss(state, x) for x in parts]))


def optimizer(run: Run, shapes: Any, learning_rate: Any) -> optax.GradientTransformation:
    """Builds the optimizer of a training.

    Args:
      run: The training.
      shapes: Shapes of the parameters.
      learning_rate: Learning rate of one step; traced.
    """
    if run.optimizer == "adamw":
        return optax.adamw(learning_rate, b2=ADAM_B2, weight_decay=run.weight_decay)
    numbers = dimension_numbers(shapes)
    if run.optimizer in ("mc.muon", "optax.muon"):
        muon = {"mc.muon": mc.muon, "optax.muon": contrib.muon}[run.optimizer]
        return muon(learning_rate, muon_weight_dimension_numbers=numbers)
    return mc.muonclip(
        learning_rate,
        ns_coeffs=mc.ns_coefficients(run.ns_coeffs, run.ns_steps),
        ns_method=run.ns_method,
        ns_dtype=run.ns_dtype,
        consistent_rms=run.consistent_rms,
        weight_decay=run.weight_decay,
        adam_b2=ADAM_B2,
        threshold=None,
        muon_weight_dimension_numbers=numbers,
        layout=run.model().layout,
        per_head=run.per_head,
    )


def dimension_numbers(shapes: Any) -> Any:
    """Returns the dimension numbers of `mc.routing_table`."""
    rows = mc.routing_table(shapes).rows
    return jax.tree.structure(shapes).unflatten(row.dimension_numbers for row in rows)

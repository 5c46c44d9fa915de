"""The loop around the train step: start or resume, log, save, and what is written at the end."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import data, gqa, mesh, mla, moe, observe, plots, rundir
from lm.checkpoint import Checkpoints
from lm.config import Config, Failed, warn
from lm.presets import PRESETS
from lm.processes import AnyWantsToStop
from lm.step import (
    TrainState,
    initial_state,
    make_loss,
    make_optimizer,
    make_schedule,
    make_train_step,
)

MODELS: dict[str, Callable[..., nn.Module]] = {"gqa": gqa.GQA, "mla": mla.MLA, "moe": moe.MoE}

VALIDATE_EVERY = 100  # steps
VALIDATION_BYTES = 2**17
VALIDATION_BATCH = 16  # sequences
LOADS = ("moe/max_load", "moe/dropped")  # of experts, where the model has them
TRAIN_LOSS_LINES = 20  # logged steps behind `train_loss`; one batch alone is too noisy


def make_model(config: Config) -> nn.Module:
    """Builds the model that the settings name."""
    sizes = PRESETS[config.model][config.preset]
    return MODELS[config.model](**sizes, dtype=jnp.dtype(config.dtype))


def make_evaluation(
    model: nn.Module, corpus: data.Corpus, seq_len: int, places: mesh.Places
) -> Callable[[TrainState], float]:
    """Builds the measurement of the loss on text that is never trained on.

    Args:
      model: The model.
      corpus: Text; sequences are spread evenly over its validation part.
      seq_len: Bytes in a sequence.
      places: Where the weights lie.

    Returns:
      A function from a state to nats per byte, over `VALIDATION_BYTES` or the whole part if that
      is shorter.
    """
    text = data.spread(corpus.validation, max(1, VALIDATION_BYTES // seq_len), seq_len)
    parts = [text[i : i + VALIDATION_BATCH] for i in range(0, len(text), VALIDATION_BATCH)]
    loss_fn = make_loss(model)
    loss = jax.jit(lambda *of: loss_fn(*of)[0], out_shardings=places.everywhere)

    def mean(state, part):
        text = mesh.share(part, places.text(part.shape))
        return float(loss(state.params, text, state.balance))

    return lambda state: sum(mean(state, part) * len(part) for part in parts) / len(text)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """One run.

    Attributes:
      config: Settings.
      corpus: Text.
      path: Run folder; if it holds checkpoints, training goes on from the newest.
      model: The model; `MODELS` has those that the settings can name, at their own sizes.
      should_stop: Asked after each step; if true, the step is saved and no summary is written.
      devices: To train on; None takes all, of all processes.
      speed: Of this start, for people.
    """

    config: Config
    corpus: data.Corpus
    path: pathlib.Path
    model: nn.Module
    should_stop: Callable[[], Any] = lambda: False
    devices: Sequence[Any] | None = None
    speed: observe.Speed = dataclasses.field(default_factory=observe.Speed)

    def train(self) -> int:
        """Trains to the last step, or until asked to stop; returns the finished steps."""
        started = time.monotonic()
        self._tell_places()
        with jax.set_mesh(self.places.mesh), self.checkpoints() as checkpoints:
            done, state = self._start(checkpoints)
            with self._journal(done) as journal:
                done, state = self._loop(done, state, checkpoints, journal)
                checkpoints.wait()  # the summary means that all is on disk
                if not self._stop():
                    validation_loss = self._evaluation(state)
                    if journal is not None:
                        self._finish(validation_loss, time.monotonic() - started)
                        journal.end(done, validation_loss)
        return done

    def _tell_places(self) -> None:
        sizes = self.places.mesh.shape
        if self.places.mesh.size > 1:
            print("mesh " + ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1))
        for note in self.places.notes:
            print(note)

    def checkpoints(self) -> Checkpoints:
        """Opens the checkpoints of this run."""
        return Checkpoints(self.path / rundir.CHECKPOINTS, rundir.identity(self.path))

    def _start(self, checkpoints: Checkpoints) -> tuple[int, TrainState]:
        """Finished steps and the state after them: the newest checkpoint, or step 0."""
        found = checkpoints.restore_newest(self.target)
        if found is not None:
            print(f"resumed after step {found[0]}")
            return found
        if self.config.resume:
            print("no checkpoint yet: starting at step 0")
        return 0, self._new_state()

    def _new_state(self) -> TrainState:
        """Draws each part of the weights on its own device: none ever has the whole model."""
        shardings = jax.tree.map(lambda x: x.sharding, self.target)
        return jax.jit(self.initial_state, out_shardings=shardings)()

    def initial_state(self) -> TrainState:
        """Draws the weights from the seed."""
        return initial_state(self.model, self._tx, self.config.seed)

    @functools.cached_property
    def places(self) -> mesh.Places:
        """Where the weights and the text lie."""
        rows = self.config.batch_size // self.config.accumulate
        return mesh.places(self.model, mesh.make(self.config.mesh, self.devices), rows)

    @functools.cached_property
    def target(self) -> TrainState:
        """Shapes, dtypes and places of the state, on the mesh of this run."""
        shapes = jax.eval_shape(self.initial_state)
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            shapes,
            self.places.state(self._tx, shapes),
        )

    @functools.cached_property
    def _tx(self) -> optax.GradientTransformation:
        return make_optimizer(self.config, self.places.params)

    @functools.cached_property
    def _stop(self) -> Callable[[], Any]:
        alone = jax.process_count() == 1
        return self.should_stop if alone else AnyWantsToStop(self.should_stop, self.places.mesh)

    @property
    def _is_first(self) -> bool:
        return jax.process_index() == 0  # the one that writes what is not an array

    def _journal(self, done: int) -> contextlib.AbstractContextManager[observe.Journal | None]:
        """What process 0 writes down and shows; None in the others."""
        if not self._is_first:
            return contextlib.nullcontext()
        return observe.Journal(self.config, self.path, done, self.speed)

    def _loop(
        self,
        done: int,
        state: TrainState,
        checkpoints: Checkpoints,
        journal: observe.Journal | None,
    ) -> tuple[int, TrainState]:
        config, step = self.config, done
        train_step, tau = self._compile(), np.float32(self.config.tau)
        with (
            data.read_ahead(self._draw, done, config.steps) as texts,
            observe.Tracer(self.path / observe.PROFILE, done, config.profile) as tracer,
        ):
            for step in range(done + 1, config.steps + 1):
                with tracer.step(step):
                    state, metrics = train_step(state, self._text(next(texts)), tau)
                tracer.ended(step, state)
                if rundir.is_logged(step):
                    line = self._line(step, state, metrics)
                    if journal is not None:
                        journal.log(line)  # before the checkpoint of this step can be committed
                stop = self._stop()
                if stop or step == config.steps or step % config.checkpoint_every == 0:
                    if journal is not None:
                        journal.sync(step)
                    checkpoints.save(step, state)
                if stop:
                    break
        return step, state

    @functools.cached_property
    def _schedule(self) -> optax.Schedule:
        return make_schedule(self.config)

    @functools.cached_property
    def _evaluation(self) -> Callable[[TrainState], float]:
        return make_evaluation(self.model, self.corpus, self.config.seq_len, self.places)

    def _compile(self) -> jax.stages.Wrapped:
        train_step = make_train_step(self.model, self._tx)
        shardings = jax.tree.map(lambda x: x.sharding, self.target)
        out_shardings = (shardings, self.places.everywhere)
        return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)

    @property
    def _text_shape(self) -> tuple[int, int, int]:
        """Of the text of one step, in micro-batches: [A, B / A, T + 1]."""
        config = self.config
        return config.accumulate, config.batch_size // config.accumulate, config.seq_len + 1

    def _draw(self, step: int) -> np.ndarray:
        """The rows of one step that the devices of this process need: uint8 [A, own, T + 1]."""
        config, shape = self.config, self._text_shape
        own = mesh.own_rows(self.places.text(shape), shape)
        rows = (np.arange(shape[0])[:, None] * shape[1] + own[None, :]).reshape(-1)
        sizes = config.batch_size, config.seq_len
        text = data.batch(self.corpus.train, config.seed, step, *sizes, rows)
        return text.reshape(shape[0], len(own), shape[2])

    def _text(self, own: np.ndarray) -> jax.Array:
        """The text of one step on all devices: uint8 [A, B / A, T + 1]."""
        shape = self._text_shape
        return jax.make_array_from_process_local_data(self.places.text(shape), own, shape)

    def _line(self, step: int, state: TrainState, metrics: dict[str, Any]) -> dict[str, Any]:
        """The line of one step in the metrics. No time of day: a resumed run writes the same."""
        heads = [np.atleast_2d(layers) for layers in metrics["max_logits"].values()]  # [L N] each
        line = {
            "step": step,
            "loss": float(metrics["loss"]),
            "learning_rate": float(np.asarray(self._schedule(step - 1))),
            "max_logit": float(metrics["qk_clip/max_logit"]),
            "heads_clipped": int(metrics["qk_clip/clipped_heads"]),
            "heads_ever_clipped": int(sum(x.sum() for x in state.ever_clipped.values())),
            "max_logits": [row.tolist() for layers in heads for row in layers],
        }
        line |= {name.replace("/", "_"): float(metrics[name]) for name in LOADS if name in metrics}
        for name in ("loss", "max_logit"):
            if not math.isfinite(line[name]):
                raise Failed(f"{name} is {line[name]} at step {step}; lower --learning-rate")
        if step % VALIDATE_EVERY == 0 and step < self.config.steps:
            line["validation_loss"] = self._evaluation(state)
        return line

    def _finish(self, validation_loss: float, seconds: float) -> None:
        """Draws the plots and writes the summary, which marks the run as done."""
        metrics = rundir.read_metrics(self.path)
        config = self.config
        validation = [(m["step"], m["validation_loss"]) for m in metrics if "validation_loss" in m]
        validation.append((config.steps, validation_loss))
        with observe.written("a plot", config.steps):
            plots.draw(config, metrics, validation, self.path)
        last = [line["loss"] for line in metrics[-TRAIN_LOSS_LINES:]]
        summary = {
            "train_loss": sum(last) / len(last),
            "validation_loss": validation_loss,
            "steps": config.steps,
            "seconds": seconds,
            "tokens": config.steps * config.batch_size * config.seq_len,
        }
        with observe.written(rundir.SUMMARY, config.steps):
            rundir.write_json(self.path / rundir.SUMMARY, summary)
        if rise := observe.validation_rise(validation):
            warn(rise)

"""The training loop: start or resume, train, log, save, and finish with plots and a summary."""

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

from examples.language_model import data
from examples.language_model.config import Config, Failed, warn
from examples.language_model.models import gqa, mla, moe
from examples.language_model.models.presets import PRESETS
from examples.language_model.run_folder import files, plots
from examples.language_model.run_folder.checkpoint import Checkpoints
from examples.language_model.run_folder.journal import Journal, writing
from examples.language_model.run_folder.opening import identity
from examples.language_model.run_folder.profiler import PROFILE, Tracer
from examples.language_model.run_folder.progress import Speed
from examples.language_model.training import mesh
from examples.language_model.training.evaluation import make_evaluation, validation_rise
from examples.language_model.training.optimizer import make_optimizer, make_schedule
from examples.language_model.training.processes import AnyShouldStop, is_first
from examples.language_model.training.step import TrainState, initial_state, make_train_step

MODELS: dict[str, Callable[..., nn.Module]] = {"gqa": gqa.GQA, "mla": mla.MLA, "moe": moe.MoE}

VALIDATE_EVERY = 100  # steps
LOADS = ("moe/max_load", "moe/dropped")  # of experts, if the model has them
TRAIN_LOSS_LINES = 20  # logged steps in the mean `train_loss`; one batch alone is too noisy


def make_model(config: Config) -> nn.Module:
    """Builds the model of the settings."""
    sizes = PRESETS[config.model][config.preset]
    return MODELS[config.model](**sizes, dtype=jnp.dtype(config.dtype))


@dataclasses.dataclass(frozen=True)
class Trainer:
    """One run.

    Attributes:
      config: Settings.
      corpus: Text.
      path: Run folder; if it holds checkpoints, training resumes from the newest.
      model: The model; `MODELS` has the models of `--model`, at the sizes of their presets.
      should_stop: Called after each step; if true, the step is saved and no summary is written.
      devices: To train on; None uses all devices of all processes.
      speed: Throughput of this process.
    """

    config: Config
    corpus: data.Corpus
    path: pathlib.Path
    model: nn.Module
    should_stop: Callable[[], Any] = lambda: False
    devices: Sequence[Any] | None = None
    speed: Speed = dataclasses.field(default_factory=Speed)

    def train(self) -> int:
        """Trains to the last step or until `should_stop`; returns the number of finished steps."""
        started = time.monotonic()
        self._print_shardings()
        with jax.set_mesh(self.shardings.mesh), self.checkpoints() as checkpoints:
            step, state = self._restore_or_initialize(checkpoints)
            with self._journal(step) as journal:
                step, state = self._train_from(step, state, checkpoints, journal)
                checkpoints.wait()  # the summary means that everything is on disk
                if not self._stop():
                    validation_loss = self._evaluation(state)
                    if journal is not None:
                        self._finish(validation_loss, time.monotonic() - started)
                        journal.finish(step, validation_loss)
        return step

    def _print_shardings(self) -> None:
        sizes = self.shardings.mesh.shape
        if self.shardings.mesh.size > 1:
            print("mesh " + ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1))
        for note in self.shardings.notes:
            print(note)

    def checkpoints(self) -> Checkpoints:
        """Opens the checkpoints of this run."""
        return Checkpoints(self.path / files.CHECKPOINTS, identity(self.path))

    def _restore_or_initialize(self, checkpoints: Checkpoints) -> tuple[int, TrainState]:
        """Returns the number of finished steps, and the state after them."""
        found = checkpoints.restore_newest(self.target)
        if found is not None:
            print(f"resumed after step {found[0]}")
            return found
        if self.config.resume:
            print("no checkpoint yet: starting at step 0")
        return 0, self._initialize()

    def _initialize(self) -> TrainState:
        """Initializes each shard on its own device, so that no device holds the full model."""
        shardings = jax.tree.map(lambda x: x.sharding, self.target)
        return jax.jit(self.initial_state, out_shardings=shardings)()

    def initial_state(self) -> TrainState:
        """Initializes the state from the seed."""
        return initial_state(self.model, self._tx, self.config.seed)

    @functools.cached_property
    def shardings(self) -> mesh.Shardings:
        """Of the parameters and the text, on the mesh of this run."""
        batch_size = self.config.batch_size // self.config.accumulate
        run_mesh = mesh.make_mesh(self.config.mesh, self.devices)
        return mesh.make_shardings(self.model, run_mesh, batch_size)

    @functools.cached_property
    def target(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        shapes = jax.eval_shape(self.initial_state)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            self.shardings.state(self._tx, shapes),
        )

    @functools.cached_property
    def _tx(self) -> optax.GradientTransformation:
        return make_optimizer(self.config, self.model.layout, self.shardings.params)

    @functools.cached_property
    def _stop(self) -> Callable[[], Any]:
        if jax.process_count() == 1:
            return self.should_stop
        return AnyShouldStop(self.should_stop, self.shardings.mesh)

    def _journal(self, step: int) -> contextlib.AbstractContextManager[Journal | None]:
        """Returns the journal on process 0; None on the others."""
        if not is_first():
            return contextlib.nullcontext()
        return Journal(self.config, self.path, step, self.speed)

    def _train_from(
        self,
        step: int,
        state: TrainState,
        checkpoints: Checkpoints,
        journal: Journal | None,
    ) -> tuple[int, TrainState]:
        """Trains the steps after `step`; returns the last finished step and its state."""
        config, first = self.config, step + 1
        train_step, threshold = self._jit_train_step(), np.float32(self.config.tau)
        with (
            data.read_ahead(self._draw, step, config.steps) as batches,
            Tracer(self.path / PROFILE, step, config.profile) as tracer,
        ):
            for step in range(first, config.steps + 1):
                with tracer.step(step):
                    state, metrics = train_step(state, self._text(next(batches)), threshold)
                tracer.stop_after(step, state)
                if files.is_logged(step):
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
        return make_evaluation(self.model, self.corpus, self.config.seq_len, self.shardings)

    def _jit_train_step(self) -> jax.stages.Wrapped:
        train_step = make_train_step(self.model, self._tx)
        shardings = jax.tree.map(lambda x: x.sharding, self.target)
        out_shardings = (shardings, self.shardings.replicated)
        return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)

    @property
    def _text_shape(self) -> tuple[int, int, int]:
        """Of the text of one step, in micro-batches: [A, B / A, T + 1]."""
        config = self.config
        return config.accumulate, config.batch_size // config.accumulate, config.seq_len + 1

    def _draw(self, step: int) -> np.ndarray:
        """Draws the sequences of one step for the devices of this process: uint8 [A, b, T + 1]."""
        config, shape = self.config, self._text_shape
        local = mesh.local_sequences(self.shardings.text(shape), shape)
        indices = (np.arange(shape[0])[:, None] * shape[1] + local[None, :]).reshape(-1)
        sizes = config.batch_size, config.seq_len
        text = data.batch(self.corpus.train, config.seed, step, *sizes, indices)
        return text.reshape(shape[0], len(local), shape[2])

    def _text(self, local: np.ndarray) -> jax.Array:
        """Shards the text of one step over all devices: uint8 [A, B / A, T + 1]."""
        shape = self._text_shape
        return jax.make_array_from_process_local_data(self.shardings.text(shape), local, shape)

    def _line(self, step: int, state: TrainState, metrics: dict[str, Any]) -> dict[str, Any]:
        """Returns the metrics of one step, without times: a resumed run writes the same bytes."""
        heads = [np.atleast_2d(layers) for layers in metrics["max_logits"].values()]  # [L N] each
        line = {
            "step": step,
            "loss": float(metrics["loss"]),
            "learning_rate": float(np.asarray(self._schedule(step - 1))),
            "max_logit": float(metrics["qk_clip/max_logit"]),
            "heads_clipped": int(metrics["qk_clip/clipped_heads"]),
            "heads_ever_clipped": int(sum(x.sum() for x in state.ever_clipped.values())),
            "max_logits": [layer.tolist() for layers in heads for layer in layers],
        }
        line |= {name.replace("/", "_"): float(metrics[name]) for name in LOADS if name in metrics}
        for name in ("loss", "max_logit"):
            if not math.isfinite(line[name]):
                raise Failed(f"{name} is {line[name]} at step {step}; lower --learning-rate")
        if step % VALIDATE_EVERY == 0 and step < self.config.steps:
            line["validation_loss"] = self._evaluation(state)
        return line

    def _finish(self, validation_loss: float, seconds: float) -> None:
        """Draws the plots and writes the summary, which marks the run as complete."""
        metrics = files.read_metrics(self.path)
        config = self.config
        validation = [(m["step"], m["validation_loss"]) for m in metrics if "validation_loss" in m]
        validation.append((config.steps, validation_loss))
        with writing("a plot", config.steps):
            plots.draw(config, metrics, validation, self.path)
        last = [line["loss"] for line in metrics[-TRAIN_LOSS_LINES:]]
        summary = {
            "train_loss": sum(last) / len(last),
            "validation_loss": validation_loss,
            "steps": config.steps,
            "seconds": seconds,
            "tokens": config.steps * config.batch_size * config.seq_len,
        }
        with writing(files.SUMMARY, config.steps):
            files.write_json(self.path / files.SUMMARY, summary)
        if rise := validation_rise(validation):
            warn(rise)

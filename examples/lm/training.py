"""The loop around the train step: start or resume, log, save, and what is written at the end."""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import tqdm

from lm import data, gqa, plots, rundir
from lm.checkpoint import Checkpoints
from lm.config import Config
from lm.step import (
    TrainState,
    initial_state,
    make_loss,
    make_optimizer,
    make_schedule,
    make_train_step,
)

MODELS: dict[str, Callable[[], nn.Module]] = {"gqa": gqa.GQA}

VALIDATE_EVERY = 100  # steps
VALIDATION_BYTES = 2**17
VALIDATION_BATCH = 16  # sequences
TRAIN_LOSS_LINES = 20  # logged steps behind `train_loss`; one batch alone is too noisy


class Failed(RuntimeError):
    """The run cannot go on; the text says at which step, why, and the cure."""


def make_evaluation(model: nn.Module, corpus: data.Corpus, seq_len: int) -> Callable[[Any], float]:
    """Builds the measurement of the loss on text that is never trained on.

    Args:
      model: The model.
      corpus: Text; sequences are spread evenly over its validation part.
      seq_len: Bytes in a sequence.

    Returns:
      A function from weights to nats per byte, over `VALIDATION_BYTES` or the whole part if that
      is shorter.
    """
    text = data.spread(corpus.validation, max(1, VALIDATION_BYTES // seq_len), seq_len)
    parts = [text[i : i + VALIDATION_BATCH] for i in range(0, len(text), VALIDATION_BATCH)]
    loss_fn = make_loss(model)
    loss = jax.jit(lambda params, text: loss_fn(params, text)[0])
    return lambda params: sum(float(loss(params, part)) * len(part) for part in parts) / len(text)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """One run.

    Attributes:
      config: Settings.
      corpus: Text.
      path: Run folder; if it holds checkpoints, training goes on from the newest.
      model: The model; `MODELS` has those that the settings can name, at their own sizes.
      should_stop: Asked after each step; if true, the step is saved and no summary is written.
    """

    config: Config
    corpus: data.Corpus
    path: pathlib.Path
    model: nn.Module
    should_stop: Callable[[], Any] = lambda: False

    def train(self) -> int:
        """Trains to the last step, or until asked to stop; returns the finished steps."""
        started = time.monotonic()
        with Checkpoints(self.path / rundir.CHECKPOINTS) as checkpoints:
            done, state = self._start(checkpoints)
            rundir.cut_metrics(self.path, done)
            done, state = self._loop(done, state, checkpoints)
        if not self.should_stop():
            self._finish(self._evaluation(state.params), time.monotonic() - started)
        return done

    def _start(self, checkpoints: Checkpoints) -> tuple[int, TrainState]:
        """Finished steps and the state after them: the newest checkpoint, or step 0."""
        steps = checkpoints.steps()
        if steps:
            target = jax.eval_shape(self.initial_state)
            state = checkpoints.restore(steps[-1], target)
            print(f"resumed after step {steps[-1]}")
            return steps[-1], state
        if self.config.resume:
            print("no checkpoint yet: starting at step 0")
        return 0, jax.jit(self.initial_state)()

    def initial_state(self) -> TrainState:
        """Draws the weights from the seed."""
        return initial_state(self.model, make_optimizer(self.config), self.config.seed)

    def _loop(
        self, done: int, state: TrainState, checkpoints: Checkpoints
    ) -> tuple[int, TrainState]:
        config, step = self.config, done
        train_step = self._compile()
        with (
            (self.path / rundir.METRICS).open("ab") as log,
            tqdm.tqdm(total=config.steps, initial=done, disable=config.no_progress) as bar,
        ):
            for step in range(done + 1, config.steps + 1):
                state, metrics = train_step(state, self._text(step))
                if rundir.is_logged(step):
                    line = self._line(step, state, metrics)
                    log.write(rundir.metrics_line(line))
                    log.flush()  # before the checkpoint of this step can be committed
                    self._show(bar, line)
                bar.update()
                stop = self.should_stop()
                if stop or step == config.steps or step % config.checkpoint_every == 0:
                    checkpoints.save(step, state)
                if stop:
                    break
        return step, state

    @functools.cached_property
    def _schedule(self) -> optax.Schedule:
        return make_schedule(self.config)

    @functools.cached_property
    def _evaluation(self) -> Callable[[Any], float]:
        return make_evaluation(self.model, self.corpus, self.config.seq_len)

    def _compile(self) -> Callable[[TrainState, np.ndarray], tuple[TrainState, dict[str, Any]]]:
        clips = self.config.optimizer == "muonclip"
        threshold = self.config.threshold if clips else math.inf
        train_step = make_train_step(self.model, make_optimizer(self.config), threshold)
        return jax.jit(train_step, donate_argnums=0)

    def _text(self, step: int) -> np.ndarray:
        """The text of one step, in micro-batches: uint8 [A, B / A, T + 1]."""
        config = self.config
        text = data.batch(self.corpus.train, config.seed, step, config.batch_size, config.seq_len)
        return text.reshape(config.accumulate, -1, config.seq_len + 1)

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
        for name in ("loss", "max_logit"):
            if not math.isfinite(line[name]):
                raise Failed(f"{name} is {line[name]} at step {step}; lower --learning-rate")
        if step % VALIDATE_EVERY == 0 and step < self.config.steps:
            line["validation_loss"] = self._evaluation(state.params)
        return line

    def _show(self, bar: tqdm.tqdm, line: dict[str, Any]) -> None:
        bytes_per_step = self.config.batch_size * self.config.seq_len
        bar.set_postfix_str(
            f"loss {line['loss']:.3f}"
            f", {bytes_per_step * (bar.format_dict['rate'] or 0):,.0f} tokens/s"
            f", largest logit {line['max_logit']:.1f}, heads clipped {line['heads_clipped']}",
            refresh=False,
        )

    def _finish(self, validation_loss: float, seconds: float) -> None:
        """Draws the plots, then writes the summary, which means that the run is done."""
        metrics = rundir.read_metrics(self.path)
        config = self.config
        plots.draw(config, metrics, validation_loss, self.path)
        last = [line["loss"] for line in metrics[-TRAIN_LOSS_LINES:]]
        summary = {
            "train_loss": sum(last) / len(last),
            "validation_loss": validation_loss,
            "steps": config.steps,
            "seconds": seconds,
            "tokens": config.steps * config.batch_size * config.seq_len,
        }
        rundir.write_json(self.path / rundir.SUMMARY, summary)

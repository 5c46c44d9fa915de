"""QK-clip in the trainers of tunix (PyPI `google-tunix`): `PeftTrainer` and its subclasses.

Muon needs nothing from here: pass `mc.muon(...)` to the trainer, which accepts any optax optimizer.
"""

import copy
import functools
import importlib.metadata
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx

import muonclip_jax as mc

_Trainer = TypeVar("_Trainer")
_RUN_WITH = "0.1.7"
# Attributes of a trainer. `create_train_step_fn` and `_post_process_train_step` are replaced.
_HOOKS = (
    "model",
    "config",
    "loss_fn",
    "_has_aux",
    "_lora_enabled",
    "_iter_steps",
    "_buffered_train_metrics",
    "_post_process_train_step",
    "create_train_step_fn",
    "clear_jit_cache",
)
_STEP = ["model", "optimizer", "inputs"]


def add_qk_clip(
    trainer: _Trainer,
    *,
    threshold: float = 100.0,
    alpha: float = 0.5,
    shared_key: str = "query",
    expect: int | None = None,
) -> _Trainer:
    """Makes a trainer of tunix clip queries and keys after each update of the optimizer.

    It works for `PeftTrainer` and the trainers that inherit its train step: `DPOTrainer`,
    `DistillationTrainer`, and the `Trainer` of reinforcement learning, which is
    `rl_cluster.actor_trainer`. Call it before training. The model is not changed: its max logits
    are read from the program of the loss, and so are the kernels of queries and keys.

    With `gradient_accumulation_steps`, the clip runs once per update, on the largest logits of all
    its micro-batches. The scalars of `mc.qk_clip_metrics` are logged beside the loss, as
    `qk_clip/max_logit` and so on. Nothing is added to checkpoints.

    Args:
      trainer: The trainer.
      threshold: The threshold τ. `math.inf` logs the max logits and clips nothing.
      alpha: As in `mc.qk_clip`.
      shared_key: As in `mc.qk_clip`.
      expect: How many attentions one call of the loss runs. None: `model.config.num_layers`.

    Returns:
      The trainer.

    Raises:
      TypeError: if the trainer lacks what the trainers of the known version have.
      ValueError: if only LoRA parameters are trained and the threshold is finite: a clip would
        change frozen kernels, which tunix does not save. If `expect` is needed, or the trainer has
        a clip already. At the first step: if another number of attentions is found, or attention
        that cannot be read or clipped, such as flash attention and QK-norm.

    Example:
      ```
      trainer = PeftTrainer(model, mc.muon(2e-4, consistent_rms=0.2), config)
      trainer = add_qk_clip(trainer, threshold=100.0)
      ```

    References:
      Kimi K2, arXiv 2507.20534, algorithm 1. google/tunix, `tunix/sft/peft_trainer.py`.
    """
    hooked: Any = trainer
    _check(hooked, threshold)
    clip = _Clip(hooked, threshold, alpha, shared_key, expect)
    hooked.create_train_step_fn = lambda: clip.train_step
    hooked._post_process_train_step = clip.after_step
    hooked.clear_jit_cache()
    return trainer


def _check(trainer: Any, threshold: float) -> None:
    """Raises if the clip cannot work in a trainer."""
    missing = [name for name in _HOOKS if not hasattr(trainer, name)]
    if not missing and list(inspect.signature(trainer.create_train_step_fn()).parameters) != _STEP:
        missing = [f"a train step of {', '.join(_STEP)}"]
    if missing:
        try:
            version = importlib.metadata.version("google-tunix")
        except importlib.metadata.PackageNotFoundError:
            version = "no version"
        raise TypeError(
            f"add_qk_clip: {type(trainer).__name__} has no {', '.join(missing)}. Expected a "
            f"trainer like PeftTrainer of google-tunix {_RUN_WITH}, installed is {version}. "
            f"Install google-tunix=={_RUN_WITH}, or call mc.with_max_logits and mc.qk_clip in a "
            "loop of your own."
        )
    if "create_train_step_fn" in vars(trainer):
        raise ValueError("add_qk_clip: the trainer has a clip already. Call it once.")
    if trainer._lora_enabled and threshold != math.inf:
        raise ValueError(
            "add_qk_clip: the model has LoRA parameters, and tunix trains and saves only them. A "
            "clip scales the frozen kernels of queries and keys, so that adapters restored from a "
            "checkpoint would not fit. Train without QK-clip, or pass threshold=math.inf to log "
            "the max logits."
        )


class _Aux(NamedTuple):
    """The auxiliary result of a loss, and the max logits."""

    aux: Any
    max_logits: Any


class _Clip:
    """The two methods of one trainer, and what they pass on.

    Attributes:
      max_logits: Largest logits of the micro-batches since the last update; None if there are none.
    """

    def __init__(
        self, trainer: Any, threshold: float, alpha: float, shared_key: str, expect: int | None
    ):
        self.trainer = trainer
        self.options = {"threshold": threshold, "alpha": alpha, "shared_key": shared_key}
        self.expect = _number_of_attentions(trainer.model) if expect is None else expect
        self.post_process: Callable[[Any], None] = trainer._post_process_train_step
        self.max_logits: Any = None
        self.qk_clip: Any = None  # known when the loss is traced

    def train_step(self, model: nnx.Module, optimizer: nnx.Optimizer, inputs: Any) -> Any:
        """Runs the train step of the trainer with a loss that returns the max logits too."""
        trainer = copy.copy(self.trainer)
        trainer.loss_fn = self.with_max_logits(self.trainer.loss_fn, self.trainer._has_aux)
        trainer._has_aux = True
        result = type(trainer).create_train_step_fn(trainer)(model, optimizer, inputs)
        if not isinstance(result[1], _Aux):
            raise TypeError(
                f"add_qk_clip: the train step of {type(trainer).__name__} returned no aux of its "
                "loss_fn. Expected (loss, aux, grad_norm), as PeftTrainer returns them."
            )
        return result

    def with_max_logits(self, loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
        """Returns a loss of an NNX model that returns `(loss, _Aux)`."""

        @functools.wraps(loss_fn)  # `nnx.value_and_grad` reads the names of the arguments
        def loss_and_stats(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            graph, params, others = nnx.split(model, nnx.Param, ...)

            def loss(params: Any, others: Any) -> Any:
                copied = nnx.merge(graph, params, others)
                out = loss_fn(copied, *args, **kwargs)
                out, aux = out if has_aux else (out, None)
                return out, (aux, nnx.state(copied, nnx.Not(nnx.Param)))

            function = mc.with_max_logits(loss, expect=self.expect, has_aux=True)
            out, ((aux, others), stats) = function(params, others)
            nnx.update(model, others)
            layout = mc.analyze(loss, params, others)
            clip = functools.partial(mc.qk_clip, layout=layout, **self.options)
            jax.eval_shape(clip, params, stats)  # what cannot be clipped raises before an update
            self.qk_clip = jax.jit(clip)
            return out, _Aux(aux, stats)

        return loss_and_stats

    def after_step(self, aux: _Aux) -> None:
        """Clips after an update; the trainer calls this after each micro-batch."""
        before, now = self.max_logits, aux.max_logits
        self.max_logits = now if before is None else _merge(before, now)
        trainer = self.trainer
        micro_batches = trainer.config.gradient_accumulation_steps or 1
        if (trainer._iter_steps + 1) % micro_batches == 0:
            params = nnx.state(trainer.model, nnx.Param)
            params, info = self.qk_clip(params, self.max_logits)
            nnx.update(trainer.model, params)
            metrics = {name: ([x], np.max) for name, x in mc.qk_clip_metrics(info).items()}
            trainer._buffered_train_metrics.additional_metrics |= metrics
            self.max_logits = None
        self.post_process(aux.aux)


_merge = jax.jit(mc.merge_max_logits)


def _number_of_attentions(model: Any) -> int:
    """Returns the number of layers that the config of a model of tunix has."""
    number = getattr(getattr(model, "config", None), "num_layers", None)
    if not isinstance(number, int):
        raise ValueError(
            f"add_qk_clip: {type(model).__name__} has no config.num_layers. Pass expect=, the "
            "number of attentions of the model."
        )
    return number

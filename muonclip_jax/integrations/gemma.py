"""QK-clip in kauldron, the trainer of Gemma (PyPI `gemma` and `kauldron`): a train step.

Muon needs nothing from here: pass `mc.muon(...)` as `optimizer` of `kd.train.Trainer`.
"""

import dataclasses
import importlib.metadata
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from kauldron import kd

import muonclip_jax as mc

_RUN_WITH = "1.4.4"
_COLLECTION = "max_logits"
_OPTIONS = ("threshold", "alpha", "shared_key", "ignore")

_step = getattr(kd.train.TrainStep, "_step", lambda: None)
if [*inspect.signature(_step).parameters] != ["self", "state", "batch"]:
    raise ImportError(
        "muonclip_jax.integrations.gemma: kd.train.TrainStep has no method _step(state, batch). "
        f"Expected one as in kauldron {_RUN_WITH}, installed is "
        f"{importlib.metadata.version('kauldron')}. Install kauldron=={_RUN_WITH}, or call "
        "mc.with_max_logits and mc.qk_clip in a train step of your own."
    )


@dataclasses.dataclass(kw_only=True, eq=False, frozen=True)
class QKClipTrainStep(kd.train.TrainStep):
    """The train step of kauldron, with a clip of queries and keys after the update.

    Pass it as `trainstep` of `kd.train.Trainer`. The model is not changed: its max logits are read
    from the program of the train step, and its query and key kernels from its forward pass. So it
    works for Gemma, with `q_einsum` and `kv_einsum` or with `qkv_einsum`, and for other models.

    Under `optax.MultiSteps`, the clip runs once per update, on the largest logits of all its
    micro-batches. They are kept in `state.collections["max_logits"]` meanwhile. Otherwise the state
    and its checkpoints are as in `kd.train.TrainStep`. The scalars of `mc.qk_clip_metrics` are
    metrics, `metrics/qk_clip/max_logit` and so on.

    Attributes:
      threshold: The threshold τ. `math.inf` logs the max logits and clips nothing.
      alpha: As in `mc.qk_clip`.
      shared_key: As in `mc.qk_clip`.
      expect: How many attentions the model has. None: `model.config.num_layers`.
      ignore: Attention modules that are not clipped, as in `mc.qk_clip`.

    Raises:
      ValueError: when the state is initialized, if the model has LoRA parameters and the threshold
        is finite: a clip would change frozen kernels. If `expect` is needed. At the first step: if
        another number of attentions is found, or attention that cannot be read or clipped, such as
        the QK-norm of Gemma 3.

    Example:
      ```
      trainer = kd.train.Trainer(
          optimizer=mc.muon(2e-4, consistent_rms=0.2),
          trainstep=QKClipTrainStep(threshold=100.0),
          ...
      )
      ```

    References:
      Kimi K2, arXiv 2507.20534, algorithm 1. google-research/kauldron,
      `kauldron/train/train_step.py`.
    """

    threshold: float = 100.0
    alpha: float = 0.5
    shared_key: str = "query"
    expect: int | None = None
    ignore: tuple[str, ...] = ()

    def init(self, elem_spec: Any, **options: Any) -> Any:
        """Initializes the state. Arguments: see `kd.train.TrainStep.init`."""
        state = super().init(elem_spec, **options)
        self._check_trained(state.params)
        if _multi_steps(state.opt_state) is None:
            return state
        inner = super()._step
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), elem_spec)
        shapes = jax.eval_shape(lambda s, b: self._run(inner, s, b)[2], state, batch)
        start = jax.jit(
            lambda: jax.tree.map(lambda x: jnp.full(x.shape, -jnp.inf, x.dtype), shapes),
            out_shardings=kd.sharding.REPLICATED,
        )
        return state.replace(collections={**state.collections, _COLLECTION: start()})

    def _step(self, state: Any, batch: Any) -> tuple[Any, Any]:
        new, context, largest, analysis = self._run(super()._step, state, batch)
        emit, multi_steps = True, _multi_steps(new.opt_state)
        if multi_steps is not None:
            emit = multi_steps.mini_step == 0
            largest = mc.merge_max_logits(state.collections[_COLLECTION], largest)
            kept = jax.tree.map(lambda x: jnp.where(emit, -jnp.inf, x), largest)
            new = new.replace(collections={**new.collections, _COLLECTION: kept})
        options = {name: getattr(self, name) for name in _OPTIONS}
        params, info = mc.qk_clip(new.params, largest, analysis, where=emit, **options)
        metrics = {
            name.removeprefix("qk_clip/"): kd.metrics.AverageState.from_values(value)
            for name, value in mc.qk_clip_metrics(info).items()
        }
        metrics = {**context.metric_states, "qk_clip": metrics}
        return new.replace(params=params), context.replace(metric_states=metrics)

    def _run(
        self, step: Callable[..., tuple[Any, Any]], state: Any, batch: Any
    ) -> tuple[Any, Any, Any, mc.Analysis]:
        """Runs a train step; returns state, context, max logits `[*layers, heads]`, analysis."""

        def of_params(params: Any) -> tuple[Any, Any]:
            return step(state.replace(params=params), batch)

        def forward(params: Any) -> Any:
            context = kd.train.Context.from_state_and_batch(state=state, batch=batch)
            return kd.train.forward(
                context.replace(params=params),
                model=self.model,
                rngs=self.rng_streams.train_rngs(state.step),
                is_training=True,
            ).preds

        expect = _number_of_attentions(self.model) if self.expect is None else self.expect
        (new, context), stats = mc.with_max_logits(of_params, expect=expect)(state.params)
        analysis = mc.analyze(forward, state.params)
        _, info = mc.qk_clip(state.params, stats, analysis, threshold=math.inf)
        paths = {f"{path}/max_logits": x for path, x in info.max_logits.items()}
        return new, context, traverse_util.unflatten_dict(paths, sep="/"), analysis

    def _check_trained(self, params: Any) -> None:
        """Raises if only LoRA parameters are trained and a clip would change the others."""
        paths = [jax.tree_util.keystr(p, simple=True) for p, _ in jax.tree.leaves_with_path(params)]
        if any("lora" in path for path in paths) and self.threshold != math.inf:
            raise ValueError(
                "QKClipTrainStep: the model has LoRA parameters. A clip scales the frozen kernels "
                "of queries and keys, so that the adapters do not fit the original weights. Use "
                "kd.train.TrainStep, or pass threshold=math.inf to log the max logits."
            )


def _multi_steps(opt_state: Any) -> optax.MultiStepsState | None:
    """Returns the state of `optax.MultiSteps` in the state of an optimizer."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, optax.MultiStepsState))
    return next((node for node in nodes if isinstance(node, optax.MultiStepsState)), None)


def _number_of_attentions(model: Any) -> int:
    """Returns the number of layers that the config of a Gemma has."""
    number = getattr(getattr(model, "config", None), "num_layers", None)
    if not isinstance(number, int):
        raise ValueError(
            f"QKClipTrainStep: {type(model).__name__} has no config.num_layers. Pass expect=, the "
            "number of attentions of the model."
        )
    return number

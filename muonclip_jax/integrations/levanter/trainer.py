"""The trainer that clips: Levanter's `Trainer` with max logits from the loss to the clip.

Inside the loss, each attention gets a slot whose gradient is its max logits (`gradient_slot`).
haliax joins the slots of micro-batches by its `CustomGradientAccumulation`. They are neither in the
model, nor in the optimizer, nor in checkpoints and exports.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from muonclip_jax.integrations.levanter.attention import (
    attentions,
    clipped,
    empty_slot,
    with_slots,
)
from muonclip_jax.integrations.levanter.framework import hooks
from muonclip_jax.integrations.levanter.optimizer import MuonClipTransformation

_SLOTS = "qk_clip_slots"  # the entry of the metrics that passes the slots from the loss to the clip


class MuonClipTrainer(hooks.Trainer):
    """Levanter's `Trainer`, which clips queries and keys after each step.

    Args:
      config: See `Trainer`.
      optimizer: The result of `MuonClipConfig.build`, or another optimizer with `threshold`.
      loss_fn: See `Trainer`.
      threshold: τ, for an optimizer that was not built by `MuonClipConfig`.
      **options: See `Trainer`.

    Raises:
      ValueError: if no threshold is given; while tracing, if the model has no `Attention` of
        Levanter, or one whose queries and keys cannot be clipped: normalized queries or keys, or
        only one of them trainable.
      RuntimeError: after a step, if max logits did not arrive from an attention module.
    """

    def __init__(
        self,
        config: Any,
        optimizer: Any,
        loss_fn: Any,
        *,
        threshold: float | None = None,
        **options: Any,
    ):
        if isinstance(optimizer, MuonClipTransformation):
            threshold = optimizer.threshold if threshold is None else threshold
            optimizer = optimizer.inner
        elif threshold is None:
            raise ValueError(
                "MuonClipTrainer: this optimizer has no threshold. Set `optimizer: {type: "
                "muonclip}`, or pass threshold=100.0."
            )
        super().__init__(config, optimizer, loss_fn, **options)
        self.threshold = threshold

    def _compute_gradients_microbatched(
        self, loss_fn: Any, model: Any, *batch: Any, **options: Any
    ) -> Any:
        """Adds slots to the model inside the loss, and returns their gradients as a metric."""
        if self.threshold is None:
            return super()._compute_gradients_microbatched(loss_fn, model, *batch, **options)

        def loss_with_slots(pair: Any, *batch: Any, **options: Any) -> Any:
            model, slots = pair

            def loss(model: Any, *batch: Any, **options: Any) -> Any:
                # The model is in the compute dtype here, the slots stay in float32.
                return self._raw_loss_function(with_slots(model, slots), *batch, **options)

            wrapped = hooks.WrappedLossFunction(loss, self.mp, self.compute_axis_mapping)
            return wrapped(model, *batch, **options)

        slots = [empty_slot(path, x) for path, x in attentions(model)]
        loss, (grads, slots), metrics = super()._compute_gradients_microbatched(
            loss_with_slots, (model, slots), *batch, **options
        )
        return loss, grads, {**metrics, _SLOTS: slots}

    def _train_step(
        self, state: Any, batch: Any, batch_kwargs: Any, _no_hooks: bool = False
    ) -> Any:
        result = super()._train_step(state, batch, batch_kwargs, _no_hooks=_no_hooks)
        if self.threshold is None:
            return result
        metrics, new = dict(result.loss_metrics), result.new_state
        slots = metrics.pop(f"train/{_SLOTS}")
        trainable = hooks.trainables_only(new.model, state.is_trainable)
        model, report, counts = clipped(new.model, trainable, slots, self.threshold)
        new = dataclasses.replace(new, model=model)
        if state.model_averaging is not None:  # the average of clipped weights
            own = hooks.trainables_only(model, state.is_trainable)
            average = state.model_averaging.update(own, state.step)
            new = dataclasses.replace(new, model_averaging=average)
        new = hooks.shard(new, self.parameter_axis_mapping)
        metrics = {**metrics, **report, _SLOTS: counts}
        return dataclasses.replace(result, new_state=new, loss_metrics=metrics)

    def _maybe_save_jaxpr(self, name: str, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs a step, and raises if max logits did not arrive."""
        result = super()._maybe_save_jaxpr(name, fn, *args, **kwargs)
        counts = result.loss_metrics.pop(_SLOTS, {})
        _check_counts({path: x.tolist() for path, x in jax.device_get(counts).items()})
        return result


def _check_counts(counts: Mapping[str, Sequence[float]]) -> None:
    """Raises unless the max logits of each module arrived once: least and largest count."""
    faults = [
        f"  {path}: {least:g} times" + (f" to {most:g} times." if most > least else ".")
        for path, (least, most) in counts.items()
        if (least, most) != (1, 1)
    ]
    if faults:
        raise RuntimeError(
            f"MuonClipTrainer: the max logits of {len(faults)} of {len(counts)} attention modules "
            "did not arrive exactly once in this step.\n" + "\n".join(faults) + "\n"
            "0 times: the loss has no gradient there (stop_gradient), or the class does not call "
            "`_compute_qkv` of Attention. More than once: a module is called several times in one "
            "forward pass, runs under jax.vmap, or gradients are summed. Set qk_clip_threshold to "
            "null to train without the clip."
        )

"""MuonClip in Levanter: a config for its YAML, and a trainer that clips.

    from muonclip_jax.integrations.levanter import MuonClipConfig, MuonClipTrainer

`MuonClipTrainer` stands where Levanter's `Trainer` stands. For Levanter's programs, the command is
`python -m muonclip_jax.integrations.levanter train_lm --config_path config.yaml`, with
`optimizer: {type: muonclip}` in the YAML. No model is edited: inside the loss, each attention gets
a slot whose gradient is its max logits (`gradient_slot`), which haliax joins over micro-batches.
The slots are neither in the model, nor in the optimizer, nor in checkpoints and exports.
"""

import dataclasses
import functools
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import jax
import optax

import muonclip_jax as mc
from muonclip_jax.integrations.levanter_attention import attentions, clipped, empty_slot, with_slots
from muonclip_jax.integrations.levanter_hooks import hooks
from muonclip_jax.integrations.named_axes import dimension_numbers

Trainer: Any = hooks.Trainer
OptimizerConfig: Any = hooks.OptimizerConfig

_SLOTS = "qk_clip_slots"  # the entry of the metrics that takes the slots from the loss to the clip


@OptimizerConfig.register_subclass("muonclip")
@dataclasses.dataclass(frozen=True)
class MuonClipConfig(OptimizerConfig):
    """`optimizer: {type: muonclip}`: Muon for the matrices, AdamW for the rest, and QK-clip.

    Learning rate, its schedule, weight decay and its mask are fields of Levanter's
    `OptimizerConfig`; both optimizers share them, so a learning rate tuned for AdamW fits. Roles
    come from haliax's axis names, see `dimension_numbers`.

    Attributes:
      momentum: Decay of the momentum of the matrices.
      nesterov: Whether matrices and AdamW look one step ahead. Kimi K2 does not.
      beta1: Decay of AdamW's first moment.
      beta2: Decay of AdamW's second moment.
      epsilon: Added to AdamW's root, and to the norm before Newton-Schulz.
      max_grad_norm: Largest norm of the gradient of all parameters, as in Levanter's `adam`. Its
        `muon` clips the gradient of AdamW's parameters only. None: no limit.
      consistent_rms: See `scale_by_shape`.
      cautious: Whether weights decay only where they agree in sign with the update.
      per_head: Whether each head of queries, keys and values is a matrix of its own.
      qk_clip_threshold: Largest attention logit, τ. It needs `MuonClipTrainer`, and the optimizer
        raises in another trainer. Infinity reports the max logits and never clips. None: no clip,
        and any trainer.
    """

    momentum: float = 0.95
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_grad_norm: Optional[float] = 1.0  # noqa: UP045 draccus reads the annotations
    consistent_rms: Optional[float] = 0.2  # noqa: UP045
    cautious: bool = False
    per_head: bool = False
    qk_clip_threshold: Optional[float] = 100.0  # noqa: UP045

    def build(self, num_train_steps: int) -> "MuonClipTransformation":
        """Builds the optimizer, under `optax.inject_hyperparams` so that Levanter logs the rate."""
        rate = self.lr_scheduler(num_train_steps)
        tx = optax.inject_hyperparams(self._chain)(learning_rate=rate)
        return MuonClipTransformation(tx, self.qk_clip_threshold)

    def _chain(self, learning_rate: Any) -> optax.GradientTransformation:
        muon = mc.muonclip(
            learning_rate,
            threshold=None,
            beta=self.momentum,
            nesterov=self.nesterov,
            weight_decay=0.0,
            consistent_rms=self.consistent_rms,
            eps=self.epsilon,
            adam_b1=self.beta1,
            adam_b2=self.beta2,
            muon_weight_dimension_numbers=functools.partial(
                dimension_numbers, per_head=self.per_head
            ),
        )
        decay = mc.add_cautious_weight_decay if self.cautious else optax.add_decayed_weights
        decayed = decay(learning_rate * self.weight_decay, self.build_weight_decay_mask())
        limit = self.max_grad_norm
        clip = optax.clip_by_global_norm(limit) if limit else optax.identity()
        # Levanter's mask is for all parameters. Decay is added while updates are subtracted.
        return optax.chain(clip, muon, optax.scale(-1), decayed, optax.scale(-1))


class MuonClipTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation with the threshold of QK-clip, for `MuonClipTrainer`.

    Attributes:
      inner: The transformation without the threshold.
      threshold: τ; None for no clip. Other trainers, which do not clip, get an error if it is set.
    """

    inner: optax.GradientTransformation
    threshold: float | None

    def __new__(cls, inner: Any, threshold: float | None) -> "MuonClipTransformation":
        """Wraps a transformation."""
        functions = inner if threshold is None else (_refuse, _refuse)
        self = super().__new__(cls, *functions)
        self.inner, self.threshold = inner, threshold
        return self


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        "MuonClipConfig: qk_clip_threshold is set, and this trainer does not clip. Use "
        "MuonClipTrainer of muonclip_jax.integrations.levanter in place of Levanter's Trainer, or "
        "run `python -m muonclip_jax.integrations.levanter train_lm ...`. For Muon without the "
        "clip, set qk_clip_threshold to null."
    )


class MuonClipTrainer(Trainer):
    """Levanter's `Trainer`, which clips queries and keys after each step.

    Args:
      config: See `Trainer`.
      optimizer: What `MuonClipConfig.build` returns, or another optimizer with `threshold`.
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a program of Levanter with `MuonClipTrainer`: its name, then its own arguments.

    Args:
      arguments: Such as `["train_lm", "--config_path", "config.yaml"]`. None: the command line.
    """
    name, *rest = sys.argv[1:] if arguments is None else arguments
    program: Any = importlib.import_module(name if "." in name else f"levanter.main.{name}")
    missing = [f"{name}.{x}" for x in ("Trainer", "main") if not hasattr(program, x)]
    if missing:
        raise ImportError(f"muonclip_jax.integrations.levanter: {', '.join(missing)} is missing.")
    program.Trainer = MuonClipTrainer
    hooks.main(program.main, args=rest)()


if __name__ == "__main__":
    main()

"""The optimizer of Levanter's YAML, `optimizer: {type: muonclip}`."""

import dataclasses
import functools
from typing import Any, Optional

import optax

import muonclip_jax as mc
from muonclip_jax.integrations.levanter.framework import hooks
from muonclip_jax.integrations.levanter.named_axes import dimension_numbers

OptimizerConfig: Any = hooks.OptimizerConfig


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

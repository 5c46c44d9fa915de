"""MuonClip, Algorithm 1 of Kimi K2, as one optax optimizer: Muon, then QK-clip.

    M ← μ M + G;    O = NewtonSchulz(M) · 0.2 √max(n_in, n_out);    W ← W − η (O + λ W)
    then for each attention head h: γ_h = min(1, τ / S_h), and W_q,h, W_k,h shrink by it

Here M is the average (1 − μ) Σ instead of the sum, which has the same direction. Source: arXiv
2507.20534, algorithm 1.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._attention_layouts import Layout, MultiHeadLayout
from muonclip_jax._coefficients import JORDAN, Coefficients
from muonclip_jax._kernels import Settings
from muonclip_jax._layout import DimensionNumbersOrFn
from muonclip_jax._muon import with_adamw
from muonclip_jax._overrides import Overrides
from muonclip_jax._products import accumulator
from muonclip_jax._qk_clip import qk_clip
from muonclip_jax._scale_by_muon import (
    ScaleByMuonState,
    momentum,
    plain_nesterov,
    scale_by_momentum,
)
from muonclip_jax._settings import check_choice, check_settings
from muonclip_jax._shared_key import SHARED_KEY_RULES
from muonclip_jax._types import ArrayTree, Scalar


def muonclip(
    learning_rate: optax.ScalarOrSchedule,
    *,
    layout: Layout | tuple[Layout, ...] = MultiHeadLayout(),
    threshold: optax.ScalarOrSchedule | None = 100.0,
    alpha: Scalar = 0.5,
    shared_key: str = "query",
    beta: Scalar = 0.95,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    consistent_rms: Scalar | None = 0.2,
    ns_coeffs: Coefficients = JORDAN,
    ns_steps: int = 5,
    eps: Scalar = 1e-8,
    weight_decay_mask: ArrayTree | Callable[[ArrayTree], ArrayTree] | None = None,
    mu_dtype: Any = None,
    adaptive: bool = False,
    preconditioning: str = "frobenius",
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.999,
    adam_eps_root: Scalar = 0.0,
    adam_weight_decay: optax.ScalarOrSchedule | None = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: DimensionNumbersOrFn | None = None,
    ns_method: str = "auto",
    ns_dtype: Any = "auto",
    shardings: ArrayTree = None,
    overrides: Overrides | None = None,
    outputs_first: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains with Muon and keeps the attention logits of every head in bounds with QK-clip.

    `tx.update(grads, state, params, max_logits=stats)` returns updates after which
    `optax.apply_updates` gives clipped parameters; `stats` are the attention statistics of the
    forward pass that made the gradients, see `qk_clip`. Weights that are not clipped get Muon's own
    update, bit for bit. The state is that of `muon`: a checkpoint fits with and without the clip.

    One object is handy, but says nothing of what it clipped: `muonclip(..., threshold=None)` and
    `qk_clip` after `optax.apply_updates` are the same algorithm and return a `QKClipInfo`. Under
    `optax.MultiSteps` this form sees the statistics of the last micro-batch only; use the other.

    Other algorithms than Kimi K2's are one call away: Moonlight's is
    `muonclip(lr, nesterov=True, threshold=None)`; Keller Jordan's, exact from the first step, is
    that with `consistent_rms=None`; DeepSeek-V4's is Moonlight's with `consistent_rms=0.18` and
    `ns_coeffs="deepseek_v4"`.

    Args:
      learning_rate: Number or schedule, of both optimizers; tuned for AdamW, it carries over.
      layout: See `qk_clip`.
      threshold: τ, see `qk_clip`: number, or schedule of the updates before this one. None builds
        the optimizer without the clip.
      alpha: See `qk_clip`.
      shared_key: See `qk_clip`.
      beta: Decay of the momentum of the matrices, in [0, 1); μ of the paper.
      nesterov: Whether the direction looks one step ahead: G + μ M with M the sum, without the
        bias correction of `muon`. It reaches AdamW too, which it makes NAdamW.
      weight_decay: Number or schedule; decay of the matrices, multiplied by the learning rate; λ of
        the paper.
      consistent_rms: See `scale_by_shape`.
      ns_coeffs: See `scale_by_muon`.
      ns_steps: See `scale_by_muon`.
      eps: For Newton-Schulz, see `scale_by_muon`, and for AdamW.
      weight_decay_mask: See `muon`.
      mu_dtype: See `muon`.
      adaptive: See `scale_by_muon`.
      preconditioning: See `newton_schulz`.
      adam_b1: Decay of AdamW's first moment, in [0, 1).
      adam_b2: Decay of AdamW's second moment, in [0, 1).
      adam_eps_root: Added inside the root of AdamW.
      adam_weight_decay: Decay of AdamW's leaves. None: `weight_decay`, as Moonlight does.
      adam_learning_rate: Number or schedule. None: `learning_rate`.
      muon_weight_dimension_numbers: See `muon`.
      ns_method: See `newton_schulz`.
      ns_dtype: See `newton_schulz`.
      shardings: See `scale_by_muon`.
      overrides: See `muon`.
      outputs_first: See `muon`.

    Returns:
      An optax transformation whose `update` needs the parameters, and `max_logits` unless
      `threshold` is None. Updates have the dtype of the gradients; those of 16-bit query and key
      weights are float32, so that the sum lands on the clipped weight.

    Raises:
      ValueError: when built, for a setting out of range or an unknown name; while tracing, if
        `max_logits` or the parameters are not given, and as `muon` and `qk_clip` do.

    Example:
      >>> import muonclip_jax as mc, jax.numpy as jnp, optax
      >>> kernel = jnp.ones((4, 2, 8))  # d, heads, head_dim
      >>> params = {"attn": {"query": {"kernel": kernel}, "key": {"kernel": kernel}}}
      >>> stats = {"attn": {"max_logits": jnp.array([400.0, 7.0])}}
      >>> tx = mc.muonclip(0.0)
      >>> updates, state = tx.update(params, tx.init(params), params, max_logits=stats)
      >>> optax.apply_updates(params, updates)["attn"]["query"]["kernel"][0, :, 0].tolist()
      [0.5, 1.0]

    References:
      Kimi K2, arXiv 2507.20534, algorithm 1; Liu et al. 2025 (Moonlight), arXiv 2502.16982.
    """
    scale_by = functools.partial(
        scale_by_momentum,
        plain_nesterov if nesterov else momentum,
        ns_coeffs=ns_coeffs,
        ns_steps=ns_steps,
        beta=beta,
        eps=eps,
        mu_dtype=mu_dtype,
        adaptive=adaptive,
        preconditioning=preconditioning,
        ns_method=ns_method,
        ns_dtype=ns_dtype,
        shardings=shardings,
    )
    optimizer = with_adamw(
        "muonclip",
        scale_by,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        consistent_rms=consistent_rms,
        muon_weight_dimension_numbers=muon_weight_dimension_numbers,
        overrides=overrides,
        settings=Settings(
            outputs_first, consistent_rms is None, {} if threshold is None else _heads(layout)
        ),
        adam_learning_rate=adam_learning_rate,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_weight_decay=weight_decay if adam_weight_decay is None else adam_weight_decay,
        eps=eps,
        eps_root=adam_eps_root,
        mu_dtype=mu_dtype,
        nesterov=nesterov,
    )
    if threshold is None:
        return optimizer
    check_settings("muonclip", threshold=threshold, alpha=alpha)
    check_choice("muonclip", "shared_key", shared_key, SHARED_KEY_RULES)
    clip = functools.partial(qk_clip, layout=layout, alpha=alpha, shared_key=shared_key)
    return _then_clip(optimizer, clip, threshold)


def _heads(layout: Layout | tuple[Layout, ...]) -> dict[str, tuple[str, ...]]:
    """Lists the modules that project into heads, with the axes of their kernels."""
    layouts = layout if isinstance(layout, tuple) else (layout,)
    return {name: _axes(one) for one in layouts for name in one.modules}


def _axes(layout: Layout) -> tuple[str, ...]:
    """Returns the names of the axes of a kernel; a flat axis is one."""
    kernel = getattr(layout, "kernel", "")
    return tuple(re.findall(r"\([^)]*\)|[^\s()]+", kernel))


def _then_clip(
    optimizer: optax.GradientTransformationExtraArgs,
    clip: Callable[..., Any],
    threshold: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """Makes the updates of `optimizer` lead to clipped parameters."""

    def update_fn(updates, state, params=None, *, max_logits=None, **extra_args):
        if params is None or max_logits is None:
            name = "params" if params is None else "max_logits"
            raise ValueError(
                f"muonclip: update needs {name}, got None. Call tx.update(grads, state, params, "
                "max_logits=stats), stats the attention statistics that the model sowed; or build "
                "muonclip(..., threshold=None) to train without the clip."
            )
        tau = threshold(_count(state)) if callable(threshold) else threshold
        updates, state = optimizer.update(updates, state, params, **extra_args)
        new = optax.apply_updates(params, updates)
        clipped, _ = clip(new, max_logits, threshold=tau)
        return jax.tree.map(_difference, updates, params, new, clipped), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update_fn)


def _count(state: ArrayTree) -> jax.Array:
    """Reads how many updates there were; no counter of its own, which checkpoints would show."""
    states = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, ScaleByMuonState))
    return next(x for x in states if isinstance(x, ScaleByMuonState)).count


def _difference(update: jax.Array, old: jax.Array, new: jax.Array, clipped: jax.Array) -> jax.Array:
    """Leads from `old` to `clipped`; is `update` where nothing was clipped."""
    if clipped is new:  # not a leaf of the clip: no work and the dtype of the gradient
        return update
    # f32: a difference in bfloat16 would miss the clipped weight by up to an ulp of the update.
    wide = accumulator(old.dtype)
    moved = clipped.astype(wide) - old.astype(wide)
    return jnp.where(clipped == new, update.astype(wide), moved)

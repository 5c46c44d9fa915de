"""MuonClip, Algorithm 1 of Kimi K2, as one optax optimizer: Muon, then QK-clip.

    M ← μ M + G;    O = NewtonSchulz(M) · 0.2 √max(n_in, n_out);    W ← W − η (O + λ W)
    then for each attention head h: γ_h = min(1, τ / S_h), and W_q,h, W_k,h shrink by it

Here M is the average (1 − μ) Σ instead of the sum, which has the same direction. Source: arXiv
2507.20534, algorithm 1.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._common.dtypes import accumulator
from muonclip_jax._common.settings import NUMBERS, check_settings
from muonclip_jax._common.types import ArrayTree, Scalar
from muonclip_jax._muon.adamw import adamw
from muonclip_jax._muon.injection import injectable
from muonclip_jax._muon.muon import MatrixScale, with_adamw
from muonclip_jax._muon.overrides import ROLE_RULES
from muonclip_jax._muon.roles.decision import HeadPatterns, Overrides, RoleSettings
from muonclip_jax._muon.scale_by_muon import (
    MuonSettings,
    ScaleByMuonState,
    momentum,
    newton_schulz_of,
    plain_nesterov,
)
from muonclip_jax._orthogonalize.coefficients import JORDAN, Coefficients
from muonclip_jax._orthogonalize.matrix_axes import DimensionNumbersOrFn
from muonclip_jax._orthogonalize.settings import COEFFICIENT_RULES
from muonclip_jax._qk_clip.clip import CLIP_RULES, qk_clip
from muonclip_jax._qk_clip.head_layout import HeadLayout
from muonclip_jax._qk_clip.multi_head import MultiHeadLayout
from muonclip_jax._sharding.placement import shardings_by_path

_OPTIONAL = (
    "threshold",
    "consistent_rms",
    "mu_dtype",
    "adam_weight_decay",
    "adam_learning_rate",
    "adam_nesterov",
    "outputs_first",
    "weight_decay_mask",
)


def _check(arguments: Mapping[str, Any]) -> None:
    """Raises for settings of `muonclip` that are not allowed."""
    rules = {**CLIP_RULES, **COEFFICIENT_RULES, **ROLE_RULES}
    check_settings("muonclip", arguments, optional=_OPTIONAL, rules=rules)


@injectable(NUMBERS, _check)
def muonclip(
    learning_rate: optax.ScalarOrSchedule,
    *,
    layout: HeadLayout | tuple[HeadLayout, ...] = MultiHeadLayout(),
    threshold: optax.ScalarOrSchedule | None = 100.0,
    alpha: Scalar = 0.5,
    shared_key: str = "query",
    ignore: str | Sequence[str] = (),
    beta: Scalar = 0.95,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    consistent_rms: Scalar | None = 0.2,
    ns_coeffs: Coefficients = JORDAN,
    ns_steps: int | jax.Array = 5,
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
    adam_nesterov: bool | None = None,
    overrides: Overrides | None = None,
    outputs_first: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains with Muon and keeps the attention logits of every head in bounds with QK-clip.

    `tx.update(grads, state, params, max_logits=stats)` returns updates after which
    `optax.apply_updates` gives clipped parameters; `stats` are the max logits of the forward pass
    that made the gradients, see `qk_clip`. Weights that are not clipped get Muon's own update, bit
    for bit. The state is that of `muon`: a checkpoint fits with and without the clip.

    The clip is part of the update. Nothing may change the updates afterwards: `optax.scale`,
    `reduce_on_plateau` or a rate for each layer scales the clip too. Wrappers that keep a second
    copy of the weights, such as `optax.contrib.schedule_free`, add it to weights that it was not
    made for. `optax.MultiSteps` passes the max logits of the last micro-batch only. There, and to
    get a `QKClipInfo`, use `muonclip(..., threshold=None)` and call `qk_clip` after
    `optax.apply_updates`, on every copy of the weights: the same algorithm. `docs/qk_clip.md` has a
    table of what may come after or around `muonclip`.

    Other algorithms than Kimi K2's are one call away: Moonlight's is
    `muonclip(lr, nesterov=True, adam_nesterov=False, threshold=None)`; Keller Jordan's, exact from
    the first step, is that with `consistent_rms=None`; DeepSeek-V4's is Moonlight's with
    `consistent_rms=0.18` and `ns_coeffs="deepseek_v4"`.

    Args:
      learning_rate: Number or schedule, of both optimizers; tuned for AdamW, it carries over.
      layout: See `qk_clip`.
      threshold: τ, see `qk_clip`: number, or schedule of the updates before this one. None builds
        the optimizer without the clip.
      alpha: See `qk_clip`.
      shared_key: See `qk_clip`.
      ignore: See `qk_clip`. Modules that `optax.partition` or `optax.masked` hide are left out
        without it.
      beta: Decay of the momentum of the matrices, in [0, 1); μ of the paper.
      nesterov: Whether the direction looks one step ahead: G + μ M with M the sum, without the
        bias correction of `muon`.
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
      adam_nesterov: See `muon`.
      overrides: See `muon`.
      outputs_first: See `muon`.

    Returns:
      An optax transformation whose `update` needs the parameters, and `max_logits` unless
      `threshold` is None. Updates have the dtype of the gradients. If parameters and gradients are
      in 16 bits, a parameter that the step changes by less than a factor of two arrives at its
      clipped value exactly; others arrive within a unit in the last place of the larger number.

    Raises:
      TypeError: when built, for settings of a wrong type, such as a number given as a string.
      ValueError: when built, for settings out of range or unknown names; while tracing, if
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
    _check(locals())
    update = MuonSettings(
        direction=plain_nesterov if nesterov else momentum,
        orthogonalize=newton_schulz_of(ns_coeffs, ns_steps, preconditioning, ns_method, ns_dtype),
        eps=eps,
        beta=beta,
        mu_dtype=mu_dtype,
        adaptive=adaptive,
        shardings=shardings_by_path("muonclip", shardings),
    )
    roles = RoleSettings(
        muon_weight_dimension_numbers,
        overrides,
        outputs_first,
        consistent_rms is None,
        () if threshold is None else _heads(layout),
    )
    rest = adamw(
        learning_rate=learning_rate if adam_learning_rate is None else adam_learning_rate,
        b1=adam_b1,
        b2=adam_b2,
        eps=eps,
        eps_root=adam_eps_root,
        mu_dtype=mu_dtype,
        weight_decay=weight_decay if adam_weight_decay is None else adam_weight_decay,
        nesterov=nesterov if adam_nesterov is None else adam_nesterov,
    )
    scale = MatrixScale(learning_rate, weight_decay, weight_decay_mask, consistent_rms)
    optimizer = with_adamw("muonclip", roles, update, scale, rest)
    if threshold is None:
        return optimizer
    clip = functools.partial(
        qk_clip, layout=layout, alpha=alpha, shared_key=shared_key, ignore=ignore
    )
    return _then_clip(optimizer, clip, threshold)


def _heads(layout: HeadLayout | tuple[HeadLayout, ...]) -> tuple[HeadPatterns, ...]:
    """Lists for each layout the modules that project into heads, with the axes of their kernels."""
    layouts = layout if isinstance(layout, tuple) else (layout,)
    return tuple(
        {name: (pattern.axes, one.stack_axis) for name, pattern in one.patterns.items()}
        for one in layouts
    )


def _then_clip(
    optimizer: optax.GradientTransformationExtraArgs,
    clip: Callable[..., Any],
    threshold: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """Makes the updates of `optimizer` lead to clipped parameters."""

    def update_fn(updates, state, params=None, *, max_logits=None, **extra_args):
        _check_arguments(params, max_logits)
        tau = threshold(_count(state)) if callable(threshold) else threshold
        updates, state = optimizer.update(updates, state, params, **extra_args)
        new: Any = optax.apply_updates(params, updates)  # pyright: ignore[reportArgumentType]
        clipped, _ = clip(new, max_logits, threshold=tau)
        return jax.tree.map(_difference, updates, params, new, clipped), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update_fn)


def _count(state: ArrayTree) -> jax.Array:
    """Reads how many updates there were; no counter of its own, which checkpoints would show."""
    states = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, ScaleByMuonState))
    return next(x for x in states if isinstance(x, ScaleByMuonState)).count


def _check_arguments(params: ArrayTree, max_logits: ArrayTree) -> None:
    """Raises unless there are parameters, of one copy of the model, and max logits."""
    if params is None or max_logits is None:
        name = "params" if params is None else "max_logits"
        raise ValueError(
            f"muonclip: update needs {name}, got None. Call tx.update(grads, state, params, "
            "max_logits=stats), stats the max logits that the model sowed. flax's "
            "TrainState.apply_gradients and optax.lookahead do not pass max_logits on: call "
            "state.tx.update yourself, or use muonclip(..., threshold=None) and qk_clip after "
            "optax.apply_updates; threshold=None alone trains without the clip."
        )
    if isinstance(params, optax.LookaheadParams):
        raise ValueError(
            "muonclip: params is a LookaheadParams, two copies of the weights. Use muonclip(..., "
            "threshold=None) inside optax.lookahead, and after optax.apply_updates call qk_clip on "
            "params.fast and on params.slow."
        )


def _difference(update: jax.Array, old: jax.Array, new: jax.Array, clipped: jax.Array) -> jax.Array:
    """Leads from `old` to `clipped`; is `update` where nothing was clipped.

    In the dtype of the update, as `optax.apply_if_finite` requires. If that is the dtype of the
    parameter, the difference of two numbers within a factor of two of each other is exact
    (Sterbenz), and so is their sum with `old`.
    """
    if clipped is new:  # not a leaf of the clip: no work
        return update
    wide = accumulator(old.dtype)
    moved = (clipped.astype(wide) - old.astype(wide)).astype(update.dtype)
    return jnp.where(clipped == new, update, moved)

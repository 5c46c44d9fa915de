"""MuonClip, Algorithm 1 of Kimi K2 (arXiv 2507.20534), as one optax optimizer.

    for each weight matrix W:                                                         lines 3 to 7
        M ← β M + G
        O ← NewtonSchulz(M) · 0.2 √max(n_in, n_out)
        W ← W − η (O + λ W)
    for each attention head h, with max logit S_h in the forward pass:                lines 9 to 17
        if S_h > τ:
            γ ← τ / S_h
            W_q,h ← √γ W_q,h        W_k,h ← √γ W_k,h        (rotary queries of MLA: all of γ)

M is kept as the average (1 − β) Σ instead of the sum, which has the same direction. AdamW trains
everything that is no matrix.
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
from muonclip_jax._head_layouts.head_layout import HeadLayout
from muonclip_jax._head_layouts.multi_head import MultiHeadLayout
from muonclip_jax._muon.injection import injectable
from muonclip_jax._muon.muon import with_adamw
from muonclip_jax._muon.overrides import ROLE_RULES
from muonclip_jax._muon.per_head import PER_HEAD_OR_LAYOUT_RULES
from muonclip_jax._muon.roles.decision import Overrides
from muonclip_jax._muon.scale_by_muon import ScaleByMuonState, momentum, plain_nesterov
from muonclip_jax._muon.settings import UPDATE_RULES, OptimizerSettings
from muonclip_jax._orthogonalize.coefficients import JORDAN, Coefficients
from muonclip_jax._orthogonalize.dimension_numbers import DimensionNumbersOrFn
from muonclip_jax._orthogonalize.matrices import ConsistentRMS
from muonclip_jax._program.analysis import Analysis
from muonclip_jax._qk_clip.clip import CLIP_RULES, qk_clip

_OPTIONAL = (
    "threshold",
    "consistent_rms",
    "mu_dtype",
    "adam_weight_decay",
    "adam_learning_rate",
    "adam_nesterov",
    "outputs_first",
    "neuron_b2",
    "weight_decay_mask",
)


def _check(arguments: Mapping[str, Any]) -> None:
    """Raises for settings of `muonclip` that are not allowed."""
    rules = {**CLIP_RULES, **UPDATE_RULES, **ROLE_RULES, **PER_HEAD_OR_LAYOUT_RULES}
    check_settings("muonclip", arguments, optional=_OPTIONAL, rules=rules)


@injectable(NUMBERS, _check)
def muonclip(
    learning_rate: optax.ScalarOrSchedule,
    *,
    layout: HeadLayout | tuple[HeadLayout, ...] | Analysis = MultiHeadLayout(),
    threshold: optax.ScalarOrSchedule | None = 100.0,
    alpha: Scalar = 0.5,
    shared_key: str = "query",
    ignore: str | Sequence[str] = (),
    beta: Scalar = 0.95,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    consistent_rms: ConsistentRMS = 0.2,
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
    ns_products: str = "auto",
    shardings: ArrayTree = None,
    adam_nesterov: bool | None = None,
    per_head: bool | HeadLayout | tuple[HeadLayout, ...] | Analysis = False,
    overrides: Overrides | None = None,
    outputs_first: bool | None = None,
    cautious_weight_decay: bool = False,
    neuron_b2: Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains with Muon and keeps the max logit of every head near the threshold with QK-clip.

    `tx.update(grads, state, params, max_logits=stats)` returns updates with which
    `optax.apply_updates` gives clipped parameters; `stats` are the max logits of the forward pass
    that computed the gradients, see `qk_clip`. Weights that are not clipped get the update of Muon,
    bit for bit. The state has the structure of `muon`: a checkpoint fits with and without the clip.

    The clip is part of the update, so nothing may change the updates afterwards: `optax.scale`,
    `reduce_on_plateau` or a rate for each layer scales the clip too. Wrappers that keep a second
    copy of the weights, such as `optax.contrib.schedule_free`, add the clip to the wrong copy.
    `optax.MultiSteps` passes the max logits of the last micro-batch only. With any of them, and to
    get a `QKClipInfo`, use `muonclip(..., threshold=None)` and call `qk_clip` after
    `optax.apply_updates`, on every copy of the weights: the same algorithm. `docs/qk_clip.md` has a
    table of transforms after and around `muonclip`.

    Other recipes are settings: Moonlight is
    `muonclip(lr, nesterov=True, adam_nesterov=False, threshold=None)`; Keller Jordan's Muon, exact
    from the first step, is Moonlight with `consistent_rms=None`; DeepSeek-V4 is Moonlight with
    `consistent_rms=0.18` and `ns_coeffs="deepseek_v4"`.

    Args:
      learning_rate: η, number or schedule, of both optimizers. A rate tuned for AdamW fits.
      layout: See `qk_clip`. It also shows which axes of queries and keys are inputs and outputs,
        with any threshold and without the clip. The roles of an `Analysis` are used.
      threshold: τ, see `qk_clip`: number, or schedule of the updates before this one. None builds
        the optimizer without the clip.
      alpha: See `qk_clip`.
      shared_key: See `qk_clip`.
      ignore: See `qk_clip`. Modules that `optax.partition` or `optax.masked` hide are left out
        without it.
      beta: β, decay of the momentum of the matrices, in [0, 1).
      nesterov: Whether the direction looks one step ahead: G + β M, with G the gradient and
        M ← β M + G, without the bias correction of `muon`.
      weight_decay: λ, number or schedule; decay of the matrices, multiplied by the learning rate.
      consistent_rms: See `scale_by_shape`.
      ns_coeffs: See `scale_by_muon`.
      ns_steps: See `scale_by_muon`.
      eps: For Newton-Schulz, see `scale_by_muon`, and for AdamW.
      weight_decay_mask: See `muon`.
      mu_dtype: See `muon`.
      adaptive: See `scale_by_muon`.
      preconditioning: See `scale_by_muon`.
      adam_b1: Decay of AdamW's first moment, in [0, 1).
      adam_b2: Decay of AdamW's second moment, in [0, 1).
      adam_eps_root: Added inside the root of AdamW.
      adam_weight_decay: Decay of AdamW's leaves. None: `weight_decay`, as Moonlight does.
      adam_learning_rate: Number or schedule. None: `learning_rate`.
      muon_weight_dimension_numbers: See `muon`.
      ns_method: See `newton_schulz`.
      ns_dtype: See `newton_schulz`.
      ns_products: See `newton_schulz`; on a mesh, pass `shardings` or use Explicit axes.
      shardings: See `scale_by_muon`.
      adam_nesterov: See `muon`.
      per_head: Whether each head that `layout` describes is a matrix of its own; or the head
        layouts for this, see `muon`.
      overrides: See `muon`.
      outputs_first: See `muon`.
      cautious_weight_decay: See `muon`.
      neuron_b2: See `muon`.

    Returns:
      An optax transformation whose `update` needs the parameters, and `max_logits` unless
      `threshold` is None. Updates have the dtype of the gradients. If parameters and gradients are
      in bfloat16 or float16, a parameter that the step changes by less than a factor of two gets
      its clipped value exactly, any other within a unit in the last place of the larger number.

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
    arguments = locals()
    _check(arguments)
    heads = (layout if per_head else None) if isinstance(per_head, bool) else per_head
    direction = plain_nesterov if nesterov else momentum
    optimizer = with_adamw(OptimizerSettings.of("muonclip", direction, arguments, heads, layout))
    if threshold is None:
        return optimizer
    clip = functools.partial(
        qk_clip, layout=layout, alpha=alpha, shared_key=shared_key, ignore=ignore
    )
    return _then_clip(optimizer, clip, threshold)


def _then_clip(
    optimizer: optax.GradientTransformationExtraArgs,
    clip: Callable[..., Any],
    threshold: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """Adds the clip to the updates of an optimizer."""

    def update_fn(updates, state, params=None, *, max_logits=None, **extra_args):
        _check_arguments(params, max_logits)
        before = state
        # Lines 3 to 7: W ← W − η (O + λ W)
        updates, state = optimizer.update(updates, state, params, **extra_args)
        new: Any = optax.apply_updates(params, updates)  # pyright: ignore[reportArgumentType]
        tau = threshold(_count(before)) if callable(threshold) else threshold
        # Lines 9 to 17: W_q,h ← √γ W_q,h, W_k,h ← √γ W_k,h, from the max logits before the update
        clipped, _ = clip(new, max_logits, threshold=tau)
        return jax.tree.map(_difference, updates, params, new, clipped), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update_fn)


def _count(state: ArrayTree) -> jax.Array:
    """Returns the number of updates so far; a counter of its own would be in the checkpoints."""
    states = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, ScaleByMuonState))
    return next(x for x in states if isinstance(x, ScaleByMuonState)).count


def _check_arguments(params: ArrayTree, max_logits: ArrayTree) -> None:
    """Raises unless there are parameters, of one copy of the model, and max logits."""
    if params is None or max_logits is None:
        name = "params" if params is None else "max_logits"
        raise ValueError(
            f"muonclip: update needs {name}, got None. Call tx.update(grads, state, params, "
            "max_logits=stats) with the max logits that the model sowed; of nnx.Optimizer, "
            "optimizer.update(model, grads, max_logits=stats). "
            "TrainState.apply_gradients of Flax and optax.lookahead do not pass max_logits on: "
            "call state.tx.update yourself, or use muonclip(..., threshold=None) and qk_clip after "
            "optax.apply_updates; threshold=None alone trains without the clip."
        )
    if isinstance(params, optax.LookaheadParams):
        raise ValueError(
            "muonclip: params is a LookaheadParams, two copies of the weights. Use muonclip(..., "
            "threshold=None) inside optax.lookahead, and after optax.apply_updates call qk_clip on "
            "params.fast and on params.slow."
        )


def _difference(update: jax.Array, old: jax.Array, new: jax.Array, clipped: jax.Array) -> jax.Array:
    """Returns the update from `old` to `clipped`; exactly `update` for weights without a clip.

    It has the dtype of `update`, as `optax.apply_if_finite` requires. If the parameter has it too,
    the difference of two numbers within a factor of two of each other is exact (Sterbenz), and so
    is its sum with `old`.
    """
    if clipped is new:  # the clip did not touch this leaf
        return update
    wide = accumulator(old.dtype)
    moved = (clipped.astype(wide) - old.astype(wide)).astype(update.dtype)
    return jnp.where(clipped == new, update, moved)

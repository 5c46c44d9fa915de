"""Muon as an optax transform: momentum, then Newton-Schulz, then a scale for the shape.

With G the gradient, M the momentum and t the step, from 1:

    M ← β M + (1 − β) G
    O = NewtonSchulz(direction of M and G)
    update = O · update_scale(n_in, n_out)

Source: Jordan et al. 2024, KellerJordan/Muon, muon.py; optax/contrib/_muon.py for the form.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from muonclip_jax._common.dtypes import accumulator
from muonclip_jax._common.resharding import placed_like_tree
from muonclip_jax._common.settings import NUMBERS, check_settings
from muonclip_jax._common.types import ArrayTree, Scalar
from muonclip_jax._muon.chains import check_match, check_state, same_model
from muonclip_jax._muon.family.normalize import normalized
from muonclip_jax._muon.injection import injectable
from muonclip_jax._muon.per_head import PER_HEAD_RULES, PerHead, with_heads
from muonclip_jax._muon.settings import UPDATE_RULES, MuonSettings, Weights
from muonclip_jax._orthogonalize.coefficients import JORDAN, Coefficients
from muonclip_jax._orthogonalize.dimension_numbers import DimensionNumbersOrFn
from muonclip_jax._orthogonalize.matrices import (
    ConsistentRMS,
    orthogonalize_leaves,
    sides,
    update_scale,
)
from muonclip_jax._orthogonalize.split import Split, splits_of
from muonclip_jax._sharding import exchange
from muonclip_jax._sharding.parts import map_matrices, put_together, take_apart
from muonclip_jax._sharding.plan import plan_for


class ScaleByMuonState(NamedTuple):
    """State of `scale_by_muon`; no setting is in it.

    Attributes:
      count: Number of finished updates, an int32 scalar.
      mu: Average of the gradients, a pytree like the parameters, in `mu_dtype`.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: ArrayTree


def _check_muon(arguments: Mapping[str, Any]) -> None:
    """Raises for settings of `scale_by_muon` that are not allowed."""
    rules = {**UPDATE_RULES, **PER_HEAD_RULES}
    check_settings("scale_by_muon", arguments, optional=("mu_dtype",), rules=rules)


@injectable(NUMBERS, _check_muon)
def scale_by_muon(
    ns_coeffs: Coefficients = JORDAN,
    ns_steps: int | jax.Array = 5,
    beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    mu_dtype: Any = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: str = "frobenius",
    weight_dimension_numbers: DimensionNumbersOrFn | None = None,
    ns_method: str = "auto",
    ns_dtype: Any = "auto",
    ns_products: str = "auto",
    shardings: ArrayTree = None,
    per_head: PerHead = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces each gradient by its orthogonalized momentum.

    Every leaf must be a matrix or a batch of matrices; `muon` assigns the others to AdamW. The
    arguments up to `weight_dimension_numbers` have the names, order, defaults and meaning of
    `optax.contrib.scale_by_muon`.

    Args:
      ns_coeffs: Coefficients (a, b, c) for every step, one triple for each step, or the name of a
        preset; see `ns_coefficients`.
      ns_steps: Number of steps for a single triple. Presets and several triples set it themselves.
      beta: Decay of the momentum, in [0, 1). 0 is no momentum.
      eps: See `newton_schulz`. It is relative to the size of each matrix.
      mu_dtype: Dtype in which the momentum of real leaves is kept. None: as the parameters. The
        arithmetic is in float32 at least either way.
      nesterov: Whether the direction looks one step ahead, with optax's bias corrections:
        β M / (1 − β^(t+1)) + (1 − β) G / (1 − β^t). False: M / (1 − β^t). Here G is the gradient,
        M ← β M + (1 − β) G the momentum, β is `beta`, and t the number of the step, from 1.
      adaptive: Whether to multiply each orthogonalized matrix O by ⟨d, O⟩, d the direction.
      preconditioning: See `newton_schulz`. Also `"outputs"` or `"inputs"` (MuonEq): each slice
        of a matrix for one output, or for one input, is divided by its norm first; see
        `normalize_matrices`.
      weight_dimension_numbers: The axes of each leaf that are the inputs (reduction) and outputs of
        its matrices: a pytree, or a prefix of one, of `MuonDimensionNumbers`, or a function of the
        parameters that returns one. None: the last two axes of every leaf.
      ns_method: See `newton_schulz`.
      ns_dtype: See `newton_schulz`.
      ns_products: See `newton_schulz`; on a mesh, pass `shardings` or use Explicit axes.
      shardings: How the parameters are sharded on an Auto mesh, a pytree of `NamedSharding`:
        `jax.tree.map(lambda x: x.sharding, params)`. With None, XLA decides on such a mesh how
        data moves. On an Explicit mesh the types of the parameters have the shardings.
      per_head: See `muon`. The leaves that it describes need no dimension numbers.

    Returns:
      An optax transformation, which ignores extra arguments. Updates have the dtype of the
      gradients.

    Raises:
      TypeError: when built, for settings of a wrong type, such as a number given as a string.
      ValueError: when built, for a setting out of range or an unknown name; at `init` and while
        tracing, for leaves that are no matrices and gradients that do not match the state.

    Example:
      >>> import muonclip_jax as mc, jax.numpy as jnp
      >>> tx = mc.scale_by_muon()
      >>> params = {"w": jnp.eye(2)}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> updates["w"].round(3)
      Array([[1.108, 0.   ],
             [0.   , 1.108]], dtype=float32)

    References:
      Jordan et al. 2024, KellerJordan/Muon, muon.py. `adaptive`: Bernstein & Newhouse 2024, arXiv
      2409.20325.
    """
    arguments = locals()
    _check_muon(arguments)
    direction = bias_corrected_nesterov if nesterov else bias_corrected
    settings = MuonSettings.of("scale_by_muon", direction, arguments)
    numbers = with_heads("scale_by_muon", weight_dimension_numbers, per_head)
    return scale_by_direction(settings, numbers)


def scale_by_direction(
    settings: MuonSettings, weight_dimension_numbers: DimensionNumbersOrFn | None
) -> optax.GradientTransformationExtraArgs:
    """Builds `scale_by_muon` for any direction."""
    caller, direction, beta = settings.caller, settings.direction, settings.beta

    def init_fn(params):
        if jax.tree.leaves(params):  # optax.tree.map_params calls with a placeholder without any
            splits_of(caller, params, weight_dimension_numbers)
        mu = jax.tree.map(functools.partial(_zeros_like, dtype=settings.mu_dtype), params)
        return ScaleByMuonState(count=jnp.zeros([], jnp.int32), mu=mu)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_state(caller, state, ScaleByMuonState)
        check_match(caller, updates, state.mu)
        splits = splits_of(caller, updates, weight_dimension_numbers)
        t = jnp.asarray(optax.safe_increment(state.count))
        G = placed_like_tree(jax.tree.map(jnp.asarray, updates), state.mu)
        M = jax.tree.map(lambda m, g: _average(m, g, beta), state.mu, G)
        D = jax.tree.map(lambda m, g: _combine(m, g, *direction(_real(beta, m), _real(t, m))), M, G)
        O = _orthogonalized(D, splits, settings)  # noqa: E741
        O = jax.tree.map(lambda o, g: o.astype(g.dtype), O, G)  # noqa: E741
        mu = jax.tree.map(lambda m, old: m.astype(old.dtype), M, state.mu)
        with same_model(caller, updates, state, params):
            return placed_like_tree(O, params), ScaleByMuonState(count=t, mu=mu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def momentum(beta: jax.Array, t: jax.Array) -> Weights:
    """M: Kimi K2's direction. Newton-Schulz of the average equals Newton-Schulz of the sum."""
    del t
    return jnp.ones_like(beta), None


def plain_nesterov(beta: jax.Array, t: jax.Array) -> Weights:
    """β M + (1 − β) G: Keller Jordan's Nesterov momentum, G + β M with M the sum."""
    del t
    return beta, 1 - beta


def bias_corrected(beta: jax.Array, t: jax.Array) -> Weights:
    """M / (1 − β^t): optax's momentum. The factor changes `adaptive` updates only."""
    return 1 / (1 - beta**t), None


def bias_corrected_nesterov(beta: jax.Array, t: jax.Array) -> Weights:
    """β M / (1 − β^(t+1)) + (1 − β) G / (1 − β^t): optax's Nesterov momentum."""
    return beta / (1 - beta ** (t + 1)), (1 - beta) / (1 - beta**t)


def _orthogonalized(D: ArrayTree, splits: Sequence[Split], settings: MuonSettings) -> ArrayTree:
    """Orthogonalizes the matrices of all leaves, which stay sharded as they are."""
    parts = take_apart(settings.caller, D, splits, settings.shardings)
    leaves, axes = jax.tree.leaves(parts.tree), parts.axes
    orthogonalize, eps = settings.orthogonalize, settings.eps
    if by := settings.equilibrate:
        X = [normalized(by, a, x) for x, a in zip(leaves, axes, strict=True)]
    else:
        X = leaves
    plan = plan_for(settings.caller, parts.tree, axes, parts.shardings, orthogonalize)
    if plan is None:  # every device has full matrices, or XLA decides how they move
        found = orthogonalize_leaves(lambda x: orthogonalize(x, eps), X, axes)
    else:
        found = exchange.orthogonalize(X, plan, orthogonalize, eps)
    if settings.adaptive:
        found = [
            o * jnp.sum(d.conj() * o, axis=a.reduction + a.output, keepdims=True)
            for o, d, a in zip(found, leaves, axes, strict=True)
        ]
    return put_together(found, D, splits)


def _check_shape(arguments: Mapping[str, Any]) -> None:
    """Raises for settings of `scale_by_shape` that are not allowed."""
    optional = ("consistent_rms",)
    check_settings("scale_by_shape", arguments, optional=optional, rules=PER_HEAD_RULES)


@injectable(NUMBERS, _check_shape)
def scale_by_shape(
    weight_dimension_numbers: DimensionNumbersOrFn | None = None,
    consistent_rms: ConsistentRMS = None,
    per_head: PerHead = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales orthogonalized updates by a factor that depends on the shape of their matrices.

    Args:
      weight_dimension_numbers: See `scale_by_muon`.
      consistent_rms: None scales by √max(1, n_out / n_in). A number r scales by
        r √max(n_in, n_out), which gives every update the root mean square r; 0.2 matches AdamW.
        `"spectral"` scales by √(n_out / n_in), with which a learning rate transfers over width.
      per_head: See `muon`: the shape of a head counts.

    Returns:
      An optax transformation without state.

    Raises:
      ValueError: if `consistent_rms` is neither above 0 nor `"spectral"`, or a leaf is no matrix.

    Example:
      >>> import muonclip_jax as mc, jax.numpy as jnp
      >>> tx = mc.scale_by_shape()
      >>> tx.update({"w": jnp.ones((1, 4))}, tx.init({}))[0]
      {'w': Array([[2., 2., 2., 2.]], dtype=float32)}

    References:
      Jordan et al. 2024, KellerJordan/Muon, muon.py; Liu et al. 2025, arXiv 2502.16982,
      section 2.2; Pethick et al. 2025 (Scion), arXiv 2502.07529, for `"spectral"`.
    """
    _check_shape(locals())
    numbers = with_heads("scale_by_shape", weight_dimension_numbers, per_head)

    def scaled(axes, u):
        wide = u.astype(accumulator(u.dtype))
        scale = jnp.asarray(update_scale(*sides(u.shape, axes), consistent_rms), wide.dtype)
        return (wide * scale).astype(u.dtype)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        updates = jax.tree.map(jnp.asarray, updates)
        splits = splits_of("scale_by_shape", updates, numbers)
        return map_matrices("scale_by_shape", scaled, splits, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def _zeros_like(p: ArrayLike, dtype: Any) -> jax.Array:
    return jnp.zeros_like(p, dtype=None if jnp.iscomplexobj(p) else dtype)


def _average(M: jax.Array, G: jax.Array, beta: Scalar) -> jax.Array:
    """β M + (1 − β) G, in float32 at least: a 16-bit sum would lose most of (1 − β) G."""
    wide = accumulator(M.dtype, G.dtype)
    M, G = M.astype(wide), G.astype(wide)
    return _combine(M, G, _real(beta, M), 1 - _real(beta, M))


def _combine(M: jax.Array, G: jax.Array, w_M: jax.Array, w_G: jax.Array | None) -> jax.Array:
    weighted = w_M.astype(M.dtype) * M
    return weighted if w_G is None else weighted + w_G.astype(M.dtype) * G.astype(M.dtype)


def _real(value: Scalar, like: jax.Array) -> jax.Array:
    """Casts a scalar to the real dtype of an array, so that nothing is promoted."""
    return jnp.asarray(value).astype(like.real.dtype)

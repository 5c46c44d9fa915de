"""Sinkhorn-balanced momentum, for embeddings, output heads and n-gram tables.

With G the gradient of a table of m tokens (rows) and n columns:

    M ← β M + (1 − β) G
    Ĝ = β M + (1 − β) G
    U = Ĝ without the rows with ‖Ĝ_i‖ ≤ τ · mean of all ‖Ĝ_i‖
    K = 11 times, in turn:  each row U_i ← U_i / (‖U_i‖ + 1e-20),  each column likewise
    update = √n U

The first and the last of the K are of the rows, so every row that is left has root mean square 1.

Source: DeepSeek-V4.1 report, section 2.5, Algorithm 1.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._common.dtypes import accumulator
from muonclip_jax._common.paths import path_string
from muonclip_jax._common.resharding import placed_like_tree
from muonclip_jax._common.settings import NUMBERS, check_settings
from muonclip_jax._common.types import ArrayTree, Scalar
from muonclip_jax._muon.chains import check_match, check_state, same_model
from muonclip_jax._muon.injection import injectable
from muonclip_jax._orthogonalize.dimension_numbers import spread

NUM_NORMALIZATIONS = 11  # K
EPS = 1e-20  # in the normalizations
RMS = 0.18  # root mean square of a row of the update of `muon`


@dataclasses.dataclass(frozen=True)
class Sinkhorn:
    """A value of `overrides=` that assigns a parameter to `scale_by_sinkhorn` instead of AdamW.

    Attributes:
      token_axis: -2 if the last two axes are (tokens, features), as in an embedding; -1 if they are
        (features, tokens), as in the kernel of an output head.

    Example:
      >>> import muonclip_jax as mc, jax.numpy as jnp
      >>> params = {"wte": jnp.ones((8, 2)), "head": {"kernel": jnp.ones((2, 8))}}
      >>> overrides = {"wte": mc.Sinkhorn(-2), "head/kernel": mc.Sinkhorn(-1)}
      >>> [row.optimizer for row in mc.routing_table(params, overrides=overrides).rows]
      ['sinkhorn', 'sinkhorn']
    """

    token_axis: int = -2

    def __post_init__(self) -> None:
        """Raises for another axis."""
        if fault := _token_axis_rule(self.token_axis):
            raise ValueError(f"Sinkhorn: token_axis must be {fault}.")


class ScaleBySinkhornState(NamedTuple):
    """State of `scale_by_sinkhorn`; no setting is in it.

    Attributes:
      mu: Average of the gradients, a pytree like the parameters, in `mu_dtype`.
    """

    mu: ArrayTree


def _token_axis_rule(value: Any) -> Exception | None:
    """Returns what is wrong with `token_axis`, None if nothing is."""
    bad = [x for x in jax.tree.leaves(value) if x not in (-2, -1)]
    text = "-2 for (tokens, features) or -1 for (features, tokens), got "
    return ValueError(text + repr(bad[0])) if bad else None


def _check(arguments: Mapping[str, Any]) -> None:
    """Raises for settings of `scale_by_sinkhorn` that are not allowed."""
    rules = {"token_axis": _token_axis_rule}
    check_settings("scale_by_sinkhorn", arguments, optional=("mu_dtype",), rules=rules)


@injectable(NUMBERS, _check)
def scale_by_sinkhorn(
    token_axis: Any = -2,
    beta: Scalar = 0.95,
    tau: Scalar = 1e-3,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces each gradient of a token table by its balanced Nesterov momentum.

    The last two axes of a leaf are a table, and other axes are a stack of tables. All tokens with a
    gradient get updates of equal norm; features are equalized as far as possible. The state is one
    buffer instead of the two of AdamW. Sharded over tokens, an update sends five sums of n numbers,
    n the number of features, and one sum of one number.

    `overrides={"wte": mc.Sinkhorn()}` of `muon` assigns single parameters to it. The DeepSeek-V4.1
    report multiplies the update by 0.18 η and has no weight decay for it.

    Args:
      token_axis: -2 if tables are (tokens, features), as in an embedding; -1 if they are (features,
        tokens), as in the kernel of an output head; or a pytree, or a prefix of one, of these.
      beta: β, decay of the momentum, in [0, 1).
      tau: τ: the update of a token is 0 if its norm is at most τ times the mean of all tokens.
      mu_dtype: Dtype in which the momentum of real leaves is kept. None: as the parameters.

    Returns:
      An optax transformation, which ignores extra arguments. Updates have the dtypes of the
      gradients and are computed in float32 at least.

    Raises:
      TypeError: when built, for settings of a wrong type.
      ValueError: when built, for settings out of range; at `init`, for leaves
        with fewer than two axes; while tracing, for gradients that do not match the state.

    Example:
      >>> import muonclip_jax as mc, jax.numpy as jnp
      >>> tx = mc.scale_by_sinkhorn()
      >>> params = {"wte": jnp.array([[3.0, 3.0], [0.0, 0.0], [0.0, 1.0]])}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> print(updates["wte"].round(2))
      [[1.35 0.41]
       [0.   0.  ]
       [0.   1.41]]

    References:
      DeepSeek-V4.1 report, section 2.5, Algorithm 1.
    """
    _check(locals())

    def init_fn(params):
        _check_tables(params)
        return ScaleBySinkhornState(jax.tree.map(lambda p: _zeros_like(p, mu_dtype), params))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_state("scale_by_sinkhorn", state, ScaleBySinkhornState)
        check_match("scale_by_sinkhorn", updates, state.mu)
        G = placed_like_tree(jax.tree.map(jnp.asarray, updates), state.mu)
        M = jax.tree.map(lambda m, g: _average(m, g, beta), state.mu, G)
        G_hat = jax.tree.map(lambda m, g: _average(m, g, beta), M, G)
        leaves, structure = jax.tree.flatten(G_hat)
        axes = spread("scale_by_sinkhorn: token_axis", token_axis, G_hat)
        found = [_balanced(x, axis, tau) for x, axis in zip(leaves, axes, strict=True)]
        U = jax.tree.map(lambda u, g: u.astype(g.dtype), structure.unflatten(found), G)
        mu = jax.tree.map(lambda m, old: m.astype(old.dtype), M, state.mu)
        with same_model("scale_by_sinkhorn", updates, state, params):
            return placed_like_tree(U, params), ScaleBySinkhornState(mu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _balanced(G: jax.Array, token_axis: int, tau: Scalar) -> jax.Array:
    """√n U: the rows are the tokens, along `token_axis`, and n is the size of the other axis."""
    columns = -3 - token_axis
    largest = jnp.max(jnp.abs(G), axis=columns, keepdims=True, initial=0)
    U = G / jnp.where(largest == 0, 1, largest).astype(G.dtype)  # rows, before any square
    row_norms = largest * _norms(U, columns)
    mean = jnp.sum(row_norms / G.shape[token_axis], axis=token_axis, keepdims=True)
    masked = row_norms <= jnp.asarray(tau).astype(mean.dtype) * mean  # NaN is not masked
    U = jnp.where(masked, jnp.zeros_like(U), U)
    for k in range(NUM_NORMALIZATIONS):
        norms = _norms(U, columns if k % 2 == 0 else token_axis)
        # Rows of zeros are divided by 1: XLA may divide by the product of several divisors, and a
        # product of 1e-20 is 0.
        U = U / jnp.where(norms == 0, 1, norms + EPS).astype(U.dtype)
    return U * G.shape[columns] ** 0.5


def _norms(U: jax.Array, axis: int) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.abs(U) ** 2, axis=axis, keepdims=True))


def _average(M: jax.Array, G: jax.Array, beta: Scalar) -> jax.Array:
    """β M + (1 − β) G, in float32 at least."""
    wide = accumulator(M.dtype, G.dtype)
    b = jnp.asarray(beta).astype(jnp.finfo(wide).dtype)
    return b.astype(wide) * M.astype(wide) + (1 - b).astype(wide) * G.astype(wide)


def _zeros_like(p: Any, dtype: Any) -> jax.Array:
    return jnp.zeros_like(p, dtype=None if jnp.iscomplexobj(p) else dtype)


def _check_tables(tree: ArrayTree) -> None:
    """Raises one error for all leaves that are no tables."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    faults = [
        f"  {path_string(path)}: {x.dtype}{list(x.shape)}."
        for path, x in flat
        if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    if faults:
        raise ValueError(
            f"scale_by_sinkhorn: {len(faults)} of {len(flat)} leaves are no tables of tokens and "
            "features, with two axes or more and a floating or complex dtype.\n"
            + "\n".join(faults)
            + "\nSend them to another optimizer with `optax.masked` or `optax.partition`; `muon` "
            "assigns only the parameters to it whose override is `Sinkhorn`."
        )

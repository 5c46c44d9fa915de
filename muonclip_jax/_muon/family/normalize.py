"""Divides the inputs or outputs of matrices, or the matrices, by their norm: MuonEq and Muon+.

With X a matrix n_in x n_out, X_i its row of input i, and X_j its column of output j:

    "inputs":   X_i / ‖X_i‖                            before the orthogonalization: MuonEq
    "outputs":  X_j / ‖X_j‖                            before the orthogonalization: MuonEq
    "matrix":   X √min(n_in, n_out) / ‖X‖_F            after the orthogonalization: Muon+

Source: arXiv 2603.28254 (MuonEq), arXiv 2602.21545 (Muon+).
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._common.dtypes import widened
from muonclip_jax._common.settings import NUMBERS, check_settings, choice
from muonclip_jax._muon.injection import injectable
from muonclip_jax._muon.per_head import PER_HEAD_RULES, PerHead, with_heads
from muonclip_jax._orthogonalize.dimension_numbers import DimensionNumbersOrFn
from muonclip_jax._orthogonalize.matrices import Axes, sides
from muonclip_jax._orthogonalize.split import splits_of
from muonclip_jax._sharding.parts import map_matrices


def _check(arguments: Mapping[str, Any]) -> None:
    """Raises for settings of `normalize_matrices` that are not allowed."""
    rules = {**PER_HEAD_RULES, "by": choice("inputs", "outputs", "matrix")}
    check_settings("normalize_matrices", arguments, rules=rules)


@injectable(NUMBERS, _check)
def normalize_matrices(
    by: str,
    weight_dimension_numbers: DimensionNumbersOrFn | None = None,
    *,
    per_head: PerHead = None,
) -> optax.GradientTransformationExtraArgs:
    """Divides every matrix, or every input or output of it, by its norm.

    After `scale_by_muon`, `"matrix"` is Muon+. `scale_by_muon(preconditioning="outputs")` is
    MuonEq, and applies `"outputs"` to the momentum before it orthogonalizes.

    Args:
      by: `"inputs"` or `"outputs"` gives what belongs to each of them the norm 1. `"matrix"` gives
        each matrix the Frobenius norm √min(n_in, n_out), as an orthogonal matrix has.
      weight_dimension_numbers: See `scale_by_muon`.
      per_head: See `muon`: a head is a matrix.

    Returns:
      An optax transformation without state, which ignores extra arguments. Updates keep their
      dtypes; norms are computed in float32 at least. Zeros stay zero.

    Raises:
      TypeError: when built, for settings of a wrong type.
      ValueError: when built, for an unknown name; while tracing, for leaves that are no matrices.

    Example:
      >>> import muonclip_jax as mc, jax.numpy as jnp
      >>> tx = mc.normalize_matrices("outputs")
      >>> updates, _ = tx.update({"w": jnp.array([[3.0, 0.0], [4.0, 0.0]])}, tx.init({}))
      >>> print(updates["w"])
      [[0.6 0. ]
       [0.8 0. ]]

    References:
      MuonEq, arXiv 2603.28254; Muon+, arXiv 2602.21545.
    """
    _check(locals())
    numbers = with_heads("normalize_matrices", weight_dimension_numbers, per_head)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        updates = jax.tree.map(jnp.asarray, updates)
        splits = splits_of("normalize_matrices", updates, numbers)
        by_norm = functools.partial(normalized, by)
        return map_matrices("normalize_matrices", by_norm, splits, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def normalized(by: str, axes: Axes, x: jax.Array) -> jax.Array:
    """Normalizes the matrices of a leaf.

    Args:
      by: See `normalize_matrices`.
      axes: Axes of the leaf.
      x: Leaf.

    Returns:
      An array of the shape and dtype of `x`, sharded as it.

    Example:
      >>> normalized("matrix", Axes((), (0,), (1,)), jnp.array([[3.0, 0.0]])).tolist()
      [[1.0, 0.0]]
    """
    summed = {
        "inputs": axes.output,
        "outputs": axes.reduction,
        "matrix": axes.reduction + axes.output,
    }[by]
    norm = math.sqrt(min(sides(x.shape, axes))) if by == "matrix" else 1.0
    return (norm * _unit(widened(x), summed)).astype(x.dtype)


def _unit(X: jax.Array, summed: tuple[int, ...]) -> jax.Array:
    """X / ‖X‖, with the largest magnitude taken out before any square; 0 / 0 is 0."""
    X = _divided(X, jnp.max(jnp.abs(X), axis=summed, keepdims=True, initial=0))
    return _divided(X, jnp.sqrt(jnp.sum(jnp.abs(X) ** 2, axis=summed, keepdims=True)))


def _divided(X: jax.Array, size: jax.Array) -> jax.Array:
    return X / jnp.where(size == 0, 1, size).astype(X.dtype)

"""Scales singular values to at most one: norms at any scale, and preconditioning."""

import jax
import jax.numpy as jnp

from muonclip_jax._common.dtypes import accumulator
from muonclip_jax._orthogonalize.column_shards import ColumnShards
from muonclip_jax._orthogonalize.symmetric import (
    Products,
    Symmetric,
    gram_matrix,
    rounded,
    unrounded_gram_matrix,
)

# 2⁶⁴ is exact in every dtype we normalize in, and takes the reciprocal of the largest and smallest
# float32 out of the subnormal range, where XLA flushes it to zero.
_SHIFT = 2.0**64


def normalize(
    X: jax.Array, preconditioning: str, eps: jax.Array, shards: ColumnShards | None
) -> jax.Array:
    """Divides each matrix by its norm, at any scale; zero stays zero.

    The squared norm of a matrix as it is would overflow at 1e19 and vanish at 1e-23 in float32.
    So its largest magnitude is made one first.

    Args:
      X: `[..., n, m]`; if devices share it, some of its columns.
      preconditioning: `"spectral"` divides by the largest singular value, all others by the
        Frobenius norm.
      eps: Added to the norm.
      shards: The devices that share the matrix; None for one device.

    Returns:
      `[..., n, m]`, in float32 at least.
    """
    X = X.astype(accumulator(X.dtype))
    magnitude = jnp.maximum(jnp.abs(X.real), jnp.abs(X.imag)) if jnp.iscomplexobj(X) else jnp.abs(X)
    # No gradient: the result does not depend on this factor.
    largest = jax.lax.stop_gradient(jnp.max(magnitude, axis=(-2, -1), keepdims=True))
    largest = shards.max(largest) if shards else largest
    shift = jnp.where(largest > 1, 1 / _SHIFT, _SHIFT).astype(largest.dtype)
    X = (X * shift.astype(X.dtype)) / nonzero(largest * shift).astype(X.dtype)
    if preconditioning == "spectral" and shards:
        A = unrounded_gram_matrix(X, Products(shards=shards))
        norm = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(A)[..., -1:, None], 0))
    elif preconditioning == "spectral":
        norm = jnp.linalg.svd(X, compute_uv=False)[..., :1, None]
    elif shards:
        norm = jnp.sqrt(shards.sum(jnp.sum(jnp.abs(X) ** 2, axis=(-2, -1), keepdims=True)))
    else:
        norm = jnp.linalg.norm(X, axis=(-2, -1), keepdims=True)
    return X / nonzero(norm + eps).astype(X.dtype)


def precondition(
    X: jax.Array, preconditioning: str, products: Products
) -> tuple[jax.Array, Symmetric]:
    """Scales the rows of a normalized X as the preconditioning requires; also returns X Xᴴ.

    Args:
      X: As for `standard`.
      preconditioning: See `newton_schulz`.
      products: How products of n x n matrices are computed.

    Returns:
      X and X Xᴴ. Two preconditionings replace X by D X, D diagonal, and X Xᴴ by D X Xᴴ D.
    """
    if preconditioning not in ("schatten", "aol"):
        return X, gram_matrix(X, products)
    A = unrounded_gram_matrix(X, products)
    if preconditioning == "schatten":  # D = ‖A‖^(-1/2) I, and ‖A‖^(1/2) is the Schatten-4 norm of X
        total = jnp.linalg.norm(A, axis=(-2, -1), keepdims=True)
    else:  # D_ii = (Σ_j |A_ij|)^(-1/2)
        total = jnp.sum(jnp.abs(A), axis=-1, keepdims=True)
    D = jax.lax.rsqrt(nonzero(total)).astype(A.dtype)
    return (D * X.astype(A.dtype)).astype(X.dtype), rounded(A * D * D.mT, X.dtype, products)


def nonzero(x: jax.Array) -> jax.Array:
    """Replaces what is not above zero by one, so that it can be a divisor."""
    return jnp.where(x > 0, x, jnp.ones_like(x))

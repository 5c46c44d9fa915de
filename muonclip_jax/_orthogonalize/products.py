"""Products of matrices; those known to be Hermitian are formed by blocks.

A Hermitian matrix is kept as the p x p blocks on and above its diagonal, and those below are read
from them, transposed. A product known to be Hermitian then costs (p + 1) / 2p of its FLOPs:

    (A B)_ij = Σ_k A_ik B_kj    for i ≤ j alone

Nothing is cut or joined between two products. With p = 1 this is the plain product, and the matrix
need be Hermitian only up to rounding.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from muonclip_jax._common.dtypes import accumulator

# The blocks (i, j), i <= j, of a Hermitian matrix.
Hermitian: TypeAlias = dict[tuple[int, int], jax.Array]
# The block rows of any matrix.
Rows: TypeAlias = tuple[jax.Array, ...]


def hermitian_share(blocks: int) -> float:
    """Gives the part of its FLOPs that a Hermitian product costs by p x p blocks.

    Args:
      blocks: p.

    Returns:
      (p + 1) / 2p.

    Example:
      >>> hermitian_share(1), hermitian_share(2)
      (1.0, 0.75)
    """
    return (blocks + 1) / (2 * blocks)


def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies two arrays, and returns the sums unrounded."""
    # HIGHEST: accelerators would round float32 operands to TF32 or bfloat16 by default.
    precision = None if jnp.finfo(a.dtype).bits == 16 else jax.lax.Precision.HIGHEST
    return jnp.matmul(a, b, precision=precision, preferred_element_type=accumulator(a.dtype))


def split(x: jax.Array, blocks: int) -> Rows:
    """Cuts a matrix into block rows of equal height."""
    return tuple(jnp.split(x, blocks, axis=-2)) if blocks > 1 else (x,)


def join(X: Rows) -> jax.Array:
    """Undoes `split`."""
    first, *others = X
    return jnp.concatenate(X, axis=-2) if others else first


def block_rows(A: Hermitian) -> Rows:
    """Writes a Hermitian matrix out, as its block rows."""
    p = _block_count(A)
    rows = ([_block(A, i, j) for j in range(p)] for i in range(p))
    return tuple(jnp.concatenate(row, axis=-1) if p > 1 else row[0] for row in rows)


def gram_matrix(X: Rows) -> Hermitian:
    """Forms X Xᴴ, unrounded."""
    return _upper(len(X), lambda i, j: multiply(X[i], X[j].mT.conj()))


def hermitian_product(A: Hermitian, B: Hermitian) -> Hermitian:
    """Forms A B, unrounded, of two Hermitian matrices that commute but for rounding."""
    p = _block_count(A)
    return _upper(
        p, lambda i, j: _sum(multiply(_block(A, i, k), _block(B, k, j)) for k in range(p))
    )


def product(A: Hermitian, X: Rows) -> Rows:
    """Forms A X, unrounded."""
    p = len(X)
    return tuple(_sum(multiply(_block(A, i, k), X[k]) for k in range(p)) for i in range(p))


def mean_diagonal(A: Hermitian) -> jax.Array:
    """Averages the diagonal; the last two axes stay, with one entry each."""
    diagonal = [block for (i, j), block in A.items() if i == j]
    n = sum(block.shape[-1] for block in diagonal)
    return _sum(jnp.trace(block, axis1=-2, axis2=-1) for block in diagonal)[..., None, None] / n


def mean_square(X: Rows) -> jax.Array:
    """Averages the squared length of the rows, which is the diagonal of X Xᴴ; axes as above."""
    wide = (x.astype(accumulator(x.dtype)) for x in X)
    total = _sum(jnp.sum(jnp.abs(x) ** 2, axis=(-2, -1), keepdims=True) for x in wide)
    return total / sum(x.shape[-2] for x in X)


def add_identity(s: Any, A: Hermitian) -> Hermitian:
    """Computes s I + A."""

    def add(block: jax.Array) -> jax.Array:
        identity = jnp.eye(block.shape[-1], dtype=block.dtype)[(None,) * (block.ndim - 2)]
        return block + s * identity

    return {(i, j): add(block) if i == j else block for (i, j), block in A.items()}


def _upper(p: int, block: Callable[[int, int], jax.Array]) -> Hermitian:
    return {(i, j): block(i, j) for i in range(p) for j in range(i, p)}


def _block(A: Hermitian, i: int, j: int) -> jax.Array:
    return A[i, j] if i <= j else A[j, i].mT.conj()


def _block_count(A: Hermitian) -> int:
    return 1 + max(j for _, j in A)


def _sum(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, terms)

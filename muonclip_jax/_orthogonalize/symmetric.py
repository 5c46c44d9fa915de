"""Symmetric n x n matrices with `+`, `*` and `@`, rounded once: all that Newton-Schulz iterates on.

A Newton-Schulz step is a polynomial of A = X Xᴴ (symmetric, or Hermitian if X is complex). Such
polynomials are written as on paper, and `rounded()` ends each of them:

    A = gram_matrix(X)
    Z = (b * A + c * (A @ A)).rounded()

The class hides three optimizations that are no part of the equation.

- A matrix is r I + R, with the number r kept beside R. In 16 bits r is the mean of the diagonal, so
  that R has smaller entries, and loses less when it is rounded. Products follow from
  (r I + R) (t I + T) = r t I + (r T + t R + R T).
- `mirror` computes three of the four blocks of a product, as the fourth is one of them transposed.
- On devices that share a matrix (`ColumnShards`), each has a shard of the columns of X and all of
  A. It computes some rows of each product, and gathers the others after they are rounded.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from muonclip_jax._common.dtypes import accumulator
from muonclip_jax._orthogonalize.column_shards import ColumnShards

# The FLOPs of a mirrored product, as a fraction of those of a plain one.
MIRRORED_SHARE = 0.75


class Products(NamedTuple):
    """How products of n x n matrices are computed.

    Attributes:
      mirror: Whether to compute three of their four blocks. The sides must be even.
      shards: The devices that share the matrix; None for one device.
    """

    mirror: bool = False
    shards: ColumnShards | None = None


@dataclasses.dataclass(frozen=True)
class Symmetric:
    """r I + R, a matrix that is symmetric up to rounding.

    Attributes:
      shift: r, an array that broadcasts against R, or a Python number.
      matrix: R, `[..., n, n]`, in the dtype of the iteration.
      products: How its products are computed.
    """

    shift: Any
    matrix: jax.Array
    products: Products

    def __radd__(self, a: Any) -> "Symmetric":
        """Computes a I + A: exact, as only the shift changes."""
        return dataclasses.replace(self, shift=a + self.shift)

    def __rmul__(self, a: Any) -> "Unrounded":
        """Computes a A."""
        return Unrounded(a * self.shift, a * self._own_rows(), self.matrix.dtype, self.products)

    def __matmul__(self, other: Any) -> Any:
        """Computes A B, of matrices that commute up to rounding, or A X, unrounded, for an array X.

        A B is mirrored, and may be mirrored later, only if both A and B may be.
        """
        r, R = self.shift, self.matrix
        if isinstance(other, jax.Array):
            return _plus(_times(r, _wide(other)), multiply(R, other))
        t, T = other.shift, other.matrix
        products = self.products._replace(mirror=self.products.mirror and other.products.mirror)
        RT = mirrored(R, T) if products.mirror else multiply(own_rows(R, products.shards), T)
        cross = _plus(_times(r, other._own_rows()), _times(t, self._own_rows()))
        return Unrounded(r * t, _plus(cross, RT), R.dtype, products)

    def without_shift(self) -> "Symmetric":
        """Adds the shift to the diagonal of R, rounded."""
        R = self.matrix
        return dataclasses.replace(self, shift=0.0, matrix=R + self.shift * _identity(R))

    def without_mirror(self) -> "Symmetric":
        """Returns the same matrix, whose products are computed in full."""
        return dataclasses.replace(self, products=self.products._replace(mirror=False))

    def _own_rows(self) -> jax.Array:
        return _wide(own_rows(self.matrix, self.products.shards))


@dataclasses.dataclass(frozen=True)
class Unrounded:
    """r I + R before it is rounded, in float32 at least, on devices that share it in rows.

    Attributes:
      shift: r.
      rows: The rows of R on this device.
      dtype: Dtype to round to.
      products: How products of the rounded matrix are computed.
    """

    shift: Any
    rows: jax.Array
    dtype: Any
    products: Products

    def __rmul__(self, a: Any) -> "Unrounded":
        """Computes a A."""
        return dataclasses.replace(self, shift=a * self.shift, rows=a * self.rows)

    def __add__(self, other: "Unrounded") -> "Unrounded":
        """Computes A + B."""
        shift, rows = self.shift + other.shift, self.rows + other.rows
        return dataclasses.replace(self, shift=shift, rows=rows)

    def rounded(self) -> Symmetric:
        """Rounds R to the dtype of the iteration, and gathers its rows."""
        R, shards = self.rows.astype(self.dtype), self.products.shards
        if shards:
            R = shards.all_rows(R, R.shape[-1])
        return Symmetric(self.shift, R, self.products)


def gram_matrix(X: jax.Array, products: Products) -> Symmetric:
    """Computes X Xᴴ, rounded to the dtype of X.

    Args:
      X: `[..., n, m]`; if devices share it, some of its columns.
      products: How products are computed.

    Returns:
      The matrix; in 16 bits its shift is the mean of the diagonal.
    """
    A = unrounded_gram_matrix(X, products)
    if products.shards or not is_narrow(X.dtype):
        return rounded(A, X.dtype, products)
    # From X, so that the shift is known before the product and the unrounded A need not be kept.
    mean = jnp.sum(jnp.abs(_wide(X)) ** 2, axis=(-2, -1), keepdims=True) / X.shape[-2]
    return rounded(A, X.dtype, products, mean)


def unrounded_gram_matrix(X: jax.Array, products: Products) -> jax.Array:
    """Computes X Xᴴ in the dtype of its sums; see `gram_matrix`."""
    A = (mirrored if products.mirror else multiply)(X, X.mT.conj())
    return products.shards.sum(A) if products.shards else A


def rounded(A: jax.Array, dtype: Any, products: Products, shift: Any = None) -> Symmetric:
    """Rounds an array to r I + R.

    Args:
      A: `[..., n, n]`.
      dtype: Dtype of R.
      products: How products are computed.
      shift: r for 16 bits; None computes the mean of the diagonal. Wide types have none.

    Returns:
      The matrix.
    """
    if not is_narrow(dtype):
        return Symmetric(0.0, A.astype(dtype), products)
    n = A.shape[-1]
    r = jnp.trace(A, axis1=-2, axis2=-1)[..., None, None] / n if shift is None else shift
    return Symmetric(r, (A - r * _identity(A)).astype(dtype), products)


def multiply(A: jax.Array, B: jax.Array) -> jax.Array:
    """Multiplies two arrays, and returns the sums unrounded, in float32 at least."""
    # HIGHEST: accelerators would round float32 operands to TF32 or bfloat16 by default.
    precision = None if is_narrow(A.dtype) else jax.lax.Precision.HIGHEST
    return jnp.matmul(A, B, precision=precision, preferred_element_type=accumulator(A.dtype))


def mirrored(A: jax.Array, B: jax.Array) -> jax.Array:
    """Multiplies two arrays whose product is Hermitian: all but the lower left block."""
    half = A.shape[-2] // 2
    upper = multiply(A[..., :half, :], B)
    lower_right = multiply(A[..., half:, :], B[..., half:])
    lower_left = upper[..., half:].mT.conj()
    return jnp.concatenate([upper, jnp.concatenate([lower_left, lower_right], axis=-1)], axis=-2)


def own_rows(A: jax.Array, shards: ColumnShards | None) -> jax.Array:
    """Returns the rows of a matrix whose products this device computes."""
    return shards.own_rows(A) if shards else A


def is_narrow(dtype: Any) -> bool:
    """Whether a dtype has 16 bits."""
    return jnp.finfo(dtype).bits == 16


def _identity(A: jax.Array) -> jax.Array:
    """Returns an identity matrix of the shape of A, with batch axes of size 1."""
    return jnp.eye(A.shape[-1], dtype=A.dtype)[(None,) * (A.ndim - 2)]


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(accumulator(x.dtype))


def _times(a: Any, x: jax.Array) -> jax.Array | None:
    """Computes a x; None for a number that is known to be zero."""
    return None if isinstance(a, float) and a == 0 else a * x


def _plus(x: jax.Array | None, y: jax.Array | None) -> Any:
    return y if x is None else x if y is None else x + y

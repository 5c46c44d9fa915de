"""Symmetric n x n matrices with `+`, `*` and `@`, rounded once: all that Newton-Schulz iterates on.

A Newton-Schulz step is a polynomial of A = X Xᴴ (symmetric, or Hermitian if X is complex). Such
polynomials are written as on paper, and `rounded()` ends each of them:

    A = gram_matrix(X)
    Z = (b * A + c * (A @ A)).rounded()

The classes hide four optimizations that are no part of the equation.

- A matrix is r I + R, with the number r kept beside R. In 16 bits r is the mean of the diagonal, so
  that R has smaller entries, and loses less when it is rounded. Products follow from
  (r I + R) (t I + T) = r t I + (r T + t R + R T).
- A polynomial is computed where it is rounded, its product and its sum at once.
- `mirror` computes three of the four blocks of a product, as the fourth is one of them transposed.
  `kernel` is the same in small tiles, on TPU (`tpu_kernel.py`) and GPU (`gpu_kernel.py`).
- On devices that share a matrix (`ColumnShards`), each has a shard of the columns of X and all of
  A. It computes some rows of each product, and gathers the others after they are rounded.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from muonclip_jax._common.dtypes import accumulator
from muonclip_jax._orthogonalize.column_shards import ColumnShards
from muonclip_jax._orthogonalize.tiles import Tiles, fastest, fastest_full, is_nvidia

# The FLOPs of a mirrored product, as a fraction of those of a plain one.
_MIRRORED_FRACTION = 0.75


class Products(NamedTuple):
    """How products of n x n matrices are computed.

    Attributes:
      mirror: Whether to compute three of their four blocks. The sides must be even.
      kernel: The kind of device whose kernel computes them; None for XLA's products.
      shards: The devices that share the matrix; None for one device. Each computes some rows of a
        product in full, and all of X Xᴴ.
      in_full: Whether to compute every number of a symmetric product.
    """

    mirror: bool = False
    kernel: str | None = None
    shards: ColumnShards | None = None
    in_full: bool = False

    @property
    def is_symmetric(self) -> bool:
        """Whether products of n x n matrices are computed in part, as they are symmetric."""
        return not self.in_full and (self.mirror or self.kernel is not None)

    def flop_fraction(self, n: int, dtype: Any) -> float:
        """Returns the FLOPs of a symmetric product, as a fraction of those of a plain one."""
        if tiles := self.tiles(n, n, dtype):
            return tiles.flop_fraction(n)
        return _MIRRORED_FRACTION if self.mirror else 1.0

    def tiles(self, n: int, m: int, dtype: Any) -> Tiles | None:
        """Returns how the kernel cuts an n x n product with sums of m terms; None without it."""
        return fastest(n, m, jnp.dtype(dtype).itemsize, self.kernel) if self.kernel else None

    def full_tiles(self, A: jax.Array, B: jax.Array) -> Tiles | None:
        """Returns how the kernel cuts A B, which has no symmetry; None without it."""
        rows, columns, terms = A.shape[-2], B.shape[-1], A.shape[-1]
        if self.kernel is None:
            return None
        return fastest_full(rows, columns, terms, A.dtype.itemsize, self.kernel)

    def functions(self) -> Any:
        """Imports the module of the kernel where it is used: importing Pallas takes long."""
        if not is_nvidia(self.kernel):
            from muonclip_jax._orthogonalize import tpu_kernel

            return tpu_kernel
        try:
            from muonclip_jax._orthogonalize import gpu_kernel
        except ImportError as error:  # JAX has deprecated what the kernel needs
            raise ValueError(
                f"newton_schulz: products='pallas' needs jax.experimental.pallas.triton on a GPU, "
                f"which jax {jax.__version__} does not have. Pass products='xla'."
            ) from error
        return gpu_kernel

    def passes(self, height: int, width: int) -> Any:
        """Imports the module that assembles shards of height x width; None: XLA assembles them."""
        if self.kernel is None or is_nvidia(self.kernel):
            return None
        from muonclip_jax._orthogonalize import tpu_shards

        return tpu_shards if tpu_shards.fits(height, width) else None


class Matrix(NamedTuple):
    """An n x m matrix X that Newton-Schulz iterates on.

    Attributes:
      entries: `[..., n, m]`; if devices share it, some of its columns.
      squares: The sum of its squares, `[..., 1, 1]`, up to rounding; None if it is not known yet.
    """

    entries: jax.Array
    squares: Any = None


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
        return Unrounded(a * self.shift, ((a, self.matrix),), None, self.products)

    def __matmul__(self, other: Any) -> Any:
        """Computes A B, of matrices that commute up to rounding, or A X, rounded, for a `Matrix`.

        A B is symmetric, and may be used as such later, only if both A and B are.
        """
        r, R = self.shift, self.matrix
        if isinstance(other, Matrix):
            X, in_full = other.entries, self.products._replace(mirror=False)
            return _sum_of_products([(r, X)], (1.0, R, X), in_full)
        t, T = other.shift, other.matrix
        products = self.products if other.products.is_symmetric else other.products
        return Unrounded(r * t, ((r, T), (t, R)), (1.0, R, T), products)

    def without_shift(self) -> "Symmetric":
        """Adds the shift to the diagonal of R, rounded."""
        R = self.matrix
        return dataclasses.replace(self, shift=0.0, matrix=R + self.shift * _identity(R))

    def in_full(self) -> "Symmetric":
        """Returns the same matrix, whose products are computed in full."""
        products = self.products._replace(mirror=False, in_full=True)
        return dataclasses.replace(self, products=products)


@dataclasses.dataclass(frozen=True)
class Unrounded:
    """r I + Σ a R + c R T, before it is computed.

    Attributes:
      shift: r.
      terms: Each (a, R).
      product: (c, R, T), or None.
      products: How the product, and those of the rounded matrix, are computed.
    """

    shift: Any
    terms: tuple[tuple[Any, jax.Array], ...]
    product: tuple[Any, jax.Array, jax.Array] | None
    products: Products

    def __rmul__(self, a: Any) -> "Unrounded":
        """Computes a A."""
        terms = tuple((a * b, R) for b, R in self.terms)
        product = self.product and (a * self.product[0], *self.product[1:])
        return Unrounded(a * self.shift, terms, product, self.products)

    def __add__(self, other: "Unrounded") -> "Unrounded":
        """Computes A + B, of which at most one has a product."""
        if self.product and other.product:
            raise ValueError("a sum of two unrounded products: round one of them first.")
        terms, product = self.terms + other.terms, self.product or other.product
        return Unrounded(self.shift + other.shift, terms, product, self.products)

    def rounded(self) -> Symmetric:
        """Computes the matrix in float32 at least, rounds it once, and gathers its rows."""
        products, sums = self.products, self._sums()
        dtype, n = sums[0][1].dtype, sums[0][1].shape[-1]
        in_part = not products.shards and not products.in_full
        if self.product and in_part and (tiles := products.tiles(n, n, dtype)):
            c, R, T = self.product
            a, b = (sum(a for a, A in sums if A is B) for B in (R, T))
            R = products.functions().product(a, R, 0.0 if T is R else b, T, c, tiles)
            return Symmetric(self.shift, R, products)
        terms = [(a, own_rows(R, products.shards)) for a, R in sums]
        product = self.product
        if product:
            c, R, T = product
            product = c, own_rows(R, products.shards), T
        rows = _sum_of_products(terms, product, products).entries
        return Symmetric(self.shift, _all_rows(rows, n, products.shards), products)

    def _sums(self) -> list[tuple[Any, jax.Array]]:
        """Returns the terms, one for each matrix."""
        found: list[tuple[Any, jax.Array]] = []
        for a, R in self.terms:
            same = next((i for i, (_, other) in enumerate(found) if other is R), None)
            if same is None:
                found.append((a, R))
            else:
                found[same] = (found[same][0] + a, R)
        return found


def gram_matrix(X: Matrix, products: Products) -> Symmetric:
    """Computes X Xᴴ, rounded to the dtype of X.

    Args:
      X: `[..., n, m]`.
      products: How products are computed.

    Returns:
      The matrix; in 16 bits its shift is the mean of the diagonal.
    """
    entries, squares = X
    if products.shards:
        return rounded(unrounded_gram_matrix(entries, products), entries.dtype, products)
    r: Any = 0.0
    if is_narrow(entries.dtype):
        # Known before the product, so that the unrounded A need not be kept.
        if squares is None:
            squares = jnp.sum(jnp.abs(_wide(entries)) ** 2, axis=(-2, -1), keepdims=True)
        r = squares / entries.shape[-2]
    if tiles := products.tiles(entries.shape[-2], entries.shape[-1], entries.dtype):
        return Symmetric(r, products.functions().gram_matrix(entries, r, tiles), products)
    return rounded(unrounded_gram_matrix(entries, products), entries.dtype, products, r)


def unrounded_gram_matrix(X: jax.Array, products: Products) -> jax.Array:
    """Computes X Xᴴ in the dtype of its sums; see `gram_matrix`."""
    if tiles := products.tiles(X.shape[-2], X.shape[-1], X.dtype):
        A = products.functions().gram_matrix(X, 0.0, tiles, accumulator(X.dtype))
    else:
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


def _sum_of_products(
    terms: Sequence[tuple[Any, jax.Array]],
    product: tuple[Any, jax.Array, jax.Array] | None,
    products: Products,
) -> Matrix:
    """Computes Σ a A + c R T in float32 at least, and rounds it once.

    Args:
      terms: Each (a, A).
      product: (c, R, T), or None.
      products: How R T is computed.

    Returns:
      The sum, in the dtype of the matrices.
    """
    if product and (tiles := products.full_tiles(*product[1:])):
        return Matrix(*products.functions().full_product(*product, terms, tiles))
    total: Any = None
    for a, A in terms:
        total = _plus(total, _times(a, _wide(A)))
    if product:
        c, R, T = product
        total = _plus(total, c * (mirrored if products.mirror else multiply)(R, T))
    return Matrix(total.astype(terms[0][1].dtype))


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


def _all_rows(rows: jax.Array, n: int, shards: ColumnShards | None) -> jax.Array:
    """Gathers the rows of all devices, n in total."""
    return shards.all_rows(rows, n) if shards else rows


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

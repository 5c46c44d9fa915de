"""One step of the kernel of `tpu_kernel.py`, on the blocks that are in fast memory."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from muonclip_jax._orthogonalize.kernel_call import Form
from muonclip_jax._orthogonalize.tiles import Part

# Numbers in a row of a register: slices of blocks start and end at multiples of it.
LANES = 128
# Rows of a register of float32.
ROWS = 8


class ProductShape(NamedTuple):
    """Sizes of a stack of products.

    Attributes:
      count: Matrices.
      n: Rows of the result.
      m: Columns of the result.
      terms: Terms of the sums.
      positions: Tiles of a matrix that are computed.
      K: Steps that add up terms.
    """

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    n: int
    m: int
    terms: int
    positions: int
    K: int

    def divided(self, p: Any) -> tuple[Any, Any]:
        """Divides a position in the stack: the matrix, and the position in it."""
        if self.count == 1:  # without divisions, which take many cycles at each step
            return 0, p
        return jax.lax.div(p, self.positions), jax.lax.rem(p, self.positions)


class _Tile(NamedTuple):
    """The blocks of one tile, and how its sums are cut.

    Attributes:
      form: What the kernel computes.
      left: Rows of A, or of X.
      right: Columns of B, or rows of X.
      added: Blocks of the matrices that are added.
      total: The sums so far, in float32.
      factors: r, or the factor of each added matrix and then the factor of the product.
      terms: Terms of the sums.
      k: The step.
      K: Steps that add up terms.
    """

    form: Form
    left: Any
    right: Any
    added: Sequence[Any]
    total: Any
    factors: Sequence[Any]
    terms: int
    k: Any
    K: int

    def add(self, parts: Sequence[Part]) -> None:
        """Adds all chunks of a step to the sums, but the last chunk of step K − 1."""
        k, chunk, depth = self.k, self.form.tiles.chunk, self.left.shape[1]

        def one(c, _):
            for part in parts:
                before = jnp.where((k == 0) & (c == 0), 0.0, self.total[part])
                product = self._product(part, pl.multiple_of(c * chunk, chunk), chunk)
                self.total[part] = before + product

        chunks = jnp.where(k == self.K - 1, self._last // chunk, depth // chunk)
        jax.lax.fori_loop(0, chunks, one, None)

    def result(self, part: Part, is_diagonal: bool) -> jax.Array:
        """Adds the last chunk, and A, B and I."""
        products = self._product(part, self._last, self._terms_of_last_step - self._last)
        if self.terms > self.form.tiles.chunk:
            products += self.total[part]
        if self.form.is_gram:
            return products - self.factors[0] * _identity(part) if is_diagonal else products
        products *= self.factors[-1]
        for factor, ref in zip(self.factors, self.added):  # noqa: B905  # the last is not added
            products += factor * ref[part].astype(products.dtype)
        return products

    @property
    def _terms_of_last_step(self) -> int:
        return self.terms - (self.K - 1) * self.left.shape[1]

    @property
    def _last(self) -> int:
        """The first term of the last chunk in step K − 1. The chunk may be partial."""
        chunk = self.form.tiles.chunk
        return (self._terms_of_last_step - 1) // chunk * chunk

    def _product(self, part: Part, start: Any, size: int) -> jax.Array:
        """Multiplies some of the terms: X[i, :] X[j, :]ᵀ, or A[i, :] B[:, j]."""
        (rows, columns), is_gram = part, self.form.is_gram
        terms = pl.ds(start, -(-size // LANES) * LANES)
        A, B = self.left[rows, terms], self.right[(columns, terms) if is_gram else (terms, columns)]
        terms_axis = 1 if is_gram else 0
        if size % LANES:
            A, B = _masked(A, 1, size), _masked(B, terms_axis, size)
        # HIGHEST: a TPU would round float32 factors to bfloat16 by default.
        precision = jax.lax.Precision.HIGHEST if A.dtype == jnp.float32 else None
        dimensions = (((1,), (terms_axis,)), ((), ()))
        return jax.lax.dot_general(
            A, B, dimensions, precision=precision, preferred_element_type=jnp.float32
        )


def kernel_step(rows, columns, numbers, *refs, form: Form, product: ProductShape) -> None:
    """One step of a position."""
    left, right, *added, _, _, _ = refs
    p, k = pl.program_id(0), pl.program_id(1)
    matrix, at = product.divided(p)
    each = 1 if form.is_gram else len(added) + 1
    factors = [numbers[matrix * each + index] for index in range(each)]
    place = rows[at], columns[at]
    if form.is_symmetric:
        out, total, transposed = refs[-3:]
        tile = _Tile(form, left, right, added, total, factors, product.terms, k, product.K)
        _symmetric(tile, place, out, transposed)
    else:
        out, squares, total = refs[-3:]
        tile = _Tile(form, left, right, added, total, factors, product.terms, k, product.K)
        _full(tile, place, (product.n, product.m), out, squares)


def _symmetric(tile: _Tile, place: tuple[Any, Any], out: Any, transposed: Any) -> None:
    """One step of a symmetric product."""
    (i, j), k, K = place, tile.k, tile.K
    whole, *_ = tile.form.tiles.parts(is_diagonal=False)
    parts = tile.form.tiles.parts(is_diagonal=True)

    @pl.when((k < K) & (i != j))
    def _sum():
        tile.add([whole])

    @pl.when((k == K - 1) & (i != j))
    def _write():
        result = tile.result(whole, False).astype(out.dtype)
        out[...], transposed[...] = result, result.T

    @pl.when((k == K) & (i != j))
    def _write_transposed():
        out[...] = transposed[...]

    @pl.when((k < K) & (i == j))
    def _sum_diagonal():
        tile.add(parts)

    @pl.when((k == K - 1) & (i == j))
    def _write_diagonal():
        for part in parts:
            out[part] = tile.result(part, True).astype(out.dtype)
        if len(parts) > 1:  # the block that is left
            upper, lower = (rows for rows, _ in parts)
            out[lower, upper] = out[upper, lower].T


def _full(
    tile: _Tile, place: tuple[Any, Any], sides: tuple[int, int], out: Any, squares: Any
) -> None:
    """One step of a full product. It also sums the squares of a tile over groups of eight rows."""
    (n, m), (i, j), side, edge = sides, place, tile.form.tiles.side, tile.form.tiles.edge(sides[1])
    whole, *_ = tile.form.tiles.parts(is_diagonal=False)

    def compute(part: Part) -> None:
        tile.add([part])

        @pl.when(tile.k == tile.K - 1)
        def _write():
            result = tile.result(part, False)
            out[part] = result.astype(out.dtype)
            if n % side:
                result = _masked(result, 0, n - i * side)
            if m % side:
                result = _masked(result, 1, m - j * side)
            groups = (result * result).reshape(-1, ROWS, result.shape[1])
            squares[:, part[1]] = jnp.sum(groups, axis=0)
            if part != whole:
                squares[:, part[1].stop :] = jnp.zeros((ROWS, side - part[1].stop), squares.dtype)

    if edge == side:
        compute(whole)
    else:
        pl.when(j < tile.form.tiles.on_side(m) - 1)(lambda: compute(whole))
        pl.when(j == tile.form.tiles.on_side(m) - 1)(lambda: compute((whole[0], slice(0, edge))))


def _identity(part: Part) -> jax.Array:
    """The part of the identity, of a tile on the diagonal."""
    shape = tuple(x.stop - x.start for x in part)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return (row + part[0].start == column + part[1].start).astype(jnp.float32)


def _masked(x: jax.Array, axis: int, size: Any) -> jax.Array:
    """Replaces what is behind the first `size` numbers of an axis by zeros."""
    inside = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < size
    return jnp.where(inside, x.astype(jnp.float32), 0.0).astype(x.dtype)

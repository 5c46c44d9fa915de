"""Symmetric products on TPU: half of the tiles are computed, and each of them is written twice.

    gram_matrix     X Xᵀ − r I
    product         a A + b B + c A B       A and B symmetric, and they commute

The result is cut into square tiles. The kernel computes those on and above the diagonal, and writes
each to its place and, transposed, to the mirrored place. With three tiles on a side:

    position                0     1     2     3     4     5
    tile (i, j)           (0,0) (0,1) (0,2) (1,1) (1,2) (2,2)
    mirrored tile (j, i)  (0,0) (1,0) (2,0) (1,1) (2,1) (2,2)

A position has K + 1 steps. Steps 0 to K − 1 each add up some terms of the sums, in float32. Step
K − 1 also adds A, B and I, rounds once, and writes the tile. Step K writes the transposed tile. It
reads nothing, and its inputs are those of the next position: a step starts to fetch the inputs of
the next one, so that step K − 1, which is long, hides the fetch, and step K has none. The cores of
a chip share the positions. Tiles at the right and lower edges may be partial: what they have
outside of the matrix is garbage, which is dropped. In the last terms of the sums it is masked.

The kernel has no derivative. On a CPU it is interpreted.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from muonclip_jax._orthogonalize.tiles import Tiles

# Numbers in a row of a register: slices of blocks start and end at multiples of it.
_LANES = 128
# The kernel must not use all of the fast memory that it is given.
_SPARE_BYTES = 2**22

_NO_DERIVATIVE = (
    "newton_schulz: the kernel of products='pallas' has no derivative. Pass products='xla' "
    "(ns_products='xla' to an optimizer) to differentiate."
)


class _Form(NamedTuple):
    """What one kernel computes.

    Attributes:
      tiles: How the result is cut.
      is_gram: Whether it is X Xᵀ − r I.
      dtype: Dtype of the result.
    """

    tiles: Tiles
    is_gram: bool
    dtype: Any


def gram_matrix(X: jax.Array, r: Any, tiles: Tiles, dtype: Any = None) -> jax.Array:
    """Computes X Xᵀ − r I.

    Args:
      X: `[..., n, m]`, bfloat16 or float32.
      r: A number, or one for each matrix, `[..., 1, 1]`.
      tiles: How the result is cut.
      dtype: Dtype of the result; None for that of X.

    Returns:
      `[..., n, n]`, summed in float32 and rounded once.
    """
    return _apply(_Form(tiles, True, jnp.dtype(dtype or X.dtype)), (r,), (X,))


def product(a: Any, A: jax.Array, b: Any, B: jax.Array, c: Any, tiles: Tiles) -> jax.Array:
    """Computes a A + b B + c A B for symmetric matrices that commute.

    Args:
      a: A number, or one for each matrix, `[..., 1, 1]`; so are b and c.
      A: `[..., n, n]`, bfloat16 or float32.
      b: See a.
      B: Like A. If it is A itself, its tiles are fetched once.
      c: See a.
      tiles: How the result is cut.

    Returns:
      Shape and dtype of A, summed in float32 and rounded once.
    """
    form = _Form(tiles, False, A.dtype)
    return _apply(form, (a + b, c), (A,)) if A is B else _apply(form, (a, b, c), (A, B))


def _apply(form: _Form, numbers: Sequence[Any], arrays: Sequence[jax.Array]) -> jax.Array:
    """Runs the kernel on stacks of any number of axes."""
    *stack, n, m = arrays[0].shape
    count = math.prod(stack)
    each = [jnp.broadcast_to(jnp.asarray(x, jnp.float32), (*stack, 1, 1)) for x in numbers]
    numbers_of_each = jnp.concatenate([x.reshape(count, 1) for x in each], axis=1)
    flat = tuple(x.reshape(count, n, m) for x in arrays)
    return _without_derivative(form, numbers_of_each, flat).reshape(*stack, n, n)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _without_derivative(
    form: _Form, numbers: jax.Array, arrays: tuple[jax.Array, ...]
) -> jax.Array:
    """Runs the kernel on the matrices of a stack, [count, n, m], also under `jax.vmap`."""

    @jax.custom_batching.custom_vmap
    def run(numbers, arrays):
        # Chosen when the program is lowered, which may be for a TPU that is not attached.
        return jax.lax.platform_dependent(
            numbers,
            *arrays,
            tpu=functools.partial(_compiled, form, False),
            cpu=functools.partial(_compiled, form, True),
        )

    @run.def_vmap
    def _(size, is_batched, numbers, arrays):
        """Makes one stack of all members."""

        def stacked(x, batched):
            x = x if batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        result = run(*jax.tree.map(stacked, (numbers, arrays), tuple(is_batched)))
        return result.reshape(size, -1, *result.shape[1:]), True

    return run(numbers, arrays)


@_without_derivative.defjvp
def _(form, primals, tangents):
    del form, primals, tangents
    raise ValueError(_NO_DERIVATIVE)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(form: _Form, interpret: bool, numbers: jax.Array, *arrays: jax.Array) -> jax.Array:
    """Lays out the kernel: numbers [count, 2 or 3], arrays [count, n, m]."""
    tiles, (count, n, m) = form.tiles, arrays[0].shape
    positions, K = tiles.positions(n), -(-m // tiles.depth)
    rows, columns = (x.astype(np.int32) for x in np.triu_indices(-(-n // tiles.side)))

    def index(p, rows, columns):
        """The matrix, i and j of a position."""
        matrix, at = _divided(p, positions, count)
        return matrix, rows[at], columns[at]

    def block(shape: tuple[int, int], place: Callable[..., tuple[Any, Any]]) -> pl.BlockSpec:
        """A block of an input: of the next position, once this one has read all its terms."""

        def index_map(p, k, rows, columns, _):
            following = jnp.where(k == K, jnp.minimum(p + 1, count * positions - 1), p)
            matrix, i, j = index(following, rows, columns)
            return (matrix, *place(i, j, jnp.where(k == K, 0, k)))

        return pl.BlockSpec((None, *shape), index_map)

    def result_map(p, k, rows, columns, _):
        matrix, i, j = index(p, rows, columns)
        return matrix, jnp.where(k == K, j, i), jnp.where(k == K, i, j)

    side, depth = tiles.side, -(-tiles.depth // _LANES) * _LANES
    left = block((side, depth), lambda i, j, k: (i, k))
    if form.is_gram:
        right, added = block((side, depth), lambda i, j, k: (j, k)), []
    else:
        right, added = block((depth, side), lambda i, j, k: (k, j)), [*arrays]
    operands = [arrays[0], arrays[-1], *added]
    in_tile = block((side, side), lambda i, j, k: (i, j))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(count * positions, K + 1),
        in_specs=[left, right, *[in_tile for _ in added]],
        out_specs=pl.BlockSpec((None, side, side), result_map),
        scratch_shapes=[pltpu.VMEM((side, side), t) for t in (jnp.float32, form.dtype)],
    )
    return pl.pallas_call(
        functools.partial(_kernel, form=form, m=m, count=count, positions=positions, K=K),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((count, n, n), form.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            # The checks take a third of the cycles that the pipeline of blocks needs in a step.
            disable_bounds_checks=True,
            disable_semaphore_checks=True,
            vmem_limit_bytes=tiles.vmem(max(form.dtype.itemsize, arrays[0].dtype.itemsize))
            + _SPARE_BYTES,
        ),
        cost_estimate=_cost(form, operands, K),
        interpret=interpret,
        name="symmetric_gram_matrix" if form.is_gram else "symmetric_product",
    )(jnp.asarray(rows), jnp.asarray(columns), numbers.reshape(-1), *operands)


def _cost(form: _Form, operands: Sequence[jax.Array], K: int) -> pl.CostEstimate:
    """Counts the FLOPs of all tiles, and the bytes that are fetched and written."""
    count, n, m = operands[0].shape
    side, positions = form.tiles.side, form.tiles.positions(n)
    # If all terms are fetched at once, the left block is fetched once for each row of tiles.
    fetched = 2 * positions if K > 1 else positions + -(-n // side)
    numbers = fetched * side * m + (len(operands) - 2) * positions * side**2
    return pl.CostEstimate(
        flops=2 * count * positions * side**2 * m,
        bytes_accessed=count * (numbers * operands[0].dtype.itemsize + n**2 * form.dtype.itemsize),
        transcendentals=0,
    )


def _divided(p: Any, positions: int, count: int) -> tuple[Any, Any]:
    """Divides a position in a stack: the matrix, and the position in it."""
    if count == 1:  # without divisions, which take many cycles at each step
        return 0, p
    return jax.lax.div(p, positions), jax.lax.rem(p, positions)


def _kernel(
    rows, columns, numbers, *refs, form: _Form, m: int, count: int, positions: int, K: int
) -> None:
    """One step of a position."""
    left, right, *added, out, total, rounded = refs
    p, k = pl.program_id(0), pl.program_id(1)
    matrix, at = _divided(p, positions, count)
    i, j = rows[at], columns[at]
    depth, chunk = left.shape[1], form.tiles.chunk
    last_depth = m - (K - 1) * depth
    remainder = last_depth % chunk  # terms that fill no chunk, in step K - 1 alone

    # Products of rows and rows, X[i, :] X[j, :]ᵀ, or of rows and columns, A[i, :] B[:, j].
    terms_axis = 1 if form.is_gram else 0

    def multiply(start: Any, size: int) -> jax.Array:
        """The product of some of the terms that have been fetched."""
        terms = pl.ds(start, -(-size // _LANES) * _LANES)
        A, B = left[:, terms], right[:, terms] if form.is_gram else right[terms, :]
        if size % _LANES:
            A, B = _masked(A, 1, size), _masked(B, terms_axis, size)
        # HIGHEST: a TPU would round float32 factors to bfloat16 by default.
        precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
        dimensions = (((1,), (terms_axis,)), ((), ()))
        return jax.lax.dot_general(
            A, B, dimensions, precision=precision, preferred_element_type=jnp.float32
        )

    @pl.when(k < K)
    def _sum():
        def add(c, _):
            before = jnp.where((k == 0) & (c == 0), 0.0, total[...])
            total[...] = before + multiply(pl.multiple_of(c * chunk, chunk), chunk)

        chunks = jnp.where(k == K - 1, last_depth // chunk, depth // chunk)
        jax.lax.fori_loop(0, chunks, add, None)

    @pl.when(k == K - 1)
    def _write():
        products = total[...] if m >= chunk else jnp.zeros(total.shape, jnp.float32)
        if remainder:
            products += multiply(last_depth - remainder, remainder)
        first = matrix * (1 if form.is_gram else len(added) + 1)
        if form.is_gram:
            result = products - numbers[first] * _identity(products.shape, i, j)
        else:
            result = numbers[first + len(added)] * products
            for index, ref in enumerate(added):
                result += numbers[first + index] * ref[...].astype(result.dtype)
        rounded[...] = out[...] = result.astype(out.dtype)

    @pl.when((k == K) & (i != j))
    def _write_mirrored():
        out[...] = rounded[...].T


def _identity(shape: tuple[int, ...], i: Any, j: Any) -> jax.Array:
    """Tile (i, j) of the identity."""
    row = i * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = j * shape[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (row == column).astype(jnp.float32)


def _masked(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Replaces what is behind the first `size` numbers of an axis by zeros."""
    inside = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < size
    return jnp.where(inside, x.astype(jnp.float32), 0.0).astype(x.dtype)

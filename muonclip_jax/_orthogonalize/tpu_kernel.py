"""Products on TPU that are added and rounded tile by tile; symmetric ones in half of the tiles.

    gram_matrix     X Xᵀ − r I
    product         a A + b B + c A B       A and B symmetric, and they commute
    full_product    c A B + Σ a C           any A, B and C

The result is cut into square tiles. Of a symmetric one the kernel computes the tiles on and above
the diagonal, and writes each to its place and, transposed, to the mirrored place. With three tiles
on a side:

    position                0     1     2     3     4     5
    tile (i, j)           (0,0) (0,1) (0,2) (1,1) (1,2) (2,2)
    mirrored tile (j, i)  (0,0) (1,0) (2,0) (1,1) (2,1) (2,2)

A position has K + 1 steps. Steps 0 to K − 1 each add up some terms of the sums, in float32, chunk
by chunk. With the last chunk, step K − 1 also adds A, B and I, rounds once, writes the tile, and
transposes it: the matrix units hide this work. Step K writes the transposed tile. It reads nothing,
and its inputs belong to the next position: a step starts to fetch the inputs of the next one, so
that step K − 1, which is long, hides the fetch, and step K has none. Of a tile on the diagonal,
three of four blocks are computed. A full product has all tiles, and no step K. Its last column of
tiles is as narrow as the matrix, in steps of 128.

The cores of a chip share the positions. Tiles at the right and lower edges may be partial: what
they have outside of the matrix is garbage, which is dropped. In the last terms of the sums it is
masked. The kernel has no derivative. On a CPU it is interpreted.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from muonclip_jax._orthogonalize.kernel_call import Form, Kernel, call
from muonclip_jax._orthogonalize.tiles import Tiles
from muonclip_jax._orthogonalize.tpu_call import call_in_hbm
from muonclip_jax._orthogonalize.tpu_kernel_step import (
    LANES,
    ROWS,
    ProductShape,
    kernel_step,
)

# The kernel must not use all of the fast memory that it is given.
_SPARE_BYTES = 2**22


def full_product(
    c: Any, A: jax.Array, B: jax.Array, terms: Sequence[tuple[Any, jax.Array]], tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """Computes c A B + Σ a C.

    Args:
      c: A number, or one for each matrix, `[..., 1, 1]`.
      A: `[..., n, k]`, bfloat16 or float32.
      B: `[..., k, m]`, in the dtype of A.
      terms: Each (a, C): a like c, C `[..., n, m]` in the dtype of A.
      tiles: How the result is cut.

    Returns:
      `[..., n, m]` in the dtype of A, summed in float32 and rounded once; and the sum of its
      squares before it is rounded, `[..., 1, 1]` in float32.
    """
    added = [(a, C) for a, C in terms if not (isinstance(a, float) and a == 0)]
    numbers = (*(a for a, _ in added), c)
    form = Form(tiles, "full_product", A.dtype)
    result, squares = call(_KERNEL, form, numbers, (A, B, *(C for _, C in added)))
    return result, jnp.sum(squares, axis=(-2, -1), keepdims=True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(
    form: Form, interpret: bool, numbers: jax.Array, *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """Lays out the kernel: numbers [count, 1 to 3], arrays [count, rows, columns]."""
    tiles, (count, n, terms) = form.tiles, arrays[0].shape
    m = n if form.is_symmetric else arrays[1].shape[-1]
    rows, columns = form.places(n, m)
    product = ProductShape(count, n, m, terms, len(rows), -(-terms // tiles.depth))
    out_specs, out_shapes = _results(form, product)
    totals = (jnp.float32, form.dtype) if form.is_symmetric else (jnp.float32,)
    itemsize = max(form.dtype.itemsize, arrays[0].dtype.itemsize)
    return call_in_hbm(
        functools.partial(kernel_step, form=form, product=product),
        (jnp.asarray(rows), jnp.asarray(columns), numbers.reshape(-1)),
        arrays,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(count * product.positions, product.K + form.is_symmetric),
            in_specs=_inputs(form, product, len(arrays) - 2),
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((tiles.side, tiles.side), dtype) for dtype in totals],
        ),
        out_shape=out_shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            # The checks take a third of the cycles that the pipeline of blocks needs in a step.
            disable_bounds_checks=True,
            disable_semaphore_checks=True,
            vmem_limit_bytes=tiles.vmem(itemsize, form.is_symmetric) + _SPARE_BYTES,
        ),
        cost_estimate=_cost(form, product, arrays),
        interpret=interpret,
        name=f"symmetric_{form.kind}" if form.is_symmetric else form.kind,
    )


_KERNEL = Kernel("tpu", _compiled)
gram_matrix, product = _KERNEL.gram_matrix, _KERNEL.product


def _inputs(form: Form, product: ProductShape, added: int) -> list[pl.BlockSpec]:
    """Returns the blocks of both factors and of the matrices that are added."""
    K, side = product.K, form.tiles.side
    depth = -(-form.tiles.depth // LANES) * LANES

    def block(shape: tuple[int, int], place: Callable[..., tuple[Any, Any]]) -> pl.BlockSpec:
        """A block of an input: of the next position, once this one has read all its terms."""

        def index_map(p, k, rows, columns, _):
            if form.is_symmetric:
                last = product.count * product.positions - 1
                p = jnp.where(k == K, jnp.minimum(p + 1, last), p)
                k = jnp.where(k == K, 0, k)
            matrix, at = product.divided(p)
            return (matrix, *place(rows[at], columns[at], k))

        return pl.BlockSpec((None, *shape), index_map)

    left = block((side, depth), lambda i, j, k: (i, k))
    if form.is_gram:
        right = block((side, depth), lambda i, j, k: (j, k))
    else:
        right = block((depth, side), lambda i, j, k: (k, j))
    return [left, right, *[block((side, side), lambda i, j, k: (i, j)) for _ in range(added)]]


def _results(form: Form, product: ProductShape) -> tuple[list[pl.BlockSpec], list[Any]]:
    """Returns the blocks of the results, and their shapes."""
    side, count = form.tiles.side, product.count

    def place(p, k, rows, columns, _):
        matrix, at = product.divided(p)
        i, j = rows[at], columns[at]
        if not form.is_symmetric:
            return matrix, i, j
        return matrix, jnp.where(k == product.K, j, i), jnp.where(k == product.K, i, j)

    specs = [pl.BlockSpec((None, side, side), place)]
    shapes = [jax.ShapeDtypeStruct((count, product.n, product.m), form.dtype)]
    if not form.is_symmetric:  # and sums of squares
        specs.append(pl.BlockSpec((None, ROWS, side), lambda p, *_: (*product.divided(p), 0)))
        sums = (count, product.positions * ROWS, side)
        shapes.append(jax.ShapeDtypeStruct(sums, jnp.float32))
    return specs, shapes


def _cost(form: Form, product: ProductShape, arrays: Sequence[jax.Array]) -> pl.CostEstimate:
    """Counts the FLOPs of all tiles, and the bytes that are fetched and written."""
    tiles, count, n, m, terms, positions, K = form.tiles, *product
    if form.is_symmetric:
        area = tiles.area(n)
    else:
        columns = (tiles.on_side(m) - 1) * tiles.side + tiles.edge(m)
        area = tiles.on_side(n) * tiles.side * columns
    # If all terms are fetched at once, the left block is fetched once for each row of tiles.
    fetched = 2 * positions if K > 1 else positions + tiles.on_side(n)
    numbers = fetched * tiles.side * terms + len(arrays[2:]) * positions * tiles.side**2
    return pl.CostEstimate(
        flops=2 * count * area * terms,
        bytes_accessed=count * (numbers * arrays[0].dtype.itemsize + n * m * form.dtype.itemsize),
        transcendentals=0,
    )

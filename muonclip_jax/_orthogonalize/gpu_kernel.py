"""Products that are symmetric, on NVIDIA GPUs: half of the tiles, in a Pallas kernel for Triton.

Two of the three products of a Newton-Schulz step are symmetric. A kernel computes the tiles on and
below the diagonal and writes each of the others as a transpose, in (t + 1) / 2t of the FLOPs for t
tiles a side. **Nobody has timed it**: it is compiled for H100 and checked in interpret mode.
`newton_schulz` does not use it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from muonclip_jax._common.dtypes import accumulator
from muonclip_jax._orthogonalize.symmetric import is_narrow

# Sides of a tile of the product, and columns that are multiplied at a time. 128 x 128 and 64
# columns in 3 stages use 96 of the 227 KiB of shared memory of an H100. All four are untimed.
TILE, DEPTH, WARPS, STAGES = 128, 64, 8, 3


@functools.partial(jax.jit, static_argnames=("tile", "depth", "interpret"))
def symmetric_product(
    A: jax.Array,
    B: jax.Array,
    C: jax.Array | None = None,
    *,
    b: Any = 1.0,
    c: Any = 1.0,
    tile: int = TILE,
    depth: int = DEPTH,
    interpret: bool = False,
) -> jax.Array:
    """Computes c A Bᵀ + b C, where A Bᵀ is symmetric: X Xᵀ, or A B of symmetric A, B that commute.

    Args:
      A: `[..., n, k]`.
      B: `[..., n, k]`; for A B of symmetric matrices pass B itself, which is its own transpose.
      C: `[..., n, n]`, symmetric; None adds nothing.
      b: Factor on C, a scalar.
      c: Factor on A Bᵀ, a scalar.
      tile: Rows and columns of a tile, a power of two from 16 on.
      depth: Columns of A and B that are multiplied at a time, a power of two from 16 on.
      interpret: Whether to run the kernel in interpret mode, on any platform.

    Returns:
      `[..., n, n]` in the dtype of A, summed in float32 and rounded once. Above the diagonal it is
      the transpose of what is below, bit for bit, but within tiles on the diagonal.

    Raises:
      ValueError: if shapes do not fit together.
      TypeError: if A and B, or C, have different dtypes, or one that is no bfloat16, float16 or
        float32.

    Example:
      >>> import jax.numpy as jnp
      >>> X = jnp.array([[1.0, 2.0], [3.0, 4.0]], jnp.bfloat16)
      >>> symmetric_product(X, X, tile=16, depth=16, interpret=True)
      Array([[5, 11],
             [11, 25]], dtype=bfloat16)
    """
    _check(A, B, C)
    *batch, n, k = A.shape
    arrays = [x for x in (A, B, C) if x is not None]
    stacks = [x.reshape(math.prod(batch), *x.shape[-2:]) for x in arrays]
    tiles = np.stack(np.tril_indices(pl.cdiv(n, tile))).astype(np.int32)
    factors = jnp.stack([jnp.asarray(c, jnp.float32), jnp.asarray(b, jnp.float32)])
    call = pl.pallas_call(
        functools.partial(_tile_of_product, k=k, n=n, tile=tile, depth=depth),
        out_shape=jax.ShapeDtypeStruct((math.prod(batch), n, n), A.dtype),
        grid=(tiles.shape[1], math.prod(batch)),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="symmetric_product",
    )
    return call(jnp.asarray(tiles), factors, *stacks).reshape(*batch, n, n)


def _check(A: jax.Array, B: jax.Array, C: jax.Array | None) -> None:
    expected = (*A.shape[:-1], A.shape[-2]) if A.ndim > 1 else None
    if expected is None or B.shape != A.shape or (C is not None and C.shape != expected):
        shapes = ", ".join(str(x.shape) for x in (A, B, C) if x is not None)
        raise ValueError(
            f"symmetric_product: got A, B, C of shapes {shapes}, expected [..., n, k] for A and B"
            " and [..., n, n] for C."
        )
    dtypes = {x.dtype.name for x in (A, B, C) if x is not None}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16", "float32"}:
        raise TypeError(
            f"symmetric_product: got {', '.join(sorted(dtypes))}, expected one of bfloat16,"
            " float16, float32 for all arrays; cast them first."
        )


def _tile_of_product(
    tiles: Any, factors: Any, A: Any, B: Any, *rest: Any, n: int, k: int, tile: int, depth: int
) -> None:
    """Computes one tile on or below the diagonal, and writes it and its transpose."""
    *C, out = rest
    which, matrix = pl.program_id(0), pl.program_id(1)
    i, j = tiles[0, which], tiles[1, which]
    rows, columns = (at * tile + jnp.arange(tile) for at in (i, j))

    def load(x: Any, first: jax.Array, second: jax.Array, width: int) -> jax.Array:
        inside = (first < n)[:, None] & (second < width)[None, :]
        return plgpu.load(x.at[matrix, first[:, None], second[None, :]], mask=inside, other=0.0)

    def add_product(step: jax.Array, total: jax.Array) -> jax.Array:
        inner = step * depth + jnp.arange(depth)
        return total + jax.lax.dot_general(
            load(A, rows, inner, k),
            load(B, columns, inner, k),
            (((1,), (1,)), ((), ())),
            precision=None if is_narrow(A.dtype) else jax.lax.Precision.HIGHEST,  # no TF32
            preferred_element_type=total.dtype,
        )

    total = jnp.zeros((tile, tile), accumulator(A.dtype))
    total = factors[0] * jax.lax.fori_loop(0, pl.cdiv(k, depth), add_product, total)
    if C:
        total += factors[1] * load(C[0], rows, columns, n).astype(total.dtype)
    block, inside = total.astype(out.dtype), (rows < n)[:, None] & (columns < n)[None, :]
    plgpu.store(out.at[matrix, rows[:, None], columns[None, :]], block, mask=inside)
    above = inside.T & (i != j)
    plgpu.store(out.at[matrix, columns[:, None], rows[None, :]], block.T, mask=above)

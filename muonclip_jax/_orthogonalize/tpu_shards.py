"""Passes over the memory of a TPU between an exchange of shards and Newton-Schulz.

    normalized     shards -> X = x / ‖x‖     reads the shards twice, and writes the matrix
    taken_apart    X -> shards

XLA needs six passes for the first: it reads for the largest magnitude, reads for the norm, reads
and writes to divide, and reads and writes to assemble the shards. Here every block of a shard moves
through fast memory to its place in the matrix, and is scaled, rounded and transposed on the way.

The sum of squares of a matrix as it is would overflow at 1e19 and vanish at 1e-23 in float32. So
the first pass computes three sums, each of which is accurate for other magnitudes, beside the
largest magnitude, which selects one of them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from muonclip_jax._common.types import Scalar
from muonclip_jax._orthogonalize.kernel_call import Kernel, run_on_stack
from muonclip_jax._orthogonalize.tpu_kernel_step import LANES, ROWS

# Rows of a register of bfloat16.
_ROWS_OF_SIXTEEN_BITS = 16
# Numbers in a block, and in a row of it.
_BLOCK, _ROW = 2**18, 2**13
# The factors of the three sums of squares, and the magnitudes between which the second is accurate:
# then neither 2²⁸ squares of the largest overflow, nor those of 2⁻²⁸ times the largest vanish.
_FACTORS = (2.0**80, 1.0, 2.0**-80)
_SMALL, _LARGE = 2.0**-35, 2.0**48
# See `newton_schulz._SHIFT`.
_SHIFT = 2.0**64


class _Pass(NamedTuple):
    """One pass.

    Attributes:
      kind: "sums", "assembled" or "taken_apart".
      grid: Shards above each other, R, and beside each other, C.
      transposed: Whether the matrix is the transpose of what the shards are of.
    """

    kind: str
    grid: tuple[int, int]
    transposed: bool = False


class _Blocks(NamedTuple):
    """How shards of height x width are cut."""

    rows: int
    columns: int
    height: int
    width: int

    @property
    def counts(self) -> tuple[int, int]:
        """Counts the blocks above each other and beside each other."""
        return self.height // self.rows, self.width // self.columns


def fits(height: int, width: int) -> bool:
    """Whether shards consist of blocks, which start at multiples of the registers."""
    return height % LANES == 0 and width % LANES == 0


def normalized(
    shards: jax.Array, grid: tuple[int, int], eps: Scalar, transposed: bool = False
) -> jax.Array:
    """Divides each matrix by its Frobenius norm, at any scale; zero stays zero.

    Args:
      shards: `[count, R C, m / R, n / C]`, sides that `fits` accepts.
      grid: R and C.
      eps: Added to the norm of a matrix whose largest magnitude has been made one.
      transposed: Whether to return the transposes.

    Returns:
      `[count, m, n]`, or `[count, n, m]` if transposed, in the dtype of the shards.
    """
    largest, sums = _run(_Pass("sums", grid), shards)
    largest = jnp.max(largest, axis=(-2, -1))
    sums = jnp.sum(sums, axis=(-2, -1))
    which = jnp.where(largest < _SMALL, 0, jnp.where(largest > _LARGE, 2, 1))
    factor = jnp.asarray(_FACTORS, sums.dtype)[which]
    squares = jnp.take_along_axis(sums, which[:, None], axis=1)[:, 0]
    norm = jnp.sqrt(squares) / _nonzero(largest * factor) + eps
    shift = jnp.where(largest > 1, 1 / _SHIFT, _SHIFT).astype(largest.dtype)
    numbers = jnp.stack([shift, 1 / (_nonzero(largest * shift) * _nonzero(norm))], axis=1)
    return _run(_Pass("assembled", grid, transposed), shards, numbers)[0]


def taken_apart(X: jax.Array, grid: tuple[int, int], transposed: bool = False) -> jax.Array:
    """Splits `[count, m, n]` matrices into `[count, R C, m / R, n / C]` shards.

    If transposed, the matrices are `[count, n, m]`.
    """
    return _run(_Pass("taken_apart", grid, transposed), X)[0]


def _run(form: _Pass, x: jax.Array, numbers: jax.Array | None = None) -> tuple[jax.Array, ...]:
    numbers = jnp.zeros((len(x), 1), jnp.float32) if numbers is None else numbers
    return run_on_stack(_KERNEL, form, numbers, (x,))


def _compiled(
    form: _Pass, interpret: bool, numbers: jax.Array, x: jax.Array
) -> tuple[jax.Array, ...]:
    """Lays out a pass: numbers [count, 1 or 2]."""
    R, C = form.grid
    if form.kind == "taken_apart":
        m, n = x.shape[:0:-1] if form.transposed else x.shape[1:]
        height, width = m // R, n // C
    else:
        height, width = x.shape[2:]
    cut = _cut(height, width, form.transposed)
    if form.kind == "sums":
        return _sums(x, cut, interpret)
    count, (above, beside) = len(x), cut.counts
    shards = pl.BlockSpec(
        (None, None, cut.rows, cut.columns), lambda i, r, c, a, b, _: (i, r * C + c, a, b)
    )
    block = (cut.columns, cut.rows) if form.transposed else (cut.rows, cut.columns)

    def place(i, r, c, a, b, _):
        row, column = r * above + a, c * beside + b
        return (i, column, row) if form.transposed else (i, row, column)

    matrices = pl.BlockSpec((None, *block), place)
    sides = (R * height, C * width)
    shapes = (count, *(sides[::-1] if form.transposed else sides)), (count, R * C, height, width)
    specs, shapes = (shards, matrices), (shapes[0], shapes[1])
    if form.kind == "taken_apart":
        specs, shapes = specs[::-1], shapes[::-1]
    run = pl.pallas_call(
        functools.partial(_move, form=form),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(count, R, C, above, beside),
            in_specs=[specs[0]],
            out_specs=[specs[1]],
        ),
        out_shape=[jax.ShapeDtypeStruct(shapes[0], x.dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 5),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=2 * x.nbytes, transcendentals=0),
        interpret=interpret,
        name=form.kind,
    )
    return tuple(run(numbers.reshape(-1), x))


def _move(numbers, source, target, *, form: _Pass) -> None:
    """Moves a block to its place."""
    x = source[...]
    if form.kind == "assembled":
        shift, factor = (numbers[2 * pl.program_id(0) + index] for index in range(2))
        x = (x.astype(jnp.float32) * shift * factor).astype(x.dtype)
    target[...] = x.T if form.transposed else x


def _sums(x: jax.Array, cut: _Blocks, interpret: bool) -> tuple[jax.Array, ...]:
    """Computes the largest magnitude of each matrix, and sums of squares, for eight rows each."""
    count, shards = x.shape[:2]

    def whole(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda i, *_: (i, *(0 for _ in shape)))

    shape = ROWS, LANES
    shapes = shape, (len(_FACTORS), *shape)
    run = pl.pallas_call(
        _add_squares,
        grid=(count, shards, *cut.counts),
        in_specs=[
            pl.BlockSpec((None, None, cut.rows, cut.columns), lambda i, s, a, b: (i, s, a, b))
        ],
        out_specs=[whole(*shape) for shape in shapes],
        out_shape=[jax.ShapeDtypeStruct((count, *shape), jnp.float32) for shape in shapes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=0, bytes_accessed=x.nbytes, transcendentals=0
        ),
        interpret=interpret,
        name="sums",
    )
    return tuple(run(x))


def _add_squares(source, largest, sums) -> None:
    """Adds a block to the sums."""
    ids = [pl.program_id(axis) for axis in (1, 2, 3)]

    @pl.when((ids[0] == 0) & (ids[1] == 0) & (ids[2] == 0))
    def _start():
        largest[...], sums[...] = jnp.zeros_like(largest), jnp.zeros_like(sums)

    top, totals = largest[...], [sums[index] for index in range(len(_FACTORS))]
    for start in range(0, source.shape[1], LANES):
        x = jnp.abs(source[:, start : start + LANES].astype(jnp.float32)).reshape(-1, ROWS, LANES)
        top = jnp.maximum(top, jnp.max(x, axis=0))
        scaled = [x * factor for factor in _FACTORS]
        totals = [t + jnp.sum(y * y, axis=0) for t, y in zip(totals, scaled, strict=True)]
    largest[...] = top
    for index, total in enumerate(totals):
        sums[index] = total


_KERNEL = Kernel("tpu", jax.jit(_compiled, static_argnums=(0, 1)))


def _cut(height: int, width: int, transposed: bool) -> _Blocks:
    """Cuts shards into blocks of similar size."""
    columns = _divisor(width, LANES, _ROW)
    rows = _divisor(height, LANES if transposed else _ROWS_OF_SIXTEEN_BITS, _BLOCK // columns)
    return _Blocks(rows, columns, height, width)


def _divisor(size: int, unit: int, limit: int) -> int:
    """Returns the largest divisor of a size that is a multiple of a unit, up to a limit."""
    return max((d for d in range(unit, min(size, limit) + 1, unit) if size % d == 0), default=unit)


def _nonzero(x: jax.Array) -> jax.Array:
    """Replaces what is not above zero by one, so that it can be a divisor."""
    return jnp.where(x > 0, x, jnp.ones_like(x))

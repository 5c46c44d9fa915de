"""Passes over memory between an exchange of shards and Newton-Schulz, on TPU.

    normalized      shards -> X = x / ‖x‖      reads the shards twice, and writes X
    taken_apart     X -> shards                reads X, and writes the shards

A block of a shard moves through fast memory to its place in the matrix. On the way it is scaled,
rounded, and transposed where the matrix is the transpose of what is sharded. XLA needs more passes:
it reads x for its largest magnitude and for its norm, divides it, and assembles and transposes it
in copies of their own.

In float32 a sum of squares overflows above 1e19 and vanishes below 1e-23. So the first pass adds up
the squares of x, of 2⁸⁰ x and of 2⁻⁸⁰ x, and the largest magnitude selects one of the three sums.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from muonclip_jax._common.types import Scalar
from muonclip_jax._orthogonalize.divisors import SHIFT, nonzero
from muonclip_jax._orthogonalize.kernel_call import Kernel, run_on_stack
from muonclip_jax._orthogonalize.tpu_call import call_in_hbm
from muonclip_jax._orthogonalize.tpu_kernel_step import LANES, ROWS

# Rows of a register of bfloat16.
_ROWS_OF_SIXTEEN_BITS = 16
# Most numbers in a block, and in a row of it.
_BLOCK, _ROW = 2**18, 2**13
# The factors of x, and the largest magnitudes between which the second is chosen. Then 2²⁸ squares
# do not overflow, and only numbers below 2⁻²⁸ of the largest magnitude are lost.
_FACTORS = (2.0**80, 1.0, 2.0**-80)
_SMALL, _LARGE = 2.0**-35, 2.0**48


class _Pass(NamedTuple):
    """One pass.

    Attributes:
      kind: "sums_of_squares", "assembled" or "taken_apart".
      grid: Shards along the rows, R, and along the columns, C, of what is sharded.
      transposed: Whether matrices are the transposes of what is sharded.
    """

    kind: str
    grid: tuple[int, int]
    transposed: bool = False


def fits(height: int, width: int) -> bool:
    """Whether shards of height x width consist of blocks of full registers."""
    return height > 0 and width > 0 and height % LANES == 0 and width % LANES == 0


def normalized(
    shards: jax.Array, grid: tuple[int, int], eps: Scalar, transposed: bool = False
) -> jax.Array:
    """Assembles matrices, and divides each by its Frobenius norm; zero stays zero.

    Args:
      shards: `[count, R C, m / R, n / C]`, sides that `fits` accepts, bfloat16 or float32.
      grid: R and C.
      eps: Added to the norm, after the largest magnitude has been made one.
      transposed: Whether to return the transposes.

    Returns:
      `[count, m, n]`, or `[count, n, m]` if transposed, in the dtype of the shards.
    """
    ignored = jnp.zeros((len(shards), 1), jnp.float32)
    tops, sums = run_on_stack(_KERNEL, _Pass("sums_of_squares", grid), ignored, (shards,))
    largest, sums = jnp.max(tops, axis=(1, 3, 4))[:, 0], jnp.sum(sums, axis=(1, 3, 4))
    which = (largest >= _SMALL).astype(jnp.int32) + (largest > _LARGE).astype(jnp.int32)
    factor = jnp.asarray(_FACTORS, sums.dtype)[which]
    squares = jnp.take_along_axis(sums, which[:, None], axis=1)[:, 0]
    norm = jnp.sqrt(squares) / nonzero(largest * factor) + jnp.asarray(eps, sums.dtype)
    # x / (largest · norm), without a product or a reciprocal that is subnormal.
    shift = jnp.where(largest > 1, 1 / SHIFT, SHIFT).astype(sums.dtype)
    factors = jnp.stack([shift, 1 / (nonzero(largest * shift) * nonzero(norm))], axis=1)
    return run_on_stack(_KERNEL, _Pass("assembled", grid, transposed), factors, (shards,))[0]


def taken_apart(X: jax.Array, grid: tuple[int, int], transposed: bool = False) -> jax.Array:
    """Splits matrices into shards: the shapes of `normalized`, the other way round."""
    ignored = jnp.zeros((len(X), 1), jnp.float32)
    return run_on_stack(_KERNEL, _Pass("taken_apart", grid, transposed), ignored, (X,))[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(
    form: _Pass, interpret: bool, numbers: jax.Array, x: jax.Array
) -> tuple[jax.Array, ...]:
    """Lays out a pass: numbers [count, 1 or 2], x [count, R C, height, width] or matrices."""
    R, C = form.grid
    if form.kind == "taken_apart":
        m, n = x.shape[:0:-1] if form.transposed else x.shape[1:]
        shards = len(x), R * C, m // R, n // C
    else:
        shards = x.shape
    *_, height, width = shards
    block = block_of(height, width, form.transposed)
    if form.kind == "sums_of_squares":
        return _sums_of_squares(x, block, interpret)
    return (_moved(form, interpret, numbers, x, shards, block),)


_KERNEL = Kernel("tpu", _compiled)


def _moved(
    form: _Pass,
    interpret: bool,
    numbers: jax.Array,
    x: jax.Array,
    shards: tuple[int, ...],
    block: tuple[int, int],
) -> jax.Array:
    """Moves each block of shards of a shape to its place in a matrix, or back."""
    (R, C), (count, _, height, width), (rows, columns) = form.grid, shards, block
    above, beside = height // rows, width // columns  # blocks of a shard

    def in_shards(p, r, c, i, j, _):
        return p, r * C + c, i, j

    def in_matrices(p, r, c, i, j, _):
        i, j = r * above + i, c * beside + j
        return (p, j, i) if form.transposed else (p, i, j)

    def turned(row, column):
        return (column, row) if form.transposed else (row, column)

    matrices = count, *turned(R * height, C * width)
    specs = [
        pl.BlockSpec((None, None, *block), in_shards),
        pl.BlockSpec((None, *turned(*block)), in_matrices),
    ]
    is_back = form.kind == "taken_apart"
    (source, target), shape = reversed(specs) if is_back else specs, shards if is_back else matrices
    return call_in_hbm(
        functools.partial(_move, form=form),
        (numbers.reshape(-1),),
        (x,),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(count, R, C, above, beside),
            in_specs=[source],
            out_specs=[target],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, x.dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 5),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=2 * x.nbytes, transcendentals=0),
        interpret=interpret,
        name=form.kind,
    )[0]


def _move(numbers, source, target, *, form: _Pass) -> None:
    """Moves one block."""
    x = source[...]
    if form.kind == "assembled":
        shift, factor = (numbers[2 * pl.program_id(0) + index] for index in range(2))
        x = (x.astype(jnp.float32) * shift * factor).astype(x.dtype)
    target[...] = x.T if form.transposed else x


def _sums_of_squares(
    x: jax.Array, block: tuple[int, int], interpret: bool
) -> tuple[jax.Array, ...]:
    """Finds the largest magnitude and the sums of each shard, for each place in a register."""
    count, shards, height, width = x.shape
    results = [(sums, ROWS, LANES) for sums in (1, len(_FACTORS))]
    return call_in_hbm(
        _add_squares,
        (),
        (x,),
        grid=(count, shards, height // block[0], width // block[1]),
        in_specs=[pl.BlockSpec((None, None, *block), lambda p, s, i, j: (p, s, i, j))],
        out_specs=[
            pl.BlockSpec((None, None, *shape), lambda p, s, i, j: (p, s, 0, 0, 0))
            for shape in results
        ],
        out_shape=[jax.ShapeDtypeStruct((count, shards, *shape), jnp.float32) for shape in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=x.nbytes, transcendentals=0),
        interpret=interpret,
        name="sums_of_squares",
    )


def _add_squares(source, largest, sums) -> None:
    """Adds one block."""

    @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def _start():
        largest[...], sums[...] = jnp.zeros_like(largest), jnp.zeros_like(sums)

    top, totals = largest[0], [sums[index] for index in range(len(_FACTORS))]
    for start in range(0, source.shape[1], LANES):
        x = source[:, start : start + LANES].astype(jnp.float32).reshape(-1, ROWS, LANES)
        top = jnp.maximum(top, jnp.max(jnp.abs(x), axis=0))
        for index, factor in enumerate(_FACTORS):
            scaled = x if factor == 1 else x * factor
            totals[index] += jnp.sum(scaled * scaled, axis=0)
    largest[0] = top
    for index, total in enumerate(totals):
        sums[index] = total


def block_of(height: int, width: int, transposed: bool) -> tuple[int, int]:
    """Cuts shards into blocks: the rows and columns of one."""
    columns = _largest_divisor(width, LANES, _ROW)
    unit = LANES if transposed else _ROWS_OF_SIXTEEN_BITS
    return _largest_divisor(height, unit, _BLOCK // columns), columns


def _largest_divisor(size: int, unit: int, limit: int) -> int:
    """Returns the largest divisor that is a multiple of a unit, up to a limit; at least a unit."""
    return max(d for d in range(unit, max(limit, unit) + 1, unit) if size % d == 0)

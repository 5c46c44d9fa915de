"""Symmetric products on NVIDIA GPUs: half of the tiles are computed, and each is written twice.

    gram_matrix     X Xᵀ − r I
    product         a A + b B + c A B       A and B symmetric, and they commute

The functions of `tpu_kernel.py`, in a Pallas kernel for Triton. A program computes one tile, on or
above the diagonal, and writes it to its place and, transposed, to the mirrored place.
Numbers outside of the matrix are loaded as zero, and not stored. `side` and `chunk` of the tiles
are powers of two from 16 on.

**Nobody has timed it.** It is compiled for H100 (`tests/sharding/test_gpu_aot.py`), and interpreted
on a CPU. JAX has deprecated Pallas' Triton backend, and warns when it compiles the kernel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from muonclip_jax._orthogonalize.kernel_call import Form, Kernel

# Untimed. 128 x 128 tiles with 64 terms at a time, in 3 stages, use 96 of the 227 KiB of shared
# memory of an H100, so that two programs may run at the same time.
_WARPS, _STAGES = 8, 3


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(
    form: Form, interpret: bool, numbers: jax.Array, *arrays: jax.Array
) -> tuple[jax.Array]:
    """Lays out the kernel: numbers [count, 1 to 3], arrays [count, n, n or m]."""
    count, n, m = arrays[0].shape
    places = np.stack(form.places(n, n))
    run = pl.pallas_call(
        functools.partial(_kernel, form=form, n=n, m=m),
        out_shape=jax.ShapeDtypeStruct((count, n, n), form.dtype),
        grid=(count, places.shape[1]),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        cost_estimate=pl.CostEstimate(
            flops=int(2 * count * form.tiles.area(n) * m),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays)
            + count * n**2 * form.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name=f"symmetric_{form.kind}",
    )
    return (run(jnp.asarray(places), numbers, *arrays),)


_KERNEL = Kernel("cuda", _compiled)
gram_matrix, product = _KERNEL.gram_matrix, _KERNEL.product


def _kernel(places: Any, numbers: Any, *refs: Any, form: Form, n: int, m: int) -> None:
    """Computes one tile on or above the diagonal, and writes it and its transpose."""
    left, right, *added, out = refs
    matrix, position = pl.program_id(0), pl.program_id(1)
    side, chunk = form.tiles.side, form.tiles.chunk
    i, j = places[0, position], places[1, position]
    rows, columns = (at * side + jnp.arange(side) for at in (i, j))

    def load(x: Any, first: jax.Array, second: jax.Array) -> jax.Array:
        inside = (first < x.shape[1])[:, None] & (second < x.shape[2])[None, :]
        return plgpu.load(x.at[matrix, first[:, None], second[None, :]], mask=inside, other=0.0)

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        terms = step * chunk + jnp.arange(chunk)
        # X[i, :] X[j, :]ᵀ or A[i, :] B[:, j], as B is its own transpose only up to rounding.
        B = load(right, columns, terms) if form.is_gram else load(right, terms, columns)
        A, terms_axis = load(left, rows, terms), 1 if form.is_gram else 0
        # HIGHEST: a GPU would round float32 factors to TF32 by default.
        precision = jax.lax.Precision.HIGHEST if A.dtype == jnp.float32 else None
        dimensions = (((1,), (terms_axis,)), ((), ()))
        return total + jax.lax.dot_general(
            A, B, dimensions, precision=precision, preferred_element_type=jnp.float32
        )

    total = jax.lax.fori_loop(0, pl.cdiv(m, chunk), add, jnp.zeros((side, side), jnp.float32))
    if form.is_gram:
        total -= numbers[matrix, 0] * (rows[:, None] == columns[None, :])
    else:
        total *= numbers[matrix, len(added)]
        for index, x in enumerate(added):
            total += numbers[matrix, index] * load(x, rows, columns).astype(total.dtype)
    tile, inside = total.astype(out.dtype), (rows < n)[:, None] & (columns < n)[None, :]
    plgpu.store(out.at[matrix, rows[:, None], columns[None, :]], tile, mask=inside)
    mirrored = inside.T & (i != j)
    plgpu.store(out.at[matrix, columns[:, None], rows[None, :]], tile.T, mask=mirrored)

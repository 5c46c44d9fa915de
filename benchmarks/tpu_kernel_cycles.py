"""The symmetric-product kernel against XLA's products, by the cycles that the TPU compiler counts.

    pip install "muonclip-jax[tpu]"
    python -m benchmarks.tpu_kernel_cycles

Writes results/tpu_kernel_cycles.json. For each generation of TPUs and each product: the estimated
cycles of the kernel with every candidate of its tiles (see `kernel_cycles.py`), and those of XLA's
program for the same expression, which are the compiler's own. No TPU is needed, and none was at
hand. `muonclip_jax/_orthogonalize/tiles.py` has the tiles with the fewest cycles.
"""

import functools
import os
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from benchmarks import aot, report, tpu
from benchmarks.compiled import compiled_cost
from benchmarks.kernel_cycles import CHIPS, Chip, Product, estimate, newest_dump, read_regions
from muonclip_jax._orthogonalize import tpu_kernel
from muonclip_jax._orthogonalize.tiles import Tiles


def xla(product: Product, numbers: Any, A: jax.Array, B: jax.Array) -> jax.Array:
    """Computes a product without the kernel: sums in float32, rounded once."""
    right = A.mT if product.kind == "gram" else A if product.kind == "square" else B
    total = jnp.matmul(A, right, preferred_element_type=jnp.float32)
    a, b, c = numbers
    if product.kind == "gram":
        return (total - a * jnp.eye(product.n)).astype(A.dtype)
    total = a * A.astype(jnp.float32) + c * total
    if product.kind == "product":
        total += b * B.astype(jnp.float32)
    return total.astype(A.dtype)


def kernel(product: Product, tiles: Tiles, numbers: Any, A: jax.Array, B: jax.Array) -> jax.Array:
    """Computes the same with the kernel."""
    a, b, c = numbers
    if product.kind == "gram":
        return tpu_kernel.gram_matrix(A, a, tiles)
    if product.kind == "square":
        return tpu_kernel.product(a, A, 0.0, A, c, tiles)
    return tpu_kernel.product(a, A, b, B, c, tiles)


def compiled(f: Any, product: Product, chip: Chip) -> tuple[Any, float]:
    """Compiles for one device; also returns the processor time."""
    sharding = NamedSharding(Mesh(np.array(tpu.topology_devices(chip.topology)[:1]), ("x",)), P())
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    X = shape((product.n, product.m), product.dtype)
    numbers = (shape((), jnp.float32),) * 3
    lowered = jax.jit(functools.partial(f)).lower(numbers, X, X)
    start = time.process_time()
    return lowered.compile(), time.process_time() - start

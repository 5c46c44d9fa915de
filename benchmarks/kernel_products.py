"""Products of Newton-Schulz, by a kernel and by XLA: computed, checked and timed."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from muonclip_jax._orthogonalize import tiles
from muonclip_jax._orthogonalize.tiles import Tiles

BFLOAT16 = 2  # bytes
CALLS = 20  # products in a timed program, so that starting it does not count
REPEATS = 7
# Numbers are of the order of one. The result is rounded once, and so is the reference.
LARGEST_ERROR = 2.0**-7
NUMBERS = (0.5, 0.25, -0.75)


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of one matrix, in bfloat16.

    Attributes:
      kind: `"gram"`, X Xᵀ − r I; `"square"`, a A + c A A; `"product"`, a A + b B + c A B;
        `"full"`, a X + c A X and the sum of its squares, of which the next X Xᵀ has need.
      n: Short side.
      m: Long side; n except for `"gram"` and `"full"`.
    """

    kind: str
    n: int
    m: int

    @property
    def added(self) -> int:
        """Matrices in the sum with A B."""
        return {"gram": 0, "square": 1, "product": 2, "full": 1}[self.kind]

    @property
    def shape(self) -> tiles.Shape:
        """The product for `tiles.cycles`."""
        if self.kind == "full":
            return tiles.Shape(self.n, self.m, self.n, BFLOAT16, False, self.added)
        return tiles.Shape(self.n, self.n, self.m, BFLOAT16, True, self.added)

    def cut(self, kind: str) -> Tiles | None:
        """The tiles that are used on a kind of device; None where XLA's product is."""
        if self.kind == "full":
            return tiles.fastest_full(self.n, self.m, self.n, BFLOAT16, kind)
        return tiles.fastest(self.n, self.m, BFLOAT16, kind)


def by_xla(product: Product, numbers: Any, A: jax.Array, B: jax.Array) -> jax.Array:
    """Computes a product without the kernel: sums in float32, rounded once."""
    a, b, c = numbers
    right = {"gram": A.mT, "square": A, "product": B, "full": B}[product.kind]
    total = jnp.matmul(A, right, preferred_element_type=jnp.float32)
    if product.kind == "gram":
        return (total - a * jnp.eye(product.n)).astype(A.dtype)
    added = B if product.kind == "full" else A
    total = a * added.astype(jnp.float32) + c * total
    if product.kind == "product":
        total += b * B.astype(jnp.float32)
    return total.astype(A.dtype)


def by_kernel(
    kernel: Any, product: Product, cut: Tiles, numbers: Any, A: jax.Array, B: jax.Array
) -> jax.Array:
    """Computes the same with a kernel: the module `tpu_kernel` or `gpu_kernel`."""
    a, b, c = numbers
    if product.kind == "gram":
        return kernel.gram_matrix(A, a, cut)
    if product.kind == "square":
        return kernel.product(a, A, 0.0, A, c, cut)
    if product.kind == "full":
        return kernel.full_product(c, A, B, [(a, B)], cut)[0]
    return kernel.product(a, A, b, B, c, cut)


def arrays(product: Product) -> tuple[jax.Array, jax.Array]:
    """Makes random factors in bfloat16: symmetric ones that commute, or X twice."""
    rng = np.random.default_rng(0)
    if product.kind == "gram":
        X = jnp.asarray(rng.normal(size=(product.n, product.m)) / math.sqrt(product.m))
        return X.astype(jnp.bfloat16), X.astype(jnp.bfloat16)
    if product.kind == "full":
        X = jnp.asarray(rng.normal(size=(product.n, product.m)), jnp.bfloat16)
        A = rng.normal(size=(product.n, product.n)) / math.sqrt(product.n)
        return jnp.asarray(A, jnp.bfloat16), X
    # Circulant matrices commute, and are symmetric if their first row is.
    first = rng.normal(size=(2, product.n)) / math.sqrt(product.n)
    first = (first + np.roll(first[:, ::-1], 1, axis=1)) / 2
    shifts = (np.arange(product.n)[None, :] - np.arange(product.n)[:, None]) % product.n
    A, B = (jnp.asarray(row[shifts], jnp.bfloat16) for row in first)
    return A, B


def error(product: Product, f: Callable[..., jax.Array]) -> float:
    """Returns the largest error of a product, as a fraction of its largest number."""
    A, B = arrays(product)
    wide = functools.partial(by_xla, product)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(wide)(NUMBERS, A.astype(jnp.float32), B.astype(jnp.float32))
    difference = jax.jit(f)(NUMBERS, A, B).astype(jnp.float32) - expected
    return float(jnp.abs(difference).max() / jnp.abs(expected).max())


def wrong(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names the products of a table whose `error` is too large."""
    bad = (row for row in rows if not row["error"] <= LARGEST_ERROR)
    return [f"{row['kind']} {row['n']} x {row['m']}" for row in bad]


def repeated(f: Callable[..., jax.Array]) -> Any:
    """Compiles a program of `CALLS` products, each of which waits for the one before."""

    def run(numbers, A, B):
        def again(_, before):
            result = jax.lax.optimization_barrier(f((numbers[0] + before, *numbers[1:]), A, B))
            return result[0, 0].astype(jnp.float32) * 0.0

        return jax.lax.fori_loop(0, CALLS, again, 0.0)

    return jax.jit(run)


def median_seconds(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Times calls, interleaved, and returns the medians; the first calls are not timed."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(REPEATS + 1):
        for call, seconds in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[1:]) for seconds in taken]


def kernel_and_xla(product: Product, kernel: Callable[..., jax.Array]) -> list[float]:
    """Times `CALLS` products by the kernel, and by XLA: seconds of both."""
    operands = arrays(product)
    programs = [repeated(f) for f in (kernel, functools.partial(by_xla, product))]
    return median_seconds([lambda f=f: f(NUMBERS, *operands).block_until_ready() for f in programs])

"""Whether to use the symmetric-product kernel on the attached TPU: two minutes, one line of advice.

    pip install "muonclip-jax[tpu]"
    python -m benchmarks.tpu_kernel

Checks the numbers of the kernel on the chip, times it against XLA's product for the shapes of
`tpu_kernel_cycles`, prints a table beside the ratios that the compiler's cycles predict, and writes
results/tpu_kernel.json. Nobody had a TPU when the kernel was written: please open an issue with the
table.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.tpu_kernel_cycles import PRODUCTS, Product, by_kernel, by_xla
from muonclip_jax._orthogonalize.tiles import CHIPS, DEFAULT_KIND, Tiles, cycles

CALLS = 20  # products in a timed program, so that starting it does not count
REPEATS = 7
# Numbers are of the order of one. The result is rounded once, and so is the reference.
LARGEST_ERROR = 2.0**-7
NUMBERS = (0.5, 0.25, -0.75)
QUICK = (Product("gram", 140, 200), Product("square", 140, 140), Product("product", 140, 140))
QUICK += (Product("full", 140, 200),)


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


def repeated(f: Callable[..., jax.Array]) -> Any:
    """Compiles a program of `CALLS` products, each of which waits for the one before."""

    def run(numbers, A, B):
        def again(_, before):
            result = jax.lax.optimization_barrier(f((numbers[0] + before, *numbers[1:]), A, B))
            return result[0, 0].astype(jnp.float32) * 0.0

        return jax.lax.fori_loop(0, CALLS, again, 0.0)

    return jax.jit(run)


def ratio(product: Product, kernel: Callable[..., jax.Array]) -> float:
    """Times the kernel and XLA's product, interleaved; returns the ratio of their medians."""
    programs = [repeated(f) for f in (kernel, functools.partial(by_xla, product))]
    times: list[list[float]] = [[], []]
    operands = arrays(product)
    for _ in range(REPEATS + 1):  # the first run compiles
        for program, taken in zip(programs, times, strict=True):
            start = time.perf_counter()
            program(NUMBERS, *operands).block_until_ready()
            taken.append(time.perf_counter() - start)
    mine, other = (statistics.median(taken[1:]) for taken in times)
    return mine / other


def measure(product: Product, kind: str, cut: Tiles) -> dict[str, Any]:
    """Checks and times one product."""
    chip = CHIPS[kind]
    kernel = functools.partial(by_kernel, product, cut)
    row = dataclasses.asdict(product) | {"error": error(product, kernel), "tiles": tuple(cut)}
    sides = chip.full_sides if product.kind == "full" else chip.sides
    if cut.side in sides:
        row["cycles"] = cycles(product.shape, cut, sides[cut.side], chip)
    return row | {"kernel_by_xla": ratio(product, kernel)}


def advice(rows: list[dict[str, Any]]) -> str:
    """Returns one line: which products to use."""
    wrong = [row for row in rows if not row["error"] <= LARGEST_ERROR]
    if wrong:
        names = ", ".join(f"{row['kind']} {row['n']} x {row['m']}" for row in wrong)
        return f"Do not use the kernel: wrong numbers for {names}. Please open an issue."
    mean = math.exp(statistics.fmean(math.log(row["kernel_by_xla"]) for row in rows))
    choice = "pallas" if mean < 0.95 else "xla"
    return f"Use ns_products={choice!r}: the kernel takes {mean:.2f} of the time of XLA's products."


def main(arguments: list[str] | None = None) -> None:
    """Measures every product, prints a table and the advice, and writes the results."""
    parser = report.parser("tpu_kernel", "The symmetric-product kernel on the attached TPU.")
    parser.add_argument("--quick", action="store_true", help="tiny, interpreted: needs no TPU")
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    if device.platform != "tpu" and not options.quick:
        parser.error(f"this measures a TPU, got {device.platform}; --quick runs anywhere")
    results = report.provenance("tpu_kernel", machine=device.device_kind)
    kind = DEFAULT_KIND if options.quick else device.device_kind
    results["products"] = []
    for product in QUICK if options.quick else PRODUCTS:
        cut = Tiles(128, product.shape.terms, 128) if options.quick else product.cut(kind)
        if cut is None:  # XLA's product is used
            continue
        row = report.rounded(measure(product, kind, cut))
        print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
        results["products"].append(row)
    results["advice"] = advice(results["products"])
    report.write_json(options.out / "tpu_kernel.json", results)
    print(results["advice"])


if __name__ == "__main__":
    main()

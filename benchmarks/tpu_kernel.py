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
from typing import Any

import jax

from benchmarks import report
from benchmarks.kernel_products import Product, by_kernel, error, kernel_and_xla, wrong
from benchmarks.tpu_kernel_cycles import PRODUCTS
from muonclip_jax._orthogonalize import tpu_kernel
from muonclip_jax._orthogonalize.tiles import CHIPS, DEFAULT_KIND, Tiles, cycles

QUICK = (Product("gram", 140, 200), Product("square", 140, 140), Product("product", 140, 140))
QUICK += (Product("full", 140, 200),)


def measure(product: Product, kind: str, cut: Tiles) -> dict[str, Any]:
    """Checks and times one product."""
    chip = CHIPS[kind]
    kernel = functools.partial(by_kernel, tpu_kernel, product, cut)
    row = dataclasses.asdict(product) | {"error": error(product, kernel), "tiles": tuple(cut)}
    sides = chip.full_sides if product.kind == "full" else chip.sides
    if cut.side in sides:
        row["cycles"] = cycles(product.shape, cut, sides[cut.side], chip)
    mine, other = kernel_and_xla(product, kernel)
    return row | {"kernel_by_xla": mine / other}


def advice(rows: list[dict[str, Any]]) -> str:
    """Returns one line: which products to use."""
    if names := ", ".join(wrong(rows)):
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

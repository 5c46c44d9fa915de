"""The kernel of products against XLA's products, in cycles that the TPU compiler counts.

    pip install "muonclip-jax[tpu]"
    python -m benchmarks.tpu_kernel_cycles

Writes results/tpu_kernel_cycles.json, for each generation of TPUs: the cycles of each part of the
kernel, by the side of its tiles, read from the compiler's bundles; the bundles of the passes that
assemble shards; the estimate for each product that follows; and the compiler's own estimate for
XLA's program of the same expression.
`muonclip_jax/_orthogonalize/tiles.py` has the first, and computes the second. No TPU is needed, and
none has confirmed these figures.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from benchmarks import aot, report, tpu
from benchmarks.compiled import compiled_cost
from benchmarks.kernel_cycles import (
    DUMP_FLAGS,
    PASSES,
    bundles_of_block,
    newest_dump,
    read_regions,
)
from benchmarks.kernel_products import Product, by_kernel, by_xla
from muonclip_jax._orthogonalize import tiles, tpu_kernel, tpu_shards
from muonclip_jax._orthogonalize.tiles import CHIPS, Regions, Tiles

# A slice of each generation, and the candidates for symmetric and for full products: sides of
# tiles, with the terms of a chunk.
TOPOLOGIES = {
    "TPU v5 lite": ("v5e:2x2", {256: 1024, 512: 512}, {512: 512, 1024: 512}),
    "TPU v5": ("v5p:2x2x1", {256: 1024, 512: 512}, {512: 512, 1024: 512}),
    "TPU v6 lite": ("v6e:2x2", {512: 1024, 1024: 1024}, {512: 1024, 1024: 1024}),
    "TPU7x": ("tpu7x:2x2x1", {512: 1024, 1024: 1024}, {512: 1024, 1024: 1024}),
}
# Shards of the steps of `tpu_kernel_step`: R and C, height and width, whether they are transposed.
SHARDS = (((8, 2), 512, 5504, False), ((2, 8), 5504, 512, True), ((16, 4), 256, 1024, False))


PRODUCTS = (
    *(Product("square", n, n) for n in (512, 1024, 1536, 2048, 4096)),
    Product("gram", 1024, 4096),
    Product("gram", 2048, 7168),
    Product("gram", 4096, 11008),
    Product("product", 4096, 4096),
    *(Product("full", n, n) for n in (1024, 2048, 4096)),
    Product("full", 2048, 7168),
    Product("full", 4096, 11008),
)
# The cycles of the kernel's parts are read from these. Other symmetric products differ by a few.
SAMPLES = (Product("square", 4096, 4096), Product("full", 4096, 4096))


def with_squares(
    product: Product, numbers: Any, A: jax.Array, B: jax.Array
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes what the kernel does: a full product also has the sum of its squares."""
    result = by_xla(product, numbers, A, B)
    if product.kind != "full":
        return result
    return result, jnp.sum(result.astype(jnp.float32) ** 2)


def compiled(f: Callable[..., Any], product: Product, topology: str) -> tuple[Any, float]:
    """Compiles a product for one chip; also returns the processor time of the compiler."""
    mesh = Mesh(np.array(tpu.topology_devices(topology)[:1]), ("x",))
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P()))
    B = shape((product.n, product.m), jnp.bfloat16)
    A = shape((product.n, product.n), jnp.bfloat16) if product.kind == "full" else B
    lowered = jax.jit(f).lower((shape((), jnp.float32),) * 3, A, B)
    start = time.process_time()
    return lowered.compile(), time.process_time() - start


def regions_of(
    product: Product, side: int, chunk: int, topology: str, dump: pathlib.Path
) -> Regions:
    """Compiles the kernel, and reads the cycles of its parts."""
    cut = Tiles(side, 2 * chunk, chunk)
    compiled(functools.partial(by_kernel, tpu_kernel, product, cut), product, topology)
    found = read_regions(newest_dump(dump, "_product"), chunk)
    _empty(dump)
    return found


def _empty(dump: pathlib.Path) -> None:
    """Deletes the dumps of a program: hundreds of megabytes."""
    for file in dump.iterdir():
        file.unlink()


def measure_passes(kind: str, dump: pathlib.Path) -> dict[str, float]:
    """Reads the bundles of each pass of `tpu_shards` for 1024 numbers, the most of all shards."""
    mesh = Mesh(np.array(tpu.topology_devices(TOPOLOGIES[kind][0])[:1]), ("x",))
    most = dict.fromkeys(PASSES, 0.0)
    for (R, C), height, width, transposed in SHARDS:

        def passes(x, grid=(R, C), transposed=transposed):
            return tpu_shards.taken_apart(
                tpu_shards.normalized(x, grid, 1e-7, transposed), grid, transposed
            )

        sharding = NamedSharding(mesh, P())
        x = jax.ShapeDtypeStruct((1, R * C, height, width), jnp.bfloat16, sharding=sharding)
        jax.jit(passes).lower(x).compile()
        numbers = math.prod(tpu_shards.block_of(height, width, transposed))
        for name in PASSES:
            bundles = bundles_of_block(newest_dump(dump, name))
            most[name] = max(most[name], 1024 * bundles / numbers)
        _empty(dump)
    return most


def measure_kernel(kind: str, dump: pathlib.Path) -> dict[str, Any]:
    """Reads the cycles of the kernel for all candidates."""
    topology, sides, full_sides = TOPOLOGIES[kind]
    return {
        product.kind: {
            str(side): regions_of(product, side, chunk, topology, dump)._asdict()
            for side, chunk in (full_sides if product.kind == "full" else sides).items()
        }
        for product in SAMPLES
    }


def cycles_of_xla(kind: str, known: dict[Product, float]) -> list[float]:
    """Reads XLA's cycles for each product that is not known."""
    topology, found = TOPOLOGIES[kind][0], []
    for product in PRODUCTS:
        if product not in known:
            program = compiled(functools.partial(with_squares, product), product, topology)[0]
            known[product] = compiled_cost(program).cycles
            print(kind, product, known[product], flush=True)
        found.append(known[product])
    return found


def compare(kind: str, regions: dict[str, Any], xla: list[float]) -> list[dict[str, Any]]:
    """Estimates the kernel's cycles for each product, beside XLA's."""
    chip, rows = CHIPS[kind], []
    for product, cycles in zip(PRODUCTS, xla, strict=True):
        shape, candidates = product.shape, {}
        for side, fields in regions["square" if shape.is_symmetric else "full"].items():
            r = Regions(**fields)
            cuts = tiles.cuts(shape, int(side), r.chunk, chip)
            best = min((tiles.cycles(shape, cut, r, chip), cut) for cut in cuts)
            candidates[side] = {"cycles": round(best[0]), "depth": best[1].depth}
            if shape.is_symmetric:
                candidates[side]["flop_fraction"] = best[1].flop_fraction(product.n)
        used = product.cut(kind)
        side = str(used.side) if used else min(candidates, key=lambda x: candidates[x]["cycles"])
        row = {"xla": cycles, "side": int(side), "cycles": candidates[side]["cycles"]}
        row |= {"kernel_by_xla": row["cycles"] / cycles, "is_used": used is not None}
        rows.append(dataclasses.asdict(product) | row | {"candidates": candidates})
    return rows


def table(results: dict[str, Any]) -> str:
    """Formats a line for each product and generation."""
    lines: list[tuple[str, ...]] = [
        ("chip", "product", "n", "m", "XLA", "kernel", "side", "kernel / XLA")
    ]
    for kind, chip in results["chips"].items():
        for row in chip["products"]:
            cells = (kind, row["kind"], row["n"], row["m"], row["xla"], row["cycles"], row["side"])
            lines.append((*map(str, cells), f"{row['kernel_by_xla']:.3f}"))
    return report.columns(lines)


def main(arguments: list[str] | None = None) -> None:
    """Compiles everything, writes the results and prints a table."""
    parser = report.parser("tpu_kernel_cycles", "The kernel's cycles against XLA's.")
    parser.add_argument("--chip", choices=TOPOLOGIES, nargs="*", help="only these; others are kept")
    parser.add_argument("--keep-xla", action="store_true", help="keep XLA's cycles of the results")
    options = parser.parse_args(arguments)
    if not tpu.LIBTPU:
        parser.error(tpu.INSTALL)
    path = options.out / "tpu_kernel_cycles.json"
    before = json.loads(path.read_text())["chips"] if path.exists() else {}
    results = aot.head("tpu_kernel_cycles") | {"chips": before if options.chip else {}}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = DUMP_FLAGS.format(folder)
        for kind in options.chip or TOPOLOGIES:
            regions = measure_kernel(kind, pathlib.Path(folder))
            rows = before.get(kind, {}).get("products", ()) if options.keep_xla else ()
            known = {Product(row["kind"], row["n"], row["m"]): row["xla"] for row in rows}
            passes = measure_passes(kind, pathlib.Path(folder))
            xla = cycles_of_xla(kind, known)
            products = compare(kind, regions, xla)
            found = {"regions": regions, "passes": passes, "products": products}
            results["chips"][kind] = report.rounded(found)
            report.write_json(path, results)
    print(table(results))


if __name__ == "__main__":
    main()

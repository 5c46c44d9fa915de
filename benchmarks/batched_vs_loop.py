"""Newton–Schulz on CPU: a batched call against a loop over the matrices.

    python -m benchmarks.batched_vs_loop

Writes results/batched_vs_loop.json: for each batch the ratio of the medians of interleaved wall
times, and the temporary memory of both programs. `newton_schulz` loops on CPU for this reason.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.compiled import compiled_cost
from muonclip_jax import ns_coefficients
from muonclip_jax._orthogonalize.newton_schulz import Orthogonalizer, _in_batches

BATCHES = ((4, 128, 128), (4, 384, 128), (48, 256, 256), (24, 768, 768), (12, 768, 3072))
REPEATS = 9


def compiled(x: jax.Array, batch_size: int) -> Any:
    """Compiles Newton–Schulz in batches of this size."""

    def orthogonalize(x: jax.Array) -> jax.Array:
        settings = Orthogonalizer(ns_coefficients("jordan"), method="standard")
        choice = settings.choose(*sorted(x.shape[-2:]), x.dtype)._replace(batch_size=batch_size)
        wide = x.mT if x.shape[-2] > x.shape[-1] else x
        return _in_batches(wide, settings, 1e-8, choice=choice)

    return jax.jit(orthogonalize).lower(x).compile()


def measure(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Times both programs, interleaved, and reads their temporary memory."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    programs = [compiled(x, batch_size) for batch_size in (shape[0], 1)]
    times: list[list[float]] = [[], []]
    for program in programs:
        program(x).block_until_ready()
    for _ in range(REPEATS):
        for program, taken in zip(programs, times, strict=True):
            start = time.perf_counter()
            program(x).block_until_ready()
            taken.append(time.perf_counter() - start)
    batched, loop = (compiled_cost(program).temporary_bytes for program in programs)
    ratios = sorted(b / o for b, o in zip(*times, strict=True))
    return {
        "shape": shape,
        "time_batch_by_loop": round(statistics.median(times[0]) / statistics.median(times[1]), 2),
        "least_and_most": [round(ratios[0], 2), round(ratios[-1], 2)],
        "temporary_bytes": {"batch": batched, "one_by_one": loop},
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures every batch and writes the results."""
    options = report.parser("batched_vs_loop", __doc__ or "").parse_args(arguments)
    results = report.provenance("batched_vs_loop")
    results["batches"] = [measure(shape) for shape in BATCHES]
    report.write_json(options.out / "batched_vs_loop.json", results)
    print(*results["batches"], sep="\n")


if __name__ == "__main__":
    main()

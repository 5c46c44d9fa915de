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
from benchmarks.workloads import BATCHES
from muonclip_jax._orthogonalize import newton_schulz

REPEATS = 9


def compiled(x: jax.Array, batch_size: int) -> Any:
    """Compiles Newton–Schulz of `batch_size` matrices at a time."""
    orthogonalize = newton_schulz.orthogonalizer("jordan", None, "standard", "auto", "frobenius")
    n, m = sorted(x.shape[-2:])
    choice = orthogonalize.choose(n, m, x.dtype)._replace(batch_size=batch_size)

    def in_batches(x: jax.Array) -> jax.Array:
        return newton_schulz._in_batches(x, orthogonalize, jnp.float32(1e-8), choice=choice)

    return jax.jit(in_batches).lower(x).compile()


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
    options = report.parser("batched_vs_loop", "A batched call against a loop.").parse_args(
        arguments
    )
    results = report.provenance("batched_vs_loop")
    results["batches"] = [measure(shape) for shape in BATCHES]
    report.write_json(options.out / "batched_vs_loop.json", results)
    print(*results["batches"], sep="\n")


if __name__ == "__main__":
    main()

"""Newton-Schulz on CPU: a batch in one call against one matrix after the other.

    python benchmarks/one_by_one.py

Writes results/one_by_one.json: for each batch the ratio of the medians of interleaved wall times,
and the temporary memory of both programs. `newton_schulz` goes one by one on CPU because of it.
"""

import datetime
import json
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from muonclip_jax import ns_coefficients
from muonclip_jax._orthogonalize import newton_schulz as _newton_schulz

BATCHES = ((4, 128, 128), (4, 384, 128), (48, 256, 256), (24, 768, 768), (12, 768, 3072))
REPEATS = 9


def measure(shape: tuple[int, int, int]) -> dict:
    """Times both programs in turn, and reads their temporary memory off the compiler."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    programs = [
        jax.jit(
            lambda x, at_once=at_once: _newton_schulz._iterate(
                x,
                _newton_schulz.Traced(jnp.float32(1e-8)),
                rows=ns_coefficients("jordan"),
                method="standard",
                compute_dtype=jnp.dtype(jnp.float32),
                preconditioning="frobenius",
                blocks=_newton_schulz.block_count(shape[-2]),
                at_once=at_once,
            )
        )
        .lower(x)
        .compile()
        for at_once in (shape[0], 1)
    ]
    times = [[], []]
    for program in programs:
        program(x).block_until_ready()
    for _ in range(REPEATS):
        for program, taken in zip(programs, times, strict=True):
            start = time.perf_counter()
            program(x).block_until_ready()
            taken.append(time.perf_counter() - start)
    batch, loop = (program.memory_analysis().temp_size_in_bytes for program in programs)
    ratios = sorted(b / o for b, o in zip(*times, strict=True))
    return {
        "shape": shape,
        "time_batch_by_loop": round(statistics.median(times[0]) / statistics.median(times[1]), 2),
        "least_and_most": [round(ratios[0], 2), round(ratios[-1], 2)],
        "temporary_bytes": {"batch": batch, "one_by_one": loop},
    }


def main() -> None:
    """Measures every batch and writes the results."""
    results = {
        "command": "python benchmarks/one_by_one.py",
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "machine": "2 x86 cores",
        "batches": [measure(shape) for shape in BATCHES],
    }
    path = pathlib.Path(__file__).parent / "results" / "one_by_one.json"
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Newton–Schulz with mirrored symmetric products, against plain products.

    python -m benchmarks.mirrored_products

Writes results/mirrored_products.json: for each short side n the ratio of the medians of interleaved
processor times, mirrored / plain, with the method that "auto" chooses. A mirrored product computes
three of its four blocks. `newton_schulz` mirrors from the smallest n from which it is faster for
square matrices and for 1:4 matrices.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from muonclip_jax import newton_schulz
from muonclip_jax._orthogonalize import choices

SIDES = (128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048)
ASPECTS = (1, 4)
REPEATS = 11
WORK = 5e10  # FLOPs of a timed call, about: short calls cannot be timed well


def compiled(x: jax.Array, smallest: float) -> Callable[[jax.Array], jax.Array]:
    """Compiles Newton–Schulz that mirrors products from a short side on."""
    choices._SMALLEST_MIRRORED = {jax.default_backend(): smallest}
    return jax.jit(lambda x: newton_schulz(x)).lower(x).compile()


def measure(n: int, aspect: int) -> dict[str, Any]:
    """Times both programs, interleaved."""
    batch = max(1, round(WORK / (30 * aspect * n**3)))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, n, aspect * n)), jnp.float32)
    programs = [compiled(x, smallest) for smallest in (n, math.inf)]
    times: list[list[float]] = [[], []]
    for _ in range(REPEATS + 1):
        for program, taken in zip(programs, times, strict=True):
            start = time.process_time()
            program(x).block_until_ready()
            taken.append(time.process_time() - start)
    mirrored, plain = (taken[1:] for taken in times)
    ratios = sorted(b / p for b, p in zip(mirrored, plain, strict=True))
    return {
        "matrix": [n, aspect * n],
        "blocks_by_plain": round(statistics.median(mirrored) / statistics.median(plain), 3),
        "quartiles": [round(ratios[REPEATS // 4], 3), round(ratios[-1 - REPEATS // 4], 3)],
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures every shape and writes the results."""
    parser = report.parser("mirrored_products", "Mirrored against plain products.")
    parser.add_argument("--sides", type=int, nargs="*", default=SIDES, help="short sides")
    options = parser.parse_args(arguments)
    results = report.provenance("mirrored_products")
    results["shapes"] = [measure(n, aspect) for n in options.sides for aspect in ASPECTS]
    report.write_json(options.out / "mirrored_products.json", results)
    print(*results["shapes"], sep="\n")


if __name__ == "__main__":
    main()

"""Newton-Schulz with mirrored symmetric products, three of four blocks, against plain products.

    python -m benchmarks.symmetric_blocks

Writes results/blocks.json: for each short side n the ratio of the medians of interleaved times of
all processor cores, mirrored by plain, with the method that `method="auto"` selects.
`newton_schulz` mirrors from the smallest n from which on this is faster for square matrices and for
matrices of 1:4.
"""

import datetime
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from muonclip_jax import newton_schulz
from muonclip_jax._orthogonalize import choices

SIDES = (128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048)
ASPECTS = (1, 4)
REPEATS = 11
WORK = 5e10  # FLOPs of a timed call, about: short calls are timed badly


def compiled(x: jax.Array, smallest: float) -> Callable[[jax.Array], jax.Array]:
    """Compiles Newton-Schulz that mirrors from a short side on."""
    choices._SMALLEST_MIRRORED = {jax.default_backend(): smallest}
    return jax.jit(lambda x: newton_schulz(x)).lower(x).compile()


def measure(n: int, aspect: int) -> dict:
    """Times both programs in turn."""
    batch = max(1, round(WORK / (30 * aspect * n**3)))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, n, aspect * n)), jnp.float32)
    programs = [compiled(x, smallest) for smallest in (n, np.inf)]
    times = [[], []]
    for _ in range(REPEATS + 1):
        for program, taken in zip(programs, times, strict=True):
            start = time.process_time()
            program(x).block_until_ready()
            taken.append(time.process_time() - start)
    blocks, plain = (taken[1:] for taken in times)
    ratios = sorted(b / p for b, p in zip(blocks, plain, strict=True))
    return {
        "matrix": [n, aspect * n],
        "blocks_by_plain": round(statistics.median(blocks) / statistics.median(plain), 3),
        "quartiles": [round(ratios[REPEATS // 4], 3), round(ratios[-1 - REPEATS // 4], 3)],
    }


def main() -> None:
    """Measures every shape and writes the results."""
    results = {
        "command": "python -m benchmarks.symmetric_blocks",
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "machine": f"2 x86 cores, {jax.default_backend()}",
        "shapes": [measure(n, aspect) for n in SIDES for aspect in ASPECTS],
    }
    path = pathlib.Path(__file__).parent / "results" / "blocks.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results["shapes"], indent=None))


if __name__ == "__main__":
    main()

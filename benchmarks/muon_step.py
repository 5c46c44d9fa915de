"""One step of `muon` against `optax.contrib.muon` on the matrices of GPT-2 small.

    python benchmarks/muon_step.py

Writes results/muon_step.json. FLOPs and temporary memory are the compiler's, for all 12 layers;
wall times are interleaved, for 4 layers; every figure is ours by optax's.
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
import optax
from optax import contrib

import muonclip_jax as mc

WIDTH, HIDDEN = 768, 3072
REPEATS = 9


def tree(layers: int) -> dict:
    """Makes q, k, v, o, up and down of so many layers, Gaussian."""
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys("qkvo", (WIDTH, WIDTH)) | {
        "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
    }
    return {
        f"layer_{i}": {
            name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
        }
        for i in range(layers)
    }


def compile_step(muon: Callable[..., optax.GradientTransformation], params: dict) -> tuple:
    """Compiles one update; returns it, its arguments and the seconds that compiling took."""
    tx = muon(0.02)
    arguments = (params, tx.init(params), params)
    lowered = jax.jit(tx.update).lower(*arguments)
    start = time.perf_counter()
    return lowered.compile(), arguments, time.perf_counter() - start


def counts() -> dict:
    """Compares what the compiler says of 12 layers."""
    params = tree(12)
    ours, theirs = (compile_step(muon, params) for muon in (mc.muon, contrib.muon))
    temporary = [step.memory_analysis().temp_size_in_bytes for step in (ours[0], theirs[0])]
    flops = [step.cost_analysis()["flops"] for step in (ours[0], theirs[0])]
    return {
        "flops": round(flops[0] / flops[1], 3),
        "temporary_bytes": round(temporary[0] / temporary[1], 3),
        "compile_time": round(ours[2] / theirs[2], 2),
    }


def wall_time() -> dict:
    """Times 4 layers, one step of each in turn."""
    params = tree(4)
    steps = [compile_step(muon, params)[:2] for muon in (mc.muon, contrib.muon)]
    times = [[], []]
    for _ in range(REPEATS + 1):
        for (step, arguments), taken in zip(steps, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(step(*arguments))
            taken.append(time.perf_counter() - start)
    ratios = sorted(a / b for a, b in zip(*(taken[1:] for taken in times), strict=True))
    medians = [statistics.median(taken[1:]) for taken in times]
    return {
        "wall_time": round(medians[0] / medians[1], 2),
        "wall_time_least_and_most": [round(ratios[0], 2), round(ratios[-1], 2)],
    }


def main() -> None:
    """Measures and writes the results."""
    results = {
        "command": "python benchmarks/muon_step.py",
        "date": datetime.date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "optax": optax.__version__,
        },
        "machine": f"2 x86 cores, {jax.default_backend()}",
        "ours_by_optax": counts() | wall_time(),
    }
    path = pathlib.Path(__file__).parent / "results" / "muon_step.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

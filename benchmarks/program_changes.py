"""Compares the compiled programs of the benchmarks with the programs of another commit.

    python -m benchmarks.program_changes 61577b1

Wall times stay valid while the compiled programs stay the same. For each program this prints FLOPs,
temporary memory and the number of matrix products and loops, here / there, and the opcodes whose
number changed. Nothing is executed.
"""

import argparse
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import muonclip_jax as mc
from benchmarks import report, step_time
from benchmarks.compiled import compiled_cost, instruction_counts
from benchmarks.workloads import BATCHES, WORKLOADS

ROOT = pathlib.Path(__file__).parents[1]


def programs() -> dict[str, Callable[[], Any]]:
    """Returns functions that lower the timed programs, by name."""
    found: dict[str, Callable[[], Any]] = {}
    for name, workload in WORKLOADS.items():
        params = workload.params(workload.counted)
        found[f"step_time {name}"] = lambda params=params: step_time.trace(
            mc.muon(step_time.LEARNING_RATE), params
        ).lower()
    for shape in BATCHES:
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        found[f"newton_schulz {shape}"] = lambda x=x: jax.jit(lambda x: mc.newton_schulz(x)).lower(
            x
        )
    return found


def costs() -> dict[str, Any]:
    """Compiles the programs with the package that is imported."""
    found = {}
    for name, lower in programs().items():
        compiled = lower().compile()
        cost = compiled_cost(compiled)
        counts = dict(instruction_counts(compiled))
        found[name] = {"flops": cost.flops, "temporary": cost.temporary_bytes, "counts": counts}
    return found


def costs_at(commit: str) -> dict[str, Any]:
    """Compiles the programs with the package of a commit, in another process."""
    archive = subprocess.run(
        ["git", "archive", commit, "muonclip_jax"], cwd=ROOT, capture_output=True, check=True
    )
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
        # -P: the working directory, which has this package too, does not come first.
        done = subprocess.run(
            [sys.executable, "-P", "-m", "benchmarks.program_changes", "--print"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([folder, str(ROOT)])},
            capture_output=True,
            text=True,
            check=True,
        )
    return json.loads(done.stdout)


def changes(here: dict[str, Any], there: dict[str, Any]) -> str:
    """Formats the differences, a line for each program."""
    rows: list[list[str]] = [["program", "FLOPs", "temporary", "dot", "while", "changed opcodes"]]
    for name, ours in here.items():
        theirs = there[name]
        a, b = ours["counts"], theirs["counts"]
        changed = [
            f"{k} {b.get(k, 0)}->{a.get(k, 0)}" for k in sorted(a | b) if a.get(k) != b.get(k)
        ]
        ratios = [f"{ours[key] / theirs[key]:.4f}" for key in ("flops", "temporary")]
        numbers = [f"{a.get(key, 0)}/{b.get(key, 0)}" for key in ("dot", "while")]
        rows.append([name, *ratios, *numbers, ", ".join(changed) or "none"])
    return report.columns(rows)


def main(arguments: list[str] | None = None) -> None:
    """Compiles with both packages and prints the differences."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.program_changes", description="Compares compiled programs."
    )
    parser.add_argument("commit", nargs="?", help="another commit of this repository")
    parser.add_argument("--print", action="store_true", help="print the costs of this package")
    options = parser.parse_args(arguments)
    if options.print:
        print(json.dumps(costs()))
    elif options.commit:
        print(changes(costs(), costs_at(options.commit)))
    else:
        parser.error("pass a commit")


if __name__ == "__main__":
    main()

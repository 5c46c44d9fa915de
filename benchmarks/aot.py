"""Compiles an optimizer step for sharded parameters, and records what compiling took."""

import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from benchmarks import gpu, report, tpu
from benchmarks.compiled import Cost, compiled_cost
from benchmarks.roofline import Roofline, roofline_on

# XLA writes this to stderr where it reaches a sharding only by gathering the full array.
REMATERIALIZATION = "Involuntary full rematerialization"


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A compiled step.

    Attributes:
      cost: Its cost on each device.
      seconds: Wall time of the compiler.
      cpu_seconds: Processor time of the compiler, which other programs do not change.
      rematerializations: Warnings of XLA that a full array is gathered.
      roofline: Of a cluster of GPUs; None for other devices.
    """

    cost: Cost
    seconds: float
    cpu_seconds: float
    rematerializations: int
    roofline: Roofline | None = None


def trace_step(tx: optax.GradientTransformation, params: Any) -> Any:
    """Traces a step (params, state, gradients) -> (params, state) that donates both."""

    # Results in the order of the arguments: JAX pairs donated buffers with results of their shape
    # in order. A momentum that gets the buffer of a parameter would be stored twice for a while.
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = sharded_like(params, jax.eval_shape(tx.init, params))
    return jax.jit(step, donate_argnums=(0, 1)).trace(params, state, params)


def sharded_like(params: Any, state: Any) -> Any:
    """Shards each leaf of a state like the parameter whose path its own path ends with.

    Args:
      params: Shapes with a `NamedSharding` each.
      state: Arrays or shapes.

    Returns:
      Shapes with a sharding each. Leaves without such a parameter are replicated.
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    shardings = {path: p.sharding for path, p in flat}
    replicated = NamedSharding(flat[0][1].sharding.mesh, P())

    def place(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        endings = (path[i:] for i in range(len(path)))
        sharding = next((shardings[end] for end in endings if end in shardings), replicated)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def compile_traced(traced: Any, mesh: Mesh | None = None) -> Compilation:
    """Compiles a traced step.

    Args:
      traced: From `trace_step`.
      mesh: The devices it was traced for. GPUs need it.
    """
    options = gpu.compiler_options(mesh) if mesh else None
    with captured_stderr() as log:
        lowered = traced.lower()
        start, cpu_start = time.perf_counter(), time.process_time()
        compiled = lowered.compile(compiler_options=options)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    warnings = log[0].count(REMATERIALIZATION)
    least = roofline_on(compiled, mesh) if mesh else None
    return Compilation(compiled_cost(compiled), seconds, cpu_seconds, warnings, least)


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Captures stderr, also of C++. The list holds one string when the context ends."""
    log: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield log
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            log.append(file.read().decode(errors="replace"))


def head(module: str, *, on_gpu: bool = False) -> dict[str, Any]:
    """Returns the head of the results of a benchmark that compiles only."""
    plugins = {"libtpu": tpu.LIBTPU} if not on_gpu else {"jax-cuda13-plugin": gpu.PLUGIN}
    packages = ("optax", *(name for name, installed in plugins.items() if installed))
    if on_gpu:
        note = "nothing was executed; rooflines are FLOPs and bytes over the rates of data sheets"
    else:
        note = "nothing was executed; estimates of time leave out the links between chips"
    return report.provenance(module, *packages, machine="for the compiler") | {"note": note}

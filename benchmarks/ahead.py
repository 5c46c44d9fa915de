"""Compiles a step for devices that need not be there, and notes what compiling took."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from benchmarks.compiled import Cost, compiled_cost

LIBTPU = importlib.util.find_spec("libtpu") is not None

# What XLA says on stderr where it could not go from one sharding to another but by gathering all.
REMATERIALISATION = "Involuntary full rematerialization"


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A compiled step.

    Attributes:
      cost: What it costs.
      seconds: What compiling took.
      cpu_seconds: The same in time of processors, which does not see other programs.
      rematerializations: Warnings that an array was gathered whole.
    """

    cost: Cost
    seconds: float
    cpu_seconds: float
    rematerializations: int


def tpu_mesh(topology: str, shape: Sequence[int], names: Sequence[str]) -> Mesh:
    """Makes a mesh of TPU chips that need not be there, to compile for.

    Call it before JAX looks for devices. `libtpu` must be installed.

    Args:
      topology: Generation, and chips along each axis of the torus, such as `"v5p:4x4x4"`.
      shape: Size of each mesh axis.
      names: Of the mesh axes.

    Returns:
      A mesh whose axes are Auto.
    """
    settings = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # else libtpu asks the network what machine this is
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices).reshape(shape), names)


def trace(tx: optax.GradientTransformation, params: Any) -> Any:
    """Traces a step (params, state, gradients) -> (params, state) that may overwrite the two."""

    # Results in the order of the arguments: JAX pairs donated buffers with results of their shape
    # in order, and a momentum that gets the buffer of a parameter is kept twice for a while.
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = placed_like(params, jax.eval_shape(tx.init, params))
    return jax.jit(step, donate_argnums=(0, 1)).trace(params, state, params)


def placed_like(params: Any, state: Any) -> Any:
    """Lays a leaf as the parameter whose path its own ends with, and others everywhere."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    where = {path: p.sharding for path, p in flat}
    everywhere = NamedSharding(flat[0][1].sharding.mesh, P())

    def place(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        endings = (path[i:] for i in range(len(path)))
        sharding = next((where[end] for end in endings if end in where), everywhere)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def compile_ahead(traced: Any) -> Compilation:
    """Compiles a traced step."""
    with captured_stderr() as log:
        lowered = traced.lower()
        start, cpu_start = time.perf_counter(), time.process_time()
        compiled = lowered.compile()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    warnings = log[0].count(REMATERIALISATION)
    return Compilation(compiled_cost(compiled), seconds, cpu_seconds, warnings)


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Catches what is written to stderr, by C++ too; the list has it afterwards, in one piece."""
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


def about(command: str) -> dict[str, Any]:
    """Tells what was compiled, where and when."""
    names = ("jax", "jaxlib", "optax", *(["libtpu"] if LIBTPU else []))
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), "muonclip-jax": mc.__version__}
        | {name: importlib.metadata.version(name) for name in names},
        "machine": f"{os.cpu_count()} {platform.machine()} cores, that compile only",
        "load_before": os.getloadavg()[0],  # programs that ran in the last minute; best 0
        "note": "nothing was run; estimates of time leave out the links between chips",
    }


def rounded(value: Any) -> Any:
    """Keeps four digits of every number that is not whole."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(f"{value:.4g}")
    return value

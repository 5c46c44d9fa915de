"""One step of `muon` against `optax.contrib.muon` on a sharded tree, compiled for TPUs not there.

    pip install "muonclip-jax[tpu]"
    python benchmarks/sharded_step.py

Writes results/sharded_step.json. The tree is that of Llama 2 7B, divided over 64 chips, once as a
stack of layers and once as separate layers; a smaller one is compiled for other generations. A step
takes gradients and gives the new parameters; XLA may reuse the memory of the old ones. All figures
are read off the compiled programs: nothing is run, nothing is timed but the compiler, and the
estimates of time leave out the links between chips, which would favour whoever sends less.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import platform
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from compiled_cost import REMATERIALISATION, Cost, captured_stderr, compiled_cost, tpu_mesh
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from optax import contrib

import muonclip_jax as mc

ROWS, COLUMNS = P("fsdp", "tp"), P("tp", "fsdp")
# meta-llama/Llama-2-7b, params.json and config.json: hidden_size 4096, intermediate_size 11008.
SIDE, LONG_SIDE, LAYERS = 4096, 11008, 32
LAYER = dict.fromkeys("qkv", ("SIDE", "SIDE", ROWS)) | {
    "o": ("SIDE", "SIDE", COLUMNS),
    "gate": ("SIDE", "LONG", ROWS),
    "up": ("SIDE", "LONG", ROWS),
    "down": ("LONG", "SIDE", COLUMNS),
}
SETTINGS: dict[str, Any] = {"weight_decay": 0.1, "consistent_rms": 0.2}

# What a step of ours may be at most, by one of optax's with stacked leaves; compile time by optax's
# with separate layers.
GOALS = {
    "seconds": 0.40,
    "flops": 0.60,
    "sent_bytes": 0.03,
    "temporary_bytes": 0.50,
    "compile_time_unrolled": 0.30,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A tree on a mesh.

    Attributes:
      mesh: Its axes are fsdp and tp.
      layers: Of the tree.
      stacked: Whether layers are the first axis of a leaf.
      side: Width of the residual stream.
      long_side: Hidden units of the MLP.
    """

    mesh: Mesh
    layers: int
    stacked: bool
    side: int = SIDE
    long_side: int = LONG_SIDE

    def parameters(self) -> Any:
        """Gives the shapes of the parameters, and where they lie."""
        layer = {}
        for name, (rows, columns, spec) in LAYER.items():
            sizes = {"SIDE": self.side, "LONG": self.long_side}
            shape = (sizes[rows], sizes[columns])
            shape, spec = ((self.layers, *shape), P(None, *spec)) if self.stacked else (shape, spec)
            where = NamedSharding(self.mesh, spec)
            layer[name] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
        return layer if self.stacked else {f"layer_{i}": layer for i in range(self.layers)}

    def optimizers(self) -> dict[str, optax.GradientTransformation]:
        """Builds both; the products of both are in bfloat16."""
        params = self.parameters()
        shardings = jax.tree.map(lambda x: x.sharding, params)
        numbers = jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), params)
        return {
            "ours": mc.muon(2e-4, shardings=shardings, ns_dtype=jnp.bfloat16, **SETTINGS),
            # Without the numbers optax would leave stacks to Adam. float32 products of a TPU round
            # their factors to bfloat16.
            "optax": contrib.muon(
                2e-4, muon_weight_dimension_numbers=lambda _: numbers, **SETTINGS
            ),
        }


def trace(tx: optax.GradientTransformation, params: Any) -> Any:
    """Traces a step (gradients, state, params) -> (params, state) that may overwrite the latter."""

    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = placed_like(params, jax.eval_shape(tx.init, params))
    return jax.jit(step, donate_argnums=(1, 2)).trace(params, state, params)


def placed_like(params: Any, state: Any) -> Any:
    """Lays each leaf of a state as the parameter whose path its own ends with; others everywhere."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    where = {path: p.sharding for path, p in flat}
    everywhere = NamedSharding(flat[0][1].sharding.mesh, P())

    def place(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        endings = (path[i:] for i in range(len(path)))
        sharding = next((where[end] for end in endings if end in where), everywhere)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A compiled step.

    Attributes:
      cost: What it costs.
      seconds: What compiling took.
      cpu_seconds: The same in time of processors, which does not see other programs.
      rematerialisations: Warnings that an array was gathered whole.
    """

    cost: Cost
    seconds: float
    cpu_seconds: float
    rematerialisations: int


def compile_ahead(traced: Any) -> Compilation:
    """Compiles a traced step."""
    with captured_stderr() as log:
        lowered = traced.lower()
        start, cpu_start = time.perf_counter(), time.process_time()
        compiled = lowered.compile()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    warnings = log[0].count(REMATERIALISATION)
    return Compilation(compiled_cost(compiled), seconds, cpu_seconds, warnings)


def measure(case: Case, compilations: int = 1) -> dict[str, Any]:
    """Compiles both optimizers in turn."""
    runs: dict[str, list[Compilation]] = {"ours": [], "optax": []}
    for _ in range(compilations):
        for name, tx in case.optimizers().items():
            jax.clear_caches()
            runs[name].append(compile_ahead(trace(tx, case.parameters())))
    figures = {name: summary(found) for name, found in runs.items()}
    ours, optax_ = figures["ours"], figures["optax"]
    keys = ("seconds", "cycles", "flops", "sent_bytes", "temporary_bytes", "compile_cpu_seconds")
    ratios = {k: ours[k] / optax_[k] for k in keys if ours[k] and optax_[k]}
    return {
        "mesh": dict(case.mesh.shape),
        "layers": case.layers,
        "stacked": case.stacked,
        "ours_by_optax": ratios,
        **figures,
    }


def summary(compilations: list[Compilation]) -> dict[str, Any]:
    """Lists the figures of one program."""
    first = compilations[0]
    return {
        **dataclasses.asdict(first.cost),
        "sent_bytes": first.cost.sent_bytes,
        "rematerialisations": first.rematerialisations,
        "compile_seconds": statistics.median(c.seconds for c in compilations),
        "compile_cpu_seconds": statistics.median(c.cpu_seconds for c in compilations),
    }

"""Compiles a train step ahead of time, for TPUs or GPUs that need not be attached."""

import contextlib
import dataclasses
import importlib.util
import math
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import muonclip_jax as mc
from benchmarks import gpu
from benchmarks.tpu import topology_devices
from examples.language_model.config import BadInput, Config
from examples.language_model.measurement.cost_table import compile_and_format, device_name
from examples.language_model.models.layers import VOCABULARY
from examples.language_model.training.mesh import make_mesh, make_shardings
from examples.language_model.training.optimizer import make_optimizer
from examples.language_model.training.step import initial_state, make_train_step


def report(config: Config, model: nn.Module) -> str:
    """Compiles the train step for `--aot-topology`, on `--mesh` or on `default_mesh`.

    Args:
      config: Settings; `aot_topology` is not None.
      model: The model.

    Returns:
      Memory, FLOPs, collectives and the sharding plan of Muon, as lines to print.

    Raises:
      BadInput: if the topology is not supported, libtpu or JAX's CUDA plugin is missing, or the
        batch is not divisible by the mesh.
    """
    devices = _devices(str(config.aot_topology))
    mesh = make_mesh(config.mesh, devices) if config.mesh else default_mesh(model, devices)
    config, notes = fit_batch(config, mesh)
    micro_batch = config.batch_size // config.accumulate
    shardings = make_shardings(model, mesh, micro_batch)
    tx = make_optimizer(config, model.layout, shardings.params)
    shapes = jax.eval_shape(lambda: initial_state(model, tx, config.seed))
    state = jax.tree.map(_with_sharding, shapes, shardings.state(tx, shapes))
    # The training loop passes bytes; a larger vocabulary needs integers.
    dtype = jnp.uint8 if getattr(model, "vocabulary", VOCABULARY) <= VOCABULARY else jnp.int32
    shape = (config.accumulate, micro_batch, config.seq_len + 1)
    text = jax.ShapeDtypeStruct(shape, dtype, sharding=shardings.text(shape))
    step = jax.jit(
        make_train_step(model, tx),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), shardings.replicated),
    )
    with jax.set_mesh(mesh):
        lowered = step.lower(state, text, np.float32(config.tau))
    lines = [*_head(config, mesh, state.params), *notes, *shardings.notes]
    lines += compile_and_format(lowered, mesh)
    if config.optimizer != "adamw":
        per_head = model.layout if config.per_head else None
        plan = mc.sharding_plan(state.params, shardings=shardings.params, per_head=per_head)
        lines.append(str(plan))
    return "\n".join(lines)


def default_mesh(model: nn.Module, devices: Sequence[Any]) -> Mesh:
    """Builds a mesh of fsdp and, with experts, the largest expert axis below the fsdp axis."""
    experts, count = model.routed.experts if hasattr(model, "routed") else 1, len(devices)
    fits = [e for e in range(2, count) if experts % e == count % e == 0 and e**2 < count]
    for size in reversed(fits):
        with contextlib.suppress(BadInput):  # the torus has no such side
            return make_mesh({"fsdp": -1, "expert": size}, devices)
    return make_mesh(None, devices)


def _devices(topology: str) -> list[Any]:
    """Returns the devices of a topology, which need not be attached."""
    try:
        cluster = gpu.cluster(topology)
    except ValueError as error:
        raise BadInput(f"--aot-topology {error}") from error
    if cluster is not None:
        if not gpu.PLUGIN:
            raise BadInput(
                "--aot-topology: the CUDA plugin of JAX is not installed; run pip install '.[cuda]'"
            )
        return cluster.devices()
    if not re.match(r"(v\d|tpu)", topology):
        raise BadInput(
            f"--aot-topology {topology}: expected a TPU slice such as v5p:2x2x1, or one of"
            f" {', '.join(gpu.GPUS)} with hosts x GPUs of each, such as h100:8x8"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise BadInput("--aot-topology: libtpu is not installed; run pip install '.[tpu]'")
    try:
        return topology_devices(topology)
    except Exception as error:  # libtpu raises several types
        text = " ".join(str(error).split())[:200]
        raise BadInput(
            f"--aot-topology {topology}: not supported by libtpu ({text}); v5p:2x2x1 is"
        ) from error


def fit_batch(config: Config, mesh: Mesh) -> tuple[Config, list[str]]:
    """Grows the default batch to one sequence per device and micro-batch.

    Args:
      config: Settings.
      mesh: Mesh.

    Returns:
      Settings with a batch that is divisible by the mesh, and a note if it was changed.

    Raises:
      BadInput: if a batch size other than the default is not divisible.
    """
    ways = math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "expert"))
    least = config.accumulate * ways
    if config.batch_size % least == 0:
        return config, []
    if config.batch_size != Config.batch_size:
        raise BadInput(
            f"--batch-size: got {config.batch_size} with {config.accumulate} micro-batches on"
            f" {ways} devices, expected a multiple of {least}"
        )
    note = f"--batch-size: {least} instead of {Config.batch_size}, 1 per device and micro-batch"
    return dataclasses.replace(config, batch_size=least), [note]


def _with_sharding(x: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _head(config: Config, mesh: Mesh, params: Any) -> list[str]:
    """Describes what is compiled, and for which devices."""
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    devices = f"{mesh.size} {device_name(mesh)}s"
    return [
        f"{config.aot_topology}: {devices}{', mesh ' + axes if axes else ''}",
        f"{config.model} {config.preset}, {count:,} parameters, {config.dtype}; per step"
        f" {config.batch_size} sequences of {config.seq_len} in {config.accumulate} micro-batches",
    ]

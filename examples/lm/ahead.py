"""What a step would cost on chips that are not there: compiled ahead of time, and not run."""

import contextlib
import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import muonclip_jax as mc
from benchmarks.compiled import Cost, compiled_cost
from lm import mesh as meshes
from lm.config import BadInput, Config
from lm.layers import VOCABULARY
from lm.step import initial_state, make_optimizer, make_train_step

# GiB of a chip, by the name that JAX gives its kind. Google, cloud.google.com/tpu/docs/v5e, v5p and
# v6e, "Key chip specifications", HBM capacity.
MEMORY = {"TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}


def report(config: Config, model: nn.Module) -> str:
    """Compiles the train step for `--aot-topology`, on `--mesh` or on `default_mesh`.

    Args:
      config: Settings; `aot_topology` is not None.
      model: The model.

    Returns:
      Memory, FLOPs, collectives and the plan of Muon, as lines to print.

    Raises:
      BadInput: if libtpu is not installed, knows no such topology, or cannot divide the batch.
    """
    chips = _chips(str(config.aot_topology))
    mesh = meshes.make(config.mesh, chips) if config.mesh else default_mesh(model, chips)
    config, told = _divided(config, mesh)
    rows = config.batch_size // config.accumulate
    places = meshes.places(model, mesh, rows)
    tx = make_optimizer(config, places.params)
    shapes = jax.eval_shape(lambda: initial_state(model, tx, config.seed))
    state = jax.tree.map(_placed, shapes, places.state(tx, shapes))
    # A vocabulary of bytes is read as bytes; see `training.py`.
    dtype = jnp.uint8 if getattr(model, "vocabulary", VOCABULARY) <= VOCABULARY else jnp.int32
    shape = (config.accumulate, rows, config.seq_len + 1)
    text = jax.ShapeDtypeStruct(shape, dtype, sharding=places.text(shape))
    step = jax.jit(
        make_train_step(model, tx),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), places.everywhere),
    )
    with jax.set_mesh(mesh):
        lowered = step.lower(state, text, np.float32(config.tau))
    lines = [*_head(config, mesh, state.params), *told, *places.notes]
    lines += _compiled(lowered, chips[0])
    if config.optimizer != "adamw":
        lines += [str(mc.sharding_plan(state.params, shardings=places.params))]
    return "\n".join(lines)


def default_mesh(model: nn.Module, chips: Sequence[Any]) -> Mesh:
    """Puts all chips on fsdp, but for experts: as many on expert as can be, below fsdp."""
    experts, count = model.routed.experts if hasattr(model, "routed") else 1, len(chips)
    fits = [e for e in range(2, count) if experts % e == count % e == 0 and e**2 < count]
    for size in reversed(fits):
        with contextlib.suppress(BadInput):  # the torus has no such side
            return meshes.make({"fsdp": -1, "expert": size}, chips)
    return meshes.make(None, chips)


def _chips(topology: str) -> list[Any]:
    """Gives the chips of a slice that need not be there."""
    if importlib.util.find_spec("libtpu") is None:
        raise BadInput("--aot-topology: libtpu is not installed; pip install '.[tpu]' has it")
    # Not to look for a TPU here, nor to ask the network what machine this is, nor to write on
    # stderr that it is none; what is compiled for is named by the topology.
    settings = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # libtpu raises whatever it likes
        text = " ".join(str(error).split())[:200]
        raise BadInput(
            f"--aot-topology {topology}: not known to libtpu ({text}); v5p:2x2x1 is"
        ) from error


def _divided(config: Config, mesh: Mesh) -> tuple[Config, list[str]]:
    """Gives a batch that divides among the chips; the default one, of a small run, may be grown."""
    ways = math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "expert"))
    least = config.accumulate * ways
    if config.batch_size % least == 0:
        return config, []
    if config.batch_size != Config.batch_size:
        raise BadInput(
            f"--batch-size {config.batch_size} in {config.accumulate} micro-batches does not divide"
            f" among {ways} chips; expected a multiple of {least}"
        )
    note = f"--batch-size: {least} instead of {Config.batch_size}, 1 for each chip and micro-batch"
    return dataclasses.replace(config, batch_size=least), [note]


def _placed(x: jax.ShapeDtypeStruct, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _head(config: Config, mesh: Mesh, params: Any) -> list[str]:
    """Says what is compiled, and for what."""
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    return [
        f"{config.aot_topology}: {mesh.size} chips{' as ' + axes if axes else ''}",
        f"{config.model} {config.preset}, {count:,} parameters, {config.dtype}; a step of"
        f" {config.batch_size} sequences of {config.seq_len} in {config.accumulate} micro-batches",
    ]


def _compiled(lowered: Any, chip: Any) -> list[str]:
    """Compiles, and writes out what one chip does in one step, or by how much it cannot."""
    try:
        cost = compiled_cost(lowered.compile())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        return [f"  does not fit; give more chips, or more --accumulate: {reason}"]
    return _table(cost, MEMORY.get(chip.device_kind))


def _table(cost: Cost, memory: int | None) -> list[str]:
    """Writes out what one chip does in one step; `memory` is in GiB."""
    rows = [
        ("arguments", f"{(cost.argument_bytes or 0) / 1e6:,.1f} MB"),
        ("temporary memory", f"{(cost.temporary_bytes or 0) / 1e6:,.1f} MB"),
        ("matrix products", f"{cost.flops:.3g} FLOPs"),
    ]
    if memory is not None:
        used = ((cost.argument_bytes or 0) + (cost.temporary_bytes or 0)) / 2**30
        fits = "fits" if used <= memory else "does not fit"
        rows.insert(2, ("both", f"{used:.1f} of the {memory} GiB of a chip: {fits}"))
    if cost.seconds is not None:
        rows.append(("compiler's estimate", f"{1e3 * cost.seconds:.3g} ms, without links"))
    rows += [(kind, f"{n} of {cost.sent[kind] / 1e6:,.2f} MB") for kind, n in cost.counts.items()]
    return [f"  {name:20}{value}" for name, value in rows]

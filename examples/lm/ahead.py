"""What a step would cost on chips that are not there: compiled ahead of time, and not run."""

import importlib.util
import math
import os
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from lm.compiled_cost import Cost, compiled_cost
from lm.config import BadInput, Config
from lm.step import initial_state, make_optimizer, make_train_step

AXIS = "fsdp"  # the one mesh axis: it divides the batch, and one side of each weight


def report(config: Config, model: nn.Module) -> str:
    """Compiles the train step for `--aot-topology`, weights and batch divided among all chips.

    Args:
      config: Settings; `aot_topology` is not None.
      model: The model.

    Returns:
      Memory, FLOPs, collectives and the plan of Muon, as lines to print.

    Raises:
      BadInput: if libtpu is not installed, knows no such topology, or cannot divide the batch.
    """
    mesh = Mesh(np.array(_chips(str(config.aot_topology))), (AXIS,))
    state = jax.eval_shape(lambda: initial_state(model, make_optimizer(config), config.seed))
    state = jax.tree_util.tree_map_with_path(lambda path, x: _placed(path, x, mesh), state)
    tx = make_optimizer(config, jax.tree.map(lambda x: x.sharding, state.params))
    threshold = config.threshold if config.optimizer == "muonclip" else math.inf
    step = jax.jit(make_train_step(model, tx, threshold), donate_argnums=0)
    cost = compiled_cost(step.lower(state, _text(config, mesh)).compile())
    lines = [f"{config.aot_topology}: {mesh.size} chips, weights and batch divided among them"]
    lines += _table(cost)
    if config.optimizer != "adamw":
        lines += [str(mc.sharding_plan(state.params))]
    return "\n".join(lines)


def _chips(topology: str) -> list[Any]:
    """Gives the chips of a slice that need not be there."""
    if importlib.util.find_spec("libtpu") is None:
        raise BadInput("--aot-topology: libtpu is not installed; pip install '.[tpu]' has it")
    # Not to look for a TPU here, nor to ask the network what machine this is.
    settings = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
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


def _placed(path: Any, x: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Divides a leaf along its longest side that divides evenly; layers are stacked on axis 0."""
    stacked = re.search(r"\bblocks\b", jax.tree_util.keystr(path)) is not None
    sides = [i for i in range(stacked, x.ndim) if x.shape[i] % mesh.size == 0 and x.ndim > 1]
    longest = max(sides, key=lambda i: x.shape[i], default=None)
    spec = P(*(AXIS if i == longest else None for i in range(x.ndim)))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


def _text(config: Config, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The text of a step, uint8 [A, B / A, T + 1], divided along B."""
    rows = config.batch_size // config.accumulate
    if rows % mesh.size:
        raise BadInput(
            f"--batch-size {config.batch_size} in {config.accumulate} micro-batches does not divide"
            f" among {mesh.size} chips; expected a multiple of {config.accumulate * mesh.size}"
        )
    shape = (config.accumulate, rows, config.seq_len + 1)
    return jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=NamedSharding(mesh, P(None, AXIS)))


def _table(cost: Cost) -> list[str]:
    """Writes out what one chip does in one step."""
    rows = [
        ("arguments", f"{(cost.argument_bytes or 0) / 1e6:,.1f} MB"),
        ("temporary memory", f"{(cost.temporary_bytes or 0) / 1e6:,.1f} MB"),
        ("matrix products", f"{cost.flops:.3g} FLOPs"),
    ]
    if cost.seconds is not None:
        rows.append(("compiler's estimate", f"{1e3 * cost.seconds:.3g} ms, without links"))
    rows += [(kind, f"{n} of {cost.sent[kind] / 1e6:,.2f} MB") for kind, n in cost.counts.items()]
    return [f"  {name:20}{value}" for name, value in rows]

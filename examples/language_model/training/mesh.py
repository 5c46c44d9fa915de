"""The mesh of a run, and the shardings of the state and the text on it.

The mesh has Auto axes. With Explicit axes, every product that contracts a sharded axis needs the
sharding of its result, and Linen's own layers, which these models use, do not pass one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from examples.language_model.config import BadInput
from examples.language_model.flag_types import MESH_AXES
from examples.language_model.models.logical_axes import partition
from examples.language_model.training.step import TrainState


def make_mesh(sizes: Mapping[str, int] | None, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh.

    Args:
      sizes: Of the axes of `MESH_AXES`; 1 where one is missing, and -1 for all remaining devices.
        None puts all devices on fsdp.
      devices: Devices of the mesh; None uses all that JAX has.

    Returns:
      A mesh of all four axes, ordered by the connections between the devices.

    Raises:
      BadInput: if the product of the sizes is not the number of devices, or the topology has no
        such axes.
    """
    devices = jax.devices() if devices is None else devices
    given = {"fsdp": -1} if sizes is None else dict(sizes)
    fixed = math.prod(size for size in given.values() if size > 0)
    full = {name: size if size > 0 else len(devices) // fixed for name, size in given.items()}
    if math.prod(full.values()) != len(devices):
        got = ",".join(f"{name}={size}" for name, size in given.items())
        raise BadInput(
            f"argument --mesh: got {got}, but there are {len(devices)} devices; expected sizes"
            f" whose product is {len(devices)}, or -1 for one of them"
        )
    shape = [full.get(name, 1) for name in MESH_AXES]
    kinds = (AxisType.Auto,) * len(shape)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=kinds, devices=devices)
    except NotImplementedError as error:  # a torus of chips; the message names its sides
        got = ",".join(f"{name}={size}" for name, size in full.items())
        raise BadInput(
            f"argument --mesh: got {got}, which does not fit the topology of these chips; each size"
            f" must be a product of sides of their torus ({str(error).split('.')[0]})"
        ) from error


class Shardings(NamedTuple):
    """The shardings of the arrays of a run.

    Attributes:
      mesh: All devices.
      params: Pytree of `NamedSharding` like the parameters.
      notes: One line for each array that the first matching rule could not shard.
    """

    mesh: Mesh
    params: Any
    notes: tuple[str, ...]

    @property
    def replicated(self) -> NamedSharding:
        """Of an array that every device has in full."""
        return NamedSharding(self.mesh, P())

    def state(self, tx: optax.GradientTransformation, shapes: TrainState) -> TrainState:
        """Returns the shardings of a state: the moments of a parameter are sharded as it is.

        Args:
          tx: Optimizer.
          shapes: The state, or its shapes from `jax.eval_shape`.

        Returns:
          Pytree of `NamedSharding` like the state.
        """
        opt_state = optax.tree.map_params(
            tx,
            lambda x, sharding: x if _is_masked(x) else sharding,
            shapes.opt_state,
            self.params,
            transform_non_params=lambda _: self.replicated,
            is_leaf=_is_masked,
        )
        small = jax.tree.map(lambda _: self.replicated, shapes._replace(params=(), opt_state=()))
        return small._replace(params=self.params, opt_state=opt_state)

    def text(self, shape: Sequence[int]) -> NamedSharding:
        """Returns the sharding of text [..., B, T + 1]: the batch axis of every micro-batch."""
        names = (*[None] * (len(shape) - 2), "batch", None)
        return NamedSharding(self.mesh, partition(names, shape, self.mesh)[0])


def make_shardings(model: nn.Module, mesh: Mesh, batch_size: int) -> Shardings:
    """Applies the rules of `logical_axes` to a model.

    Args:
      model: The model; `flax.linen.with_logical_partitioning` names the axes of its parameters.
      mesh: From `make_mesh`.
      batch_size: Sequences in a micro-batch.

    Returns:
      The shardings, with notes.
    """
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    leaves, structure = jax.tree.flatten(nn.unbox(boxed))
    names = structure.flatten_up_to(nn.get_partition_spec(boxed))
    found = [partition(n, x.shape, mesh) for n, x in zip(names, leaves, strict=True)]
    shardings = structure.unflatten([NamedSharding(mesh, spec) for spec, _ in found])
    notes = [partition(("batch",), (batch_size,), mesh)[1], *(notes for _, notes in found)]
    return Shardings(mesh, shardings, tuple(dict.fromkeys(note for some in notes for note in some)))


def local_sequences(sharding: NamedSharding, shape: Sequence[int]) -> np.ndarray:
    """Returns the indices of the sequences of text [A, B, T + 1] on this process, in order."""
    indices = sharding.addressable_devices_indices_map(tuple(shape)).values()
    return np.unique([i for index in indices if index for i in range(shape[1])[index[1]]])


def shard(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Puts its shard of an array that every process has in full on each device."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)  # a leaf of the other optimizer of the two

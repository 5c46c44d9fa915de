"""The mesh of a run, and where on it the state and the text lie.

The mesh has Auto axes. Under Explicit ones every product that contracts a divided axis has to say
where its result lies, and Linen's own layers, with which these models are built, cannot.
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

from lm.config import MESH_AXES, BadInput
from lm.rules import divide
from lm.step import TrainState


def make(sizes: Mapping[str, int] | None, devices: Sequence[Any] | None = None) -> Mesh:
    """Lays the devices out.

    Args:
      sizes: Of the axes of `MESH_AXES`, 1 where one is missing and -1 for all that are left; None
        puts all devices on fsdp.
      devices: To lay out; None takes all that JAX has.

    Returns:
      A mesh of all four axes, ordered by how the devices are wired.

    Raises:
      BadInput: if the sizes are not those of the devices.
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
    except NotImplementedError as error:  # a torus of chips; the text names its sides
        got = ",".join(f"{name}={size}" for name, size in full.items())
        raise BadInput(
            f"argument --mesh: got {got}, which cannot be laid on these chips; each size must be a"
            f" product of sides of their torus ({str(error).split('.')[0]})"
        ) from error


class Places(NamedTuple):
    """Where the arrays of a run lie.

    Attributes:
      mesh: All devices.
      params: Tree like the weights, of `NamedSharding`.
      notes: For people: what could not be divided as the rules would.
    """

    mesh: Mesh
    params: Any
    notes: tuple[str, ...]

    @property
    def everywhere(self) -> NamedSharding:
        """Of what every device has whole."""
        return NamedSharding(self.mesh, P())

    def state(self, tx: optax.GradientTransformation, shapes: TrainState) -> TrainState:
        """Gives the shardings of a state: the moments of a weight lie as it does.

        Args:
          tx: Optimizer.
          shapes: The state, or its shapes by `jax.eval_shape`.

        Returns:
          Tree like the state, of `NamedSharding`.
        """
        opt_state = optax.tree.map_params(
            tx,
            lambda x, sharding: x if _is_masked(x) else sharding,
            shapes.opt_state,
            self.params,
            transform_non_params=lambda _: self.everywhere,
            is_leaf=_is_masked,
        )
        small = jax.tree.map(lambda _: self.everywhere, shapes._replace(params=(), opt_state=()))
        return small._replace(params=self.params, opt_state=opt_state)

    def text(self, shape: Sequence[int]) -> NamedSharding:
        """Gives the sharding of text [..., B, T + 1]: every micro-batch is divided, by rows."""
        names = (*[None] * (len(shape) - 2), "batch", None)
        return NamedSharding(self.mesh, divide(names, shape, self.mesh)[0])


def places(model: nn.Module, mesh: Mesh, rows: int) -> Places:
    """Says where the weights of a model, and the rows of a micro-batch, lie.

    Args:
      model: The model, whose weights name their axes by `flax.linen.with_logical_partitioning`.
      mesh: From `make`.
      rows: Sequences in a micro-batch.

    Returns:
      The shardings, and what is to be said of them.
    """
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    leaves, structure = jax.tree.flatten(nn.unbox(boxed))
    names = structure.flatten_up_to(nn.get_partition_spec(boxed))
    divided = [divide(n, x.shape, mesh) for n, x in zip(names, leaves, strict=True)]
    shardings = structure.unflatten([NamedSharding(mesh, spec) for spec, _ in divided])
    notes = [divide(("batch",), (rows,), mesh)[1], *(notes for _, notes in divided)]
    return Places(mesh, shardings, tuple(dict.fromkeys(note for some in notes for note in some)))


def own_rows(sharding: NamedSharding, shape: Sequence[int]) -> np.ndarray:
    """Says which rows of text [A, B, T + 1] the devices of this process hold, in order."""
    held = sharding.addressable_devices_indices_map(tuple(shape)).values()
    return np.unique([row for index in held if index for row in range(shape[1])[index[1]]])


def share(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Gives each device its part of an array that every process has whole."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)  # a leaf that the other of two optimizers has

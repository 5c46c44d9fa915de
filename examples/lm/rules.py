"""From the names of axes to a mesh: which devices divide what."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from flax.linen import spmd
from jax.sharding import PartitionSpec as P

# What the name of an axis (see `layers.AXES`) is divided among. An array takes the rules from
# above, each mesh axis once, and skips those that do not divide it: what stands later under the
# same name is the second choice. Names that are not here stay whole: a divided axis of layers
# would be gathered at every layer of the scan.
RULES = (
    ("batch", ("data", "fsdp", "expert")),  # attention, too, is divided among experts' devices
    ("batch", ("data", "fsdp")),
    ("batch", ("fsdp", "expert")),
    ("batch", ("data",)),
    ("batch", ("fsdp",)),
    ("embed_batch", ("data",)),
    ("experts", ("expert",)),
    ("expert_batch", ("data", "fsdp")),
    ("expert_batch", ("data",)),
    ("expert_batch", ("fsdp",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("vocab", ("tensor",)),
    ("embed", ("fsdp", "expert")),
    ("embed", ("fsdp",)),
    ("latent", ("fsdp", "expert")),
    ("latent", ("fsdp",)),
)


def divide(
    names: Iterable[str | None], shape: Sequence[int], mesh: Any
) -> tuple[P, tuple[str, ...]]:
    """Divides an array among devices.

    Args:
      names: Of its axes; None, or no name, for one that stays whole.
      shape: Its sizes.
      mesh: Mesh, or abstract mesh.

    Returns:
      The spec, without mesh axes of one device; and for people, which axes the first of their rules
      would have divided, but for their size.
    """
    padded = (*names, *[None] * len(shape))[: len(shape)]
    sizes = dict(zip(padded, shape, strict=True))
    short = [(name, tuple(axis for axis in axes if mesh.shape[axis] > 1)) for name, axes in RULES]
    rules = [(name, axes) for name, axes in short if axes and name in sizes]
    good = [(name, axes) for name, axes in rules if sizes[name] % _count(axes, mesh) == 0]
    best, real = (spmd.logical_to_mesh_axes(padded, some) or () for some in (rules, good))
    notes = tuple(
        f"{name} of size {sizes[name]} does not divide among {_text(wanted, mesh)}:"
        f" {_text(got, mesh) + ' divides it' if got else 'each has all of it'}"
        for name, wanted, got in zip(padded, best, real, strict=True)
        if wanted and wanted != got
    )
    return P(*real), notes


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Says, in a program for the mesh of `jax.set_mesh`, how an activation is divided.

    Not `flax.linen.with_logical_constraint`: the rules that it takes from its context also reach
    the kernels inside `flax.linen.DenseGeneral`, where they have fewer axes than names.

    Args:
      x: Activation.
      names: Of its axes.

    Returns:
      `x`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, divide(names, x.shape, mesh)[0])


def _count(axes: Iterable[str], mesh: Any) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _text(axes: str | tuple[str, ...], mesh: Any) -> str:
    names = (axes,) if isinstance(axes, str) else axes  # a spec unpacks a tuple of one
    return ",".join(f"{name}={mesh.shape[name]}" for name in names)

"""Reads where the mesh has put the pieces of each leaf: from types, or from what the user says."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from muonclip_jax._layout import Axes
from muonclip_jax._paths import path_string
from muonclip_jax._sharding_plan import MeshAxes, Placed
from muonclip_jax._types import ArrayTree

_EXPLICIT = AxisType.Explicit

# Cures.
_SAY = "Pass the shardings of the parameters: shardings=jax.tree.map(lambda x: x.sharding, params)."
_PUT = "Put all leaves on one mesh: params = jax.device_put(params, shardings)."


class Placements(NamedTuple):
    """Where all leaves of a tree lie.

    Attributes:
      mesh: The mesh, concrete where it is known.
      platform: What its devices are; None if it is not known.
      specs: How each leaf lies on it.
      leaves: The same for the planner.
    """

    mesh: Any
    platform: str | None
    specs: tuple[PartitionSpec, ...]
    leaves: tuple[Placed, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each mesh axis."""
        return dict(self.mesh.shape)


def shardings_by_path(shardings: ArrayTree) -> dict[str, Any]:
    """Lists shardings by the paths of their leaves.

    Args:
      shardings: A tree like the parameters, or None.

    Returns:
      Path to sharding; leaves that are None are left out.

    Example:
      >>> shardings_by_path(None)
      {}
    """
    flat = jax.tree_util.tree_leaves_with_path(shardings)
    return {path_string(path): sharding for path, sharding in flat}


def placements(
    where: str, tree: ArrayTree, axes: Sequence[Axes], shardings: Mapping[str, Any]
) -> Placements | None:
    """Finds where the pieces of each leaf are.

    Args:
      where: Name of the public function that was called.
      tree: Arrays, traced or not.
      axes: The axes of each leaf as a batch of matrices.
      shardings: What the user says, by path; empty if nothing.

    Returns:
      Where they are. None where there is nothing to plan: an Auto mesh of one device, or nothing
      known, or inside of the user's own `jax.shard_map`, where every device has whole leaves.

    Raises:
      ValueError: for leaves whose place is not known or cannot be planned, all of them at once.
    """
    flat = [(path_string(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
    types = [jax.typeof(x).sharding for _, x in flat]
    kinds = {kind for t in types for kind in t.mesh.axis_types}
    if AxisType.Manual in kinds or not (shardings or AxisType.Explicit in kinds):
        return None
    if all(isinstance(shardings.get(path), SingleDeviceSharding) for path, _ in flat):
        return None
    found, faults = [], []
    for (path, x), typed in zip(flat, types, strict=True):
        try:
            found.append(_sharding_of(path, x, typed, shardings))
        except ValueError as error:
            fault, cure = (*error.args, _SAY)[:2]
            faults.append((f"  {path}: {x.dtype}{list(x.shape)}: {fault}", cure))
    _refuse(where, len(flat), faults or list(_on_another_mesh(flat, found)))
    # With types that name a mesh axis, even of one device, XLA takes no products by itself.
    if not found or (math.prod(found[0].mesh.shape.values()) == 1 and _EXPLICIT not in kinds):
        return None
    mesh = _mesh(flat, found)
    leaves = tuple(
        Placed(path, x.shape, x.dtype, a, _mesh_axes(s, x.ndim))
        for (path, x), a, s in zip(flat, axes, found, strict=True)
    )
    return Placements(mesh, _platform(mesh), tuple(s.spec for s in found), leaves)


def _sharding_of(
    path: str, x: jax.Array, typed: NamedSharding, shardings: Mapping[str, Any]
) -> NamedSharding:
    """Gives the sharding of one leaf: its type's, or what the user says of the Auto axes."""
    said, mesh = shardings.get(path), typed.mesh
    explicit = {n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == _EXPLICIT}
    if said is None and len(explicit) < max(1, len(mesh.axis_names)):
        raise ValueError(*_nothing_known(mesh, shardings))
    if said is not None and not isinstance(said, NamedSharding):
        raise ValueError(f"got {said}, expected a NamedSharding.")
    if said is not None and not explicit and _EXPLICIT in said.mesh.axis_types:
        raise ValueError("it is not on the Explicit mesh of `shardings`.", _PUT)
    sharding = typed if said is None else said
    by_type, by_axis = _mesh_axes(typed, x.ndim), _mesh_axes(sharding, x.ndim)
    if explicit and by_type != tuple(tuple(n for n in names if n in explicit) for names in by_axis):
        raise ValueError(f"it is {typed.spec} by its type, and {sharding.spec} in `shardings`.")
    for size, names in zip(x.shape, by_axis, strict=True):
        if size % math.prod(sharding.mesh.shape[name] for name in names):
            raise ValueError(f"{sharding.spec} does not divide it evenly.")
    return NamedSharding(mesh, sharding.spec) if explicit else sharding


def _nothing_known(mesh: Any, shardings: Mapping[str, Any]) -> tuple[str, str]:
    """Says why it is not known where a leaf lies, and the cure."""
    if shardings:
        return f"`shardings` has none at this path; its first one is at {min(shardings)}.", _SAY
    if mesh.axis_names:
        return f"its type does not tell how it lies on the Auto axes of {dict(mesh.shape)}.", _SAY
    return "it is on no mesh, and other leaves are.", _PUT


def _mesh_axes(sharding: NamedSharding, ndim: int) -> tuple[MeshAxes, ...]:
    """Lists for each axis the mesh axes of more than one device that divide it."""
    if len(sharding.spec) > ndim:
        raise ValueError(f"{sharding.spec} has more entries than it has axes.")
    entries = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    if PartitionSpec.UNCONSTRAINED in entries:
        raise ValueError(f"{sharding.spec} leaves an axis open.")
    named = ((e,) if isinstance(e, str) else tuple(e or ()) for e in entries)
    return tuple(tuple(n for n in names if sharding.mesh.shape[n] > 1) for names in named)


def _on_another_mesh(
    flat: Sequence[tuple[str, jax.Array]], found: Sequence[NamedSharding]
) -> Iterator[tuple[str, str]]:
    """Names the leaves that are on another mesh than the first one."""
    for (path, _), sharding in zip(flat, found, strict=True):
        if sharding.mesh.abstract_mesh != found[0].mesh.abstract_mesh:
            yield f"  {path}: is on {sharding.mesh}, {flat[0][0]} is on {found[0].mesh}.", _PUT


def _refuse(where: str, count: int, faults: Sequence[tuple[str, str]]) -> None:
    """Raises if there are faults, each of them with its cure."""
    if faults:
        texts, cures = zip(*faults, strict=True)
        head = f"{where}: {len(faults)} of {count} leaves cannot be planned."
        raise ValueError("\n".join([head, *texts, *dict.fromkeys(cures)]))


def _mesh(flat: Sequence[tuple[str, jax.Array]], found: Sequence[NamedSharding]) -> Any:
    """Gives the mesh, with its devices if they are known: outside of `jit` they are."""
    concrete = [x.sharding for _, x in flat if not isinstance(x, Tracer)]
    meshes = [s.mesh for s in (*found, *concrete) if isinstance(s, NamedSharding)]
    return next((mesh for mesh in meshes if isinstance(mesh, jax.sharding.Mesh)), found[0].mesh)


def _platform(mesh: Any) -> str | None:
    """Tells what the devices of a mesh are, which for compiling ahead of time are not here."""
    if isinstance(mesh, jax.sharding.Mesh):
        return mesh.devices.flat[0].platform
    device = getattr(mesh, "abstract_device", None)
    return getattr(device, "platform", None)

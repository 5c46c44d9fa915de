"""Reads where the mesh has put the pieces of each leaf: from types, or from what the user says."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax._src import core
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from muonclip_jax._common.paths import path_string
from muonclip_jax._common.types import ArrayTree
from muonclip_jax._orthogonalize.matrix_axes import Axes
from muonclip_jax._sharding.plan import PASS_SHARDINGS, MeshAxes, Placed

_EXPLICIT = AxisType.Explicit

# Cures.
_PUT = "Put all leaves on one mesh: params = jax.device_put(params, shardings)."


class Placements(NamedTuple):
    """How all leaves of a pytree are sharded.

    Attributes:
      mesh: The mesh, concrete where it is known.
      platform: What its devices are; None if it is not known.
      specs: How each leaf is sharded over it.
      leaves: The same for the planner.
      axis_names: The mesh axes that `jax.shard_map` makes manual: all that are not manual yet.
      members: The mesh axes over which `jax.vmap` shards its members. No plan may use them.
    """

    mesh: Any
    platform: str | None
    specs: tuple[PartitionSpec, ...]
    leaves: tuple[Placed, ...]
    axis_names: frozenset[str] = frozenset()
    members: frozenset[str] = frozenset()

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each mesh axis that a plan may use."""
        usable = self.axis_names - self.members
        return {name: size for name, size in self.mesh.shape.items() if name in usable}


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
      known, or inside the user's own `jax.shard_map`, where every device has full matrices, unless
      a type shards them over an Explicit axis that this `shard_map` leaves out.

    Raises:
      ValueError: for leaves whose place is not known or cannot be planned, all of them at once.
    """
    flat = [(path_string(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
    types = [jax.typeof(x).sharding for _, x in flat]
    kinds = {kind for t in types for kind in t.mesh.axis_types}
    is_manual = AxisType.Manual in kinds
    if is_manual:
        shardings = {}  # of the arrays outside
    if not (any(any(t.spec) for t in types) if is_manual else shardings or _EXPLICIT in kinds):
        return None
    if all(isinstance(shardings.get(path), SingleDeviceSharding) for path, _ in flat):
        return None
    found, faults = [], []
    for (path, x), typed in zip(flat, types, strict=True):
        try:
            found.append(_sharding_of(path, x, typed, shardings))
        except ValueError as error:
            fault, cure = (*error.args, PASS_SHARDINGS)[:2]
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
    specs = tuple(s.spec for s in found)
    members = _axes_of_members("explicit_mesh_axis_names")  # which JAX hides from shard_map
    names = (_explicit(found[0].mesh) if is_manual else frozenset(mesh.axis_names)) - members
    return Placements(
        mesh, _platform(mesh), specs, leaves, names, members | _axes_of_members("spmd_axis_names")
    )


def _explicit(mesh: Any) -> frozenset[str]:
    """Lists the Explicit axes of a mesh."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(name for name, kind in kinds if kind == _EXPLICIT)


def _axes_of_members(kind: str) -> frozenset[str]:
    """Lists the mesh axes over which a `jax.vmap` around the call shards its members.

    A device that shared work over such an axis would mix members. JAX has no public function for
    this; where a version keeps the names elsewhere, none are found.
    """
    env = getattr(core, "get_axis_env", lambda: None)()
    return frozenset(getattr(env, kind, None) or ())


def _sharding_of(
    path: str, x: jax.Array, typed: NamedSharding, shardings: Mapping[str, Any]
) -> NamedSharding:
    """Gives the sharding of one leaf: its type's, or what the user says of the Auto axes."""
    said, mesh, explicit = shardings.get(path), typed.mesh, _explicit(typed.mesh)
    is_manual = AxisType.Manual in mesh.axis_types
    if said is None and not is_manual and len(explicit) < max(1, len(mesh.axis_names)):
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
        return (
            f"`shardings` has none at this path; its first one is at {min(shardings)}.",
            PASS_SHARDINGS,
        )
    if mesh.axis_names:
        return (
            f"its type does not tell how it lies on the Auto axes of {dict(mesh.shape)}.",
            PASS_SHARDINGS,
        )
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

"""Finds how each leaf is sharded: from its type, or from the `shardings` that the user passed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax._src import core
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from muonclip_jax._common.folding import fold_faults
from muonclip_jax._common.paths import path_string
from muonclip_jax._common.settings import shown
from muonclip_jax._common.types import ArrayTree
from muonclip_jax._orthogonalize.matrices import Axes

MeshAxes: TypeAlias = tuple[str, ...]

_EXPLICIT = AxisType.Explicit

# Fixes, for error messages and for the printed plan.
PASS_SHARDINGS = (
    "Pass the shardings of the parameters: shardings=jax.tree.map(lambda x: x.sharding, params)."
)
_PUT = "Put all leaves on one mesh: params = jax.device_put(params, shardings)."


class PlacedLeaf(NamedTuple):
    """A leaf and how it is sharded.

    Attributes:
      path: Its path in the pytree.
      shape: Its shape.
      dtype: Its dtype.
      axes: Its axes as a batch of matrices.
      spec: For each axis, the mesh axes over which it is sharded, major to minor.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: Axes
    spec: tuple[MeshAxes, ...]

    def mesh_axes(self, axes: Sequence[int]) -> MeshAxes:
        """Returns the mesh axes over which some axes of the leaf, one side, are sharded."""
        return tuple(name for axis in axes for name in self.spec[axis])


class Placement(NamedTuple):
    """How all leaves of a pytree are sharded.

    Attributes:
      mesh: The mesh, with its devices if they are known.
      platform: The platform of its devices; None if unknown.
      specs: How each leaf is sharded over it.
      leaves: The same as plain data, for the plan.
      axis_names: The mesh axes that `jax.shard_map` makes manual: all that are not manual yet.
      vmapped_axes: The mesh axes that shard the batch axis of `jax.vmap`. No plan may use them.
      device_kind: JAX's name of its devices; None if unknown.
    """

    mesh: Any
    platform: str | None
    specs: tuple[PartitionSpec, ...]
    leaves: tuple[PlacedLeaf, ...]
    axis_names: frozenset[str] = frozenset()
    vmapped_axes: frozenset[str] = frozenset()
    device_kind: str | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each mesh axis that a plan may use."""
        usable = self.axis_names - self.vmapped_axes
        return {name: size for name, size in self.mesh.shape.items() if name in usable}


def shardings_by_path(caller: str, shardings: ArrayTree) -> dict[str, Any]:
    """Lists shardings by the paths of their leaves.

    Args:
      caller: Name of the public function that was called.
      shardings: A pytree like the parameters, or None.

    Returns:
      Path to sharding, without leaves that are None.

    Raises:
      TypeError: if `shardings` is neither a pytree nor a sharding.

    Example:
      >>> shardings_by_path("muon", None)
      {}
    """
    flat = jax.tree_util.tree_leaves_with_path(shardings)
    found = {path_string(path): sharding for path, sharding in flat}
    if "" in found and not isinstance(found[""], Sharding):
        raise TypeError(
            f"{caller}: shardings must be a pytree of NamedSharding like the parameters, got "
            f"{shown(shardings)}. {PASS_SHARDINGS}"
        )
    return found


def find_placement(
    caller: str, tree: ArrayTree, axes: Sequence[Axes], shardings: Mapping[str, Any]
) -> Placement | None:
    """Finds how each leaf is sharded.

    Args:
      caller: Name of the public function that was called.
      tree: Arrays, traced or not.
      axes: The axes of each leaf as a batch of matrices.
      shardings: The shardings that the user passed, by path; may be empty.

    Returns:
      The placement. None if there is nothing to plan: an Auto mesh of one device, or unknown
      shardings, or inside the user's own `jax.shard_map`, where every device has full matrices,
      unless a type shards them over an Explicit axis that this `shard_map` leaves out.

    Raises:
      ValueError: for leaves whose sharding is unknown or cannot be planned, all of them at once.
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
            fault, fix = (*error.args, PASS_SHARDINGS)[:2]
            faults.append((path, f"{x.dtype}{list(x.shape)}: {fault}", fix))
    _raise_faults(caller, len(flat), faults or list(_on_another_mesh(flat, found)))
    # JAX rejects products of types that name a mesh axis, even one of a single device.
    if not found or (math.prod(found[0].mesh.shape.values()) == 1 and _EXPLICIT not in kinds):
        return None
    mesh = _mesh(flat, found)
    leaves = tuple(
        PlacedLeaf(path, x.shape, x.dtype, a, _mesh_axes(s, x.ndim))
        for (path, x), a, s in zip(flat, axes, found, strict=True)
    )
    specs = tuple(s.spec for s in found)
    vmapped = _vmapped_axes("explicit_mesh_axis_names")  # which JAX hides from shard_map
    names = (_explicit(found[0].mesh) if is_manual else frozenset(mesh.axis_names)) - vmapped
    vmapped |= _vmapped_axes("spmd_axis_names")
    device = _device(mesh)
    platform, kind = (getattr(device, name, None) for name in ("platform", "device_kind"))
    return Placement(mesh, platform, specs, leaves, names, vmapped, kind)


def _explicit(mesh: Any) -> frozenset[str]:
    """Lists the Explicit axes of a mesh."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(name for name, kind in kinds if kind == _EXPLICIT)


def _vmapped_axes(kind: str) -> frozenset[str]:
    """Lists the mesh axes that shard the batch axis of a `jax.vmap` around the call.

    Sharing work over such an axis would mix the members of the batch. JAX has no public
    function for this. Versions that keep the names elsewhere yield none.
    """
    env = getattr(core, "get_axis_env", lambda: None)()
    return frozenset(getattr(env, kind, None) or ())


def _sharding_of(
    path: str, x: jax.Array, typed: NamedSharding, shardings: Mapping[str, Any]
) -> NamedSharding:
    """Returns the sharding of a leaf: its type's, or for Auto axes the one that the user passed."""
    passed, mesh, explicit = shardings.get(path), typed.mesh, _explicit(typed.mesh)
    is_manual = AxisType.Manual in mesh.axis_types
    if passed is None and not is_manual and len(explicit) < max(1, len(mesh.axis_names)):
        raise ValueError(*_unknown_sharding(mesh, shardings))
    if passed is not None and not isinstance(passed, NamedSharding):
        raise ValueError(f"got {passed}, expected a NamedSharding.")
    if passed is not None and not explicit and _EXPLICIT in passed.mesh.axis_types:
        raise ValueError("it is not on the Explicit mesh of `shardings`.", _PUT)
    sharding = typed if passed is None else passed
    by_type, by_axis = _mesh_axes(typed, x.ndim), _mesh_axes(sharding, x.ndim)
    if explicit and by_type != tuple(tuple(n for n in names if n in explicit) for names in by_axis):
        raise ValueError(f"it is {typed.spec} by its type, and {sharding.spec} in `shardings`.")
    for size, names in zip(x.shape, by_axis, strict=True):
        if size % math.prod(sharding.mesh.shape[name] for name in names):
            raise ValueError(f"{sharding.spec} does not shard it evenly.")
    return NamedSharding(mesh, sharding.spec) if explicit else sharding


def _unknown_sharding(mesh: Any, shardings: Mapping[str, Any]) -> tuple[str, str]:
    """Returns why the sharding of a leaf is unknown, and the fix."""
    if shardings:
        return (
            f"`shardings` has none at this path; its first one is at {min(shardings)}.",
            PASS_SHARDINGS,
        )
    if mesh.axis_names:
        return (
            f"its type does not show how it is sharded over the Auto axes of {dict(mesh.shape)}.",
            PASS_SHARDINGS,
        )
    return "it is on no mesh, and other leaves are.", _PUT


def _mesh_axes(sharding: NamedSharding, ndim: int) -> tuple[MeshAxes, ...]:
    """Lists for each axis the mesh axes of more than one device over which it is sharded."""
    if len(sharding.spec) > ndim:
        raise ValueError(f"{sharding.spec} has more entries than it has axes.")
    entries = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    if PartitionSpec.UNCONSTRAINED in entries:
        raise ValueError(f"{sharding.spec} leaves an axis unconstrained.")
    named = ((e,) if isinstance(e, str) else tuple(e or ()) for e in entries)
    return tuple(tuple(n for n in names if sharding.mesh.shape[n] > 1) for names in named)


def _on_another_mesh(
    flat: Sequence[tuple[str, jax.Array]], found: Sequence[NamedSharding]
) -> Iterator[tuple[str, str, str]]:
    """Yields the leaves that are on another mesh than the first one, with the fix."""
    for (path, _), sharding in zip(flat, found, strict=True):
        if sharding.mesh.abstract_mesh != found[0].mesh.abstract_mesh:
            yield path, f"is on {sharding.mesh}, {flat[0][0]} is on {found[0].mesh}.", _PUT


def _raise_faults(caller: str, count: int, faults: Sequence[tuple[str, str, str]]) -> None:
    """Raises one error for all faults, each of them with its fix."""
    if faults:
        lines = fold_faults((path, text) for path, text, _ in faults)
        fixes = dict.fromkeys(fix for *_, fix in faults)
        head = f"{caller}: {len(faults)} of {count} leaves cannot be planned."
        raise ValueError("\n".join([head, *lines, *fixes]))


def _mesh(flat: Sequence[tuple[str, jax.Array]], found: Sequence[NamedSharding]) -> Any:
    """Returns the mesh, with its devices if they are known: outside `jit` they are."""
    concrete = [x.sharding for _, x in flat if not isinstance(x, Tracer)]
    meshes = [s.mesh for s in (*found, *concrete) if isinstance(s, NamedSharding)]
    return next((mesh for mesh in meshes if isinstance(mesh, jax.sharding.Mesh)), found[0].mesh)


def _device(mesh: Any) -> Any:
    """Returns a device of a mesh, which may be of another platform than the default of JAX."""
    if isinstance(mesh, jax.sharding.Mesh):
        return mesh.devices.flat[0]
    return getattr(mesh, "abstract_device", None)

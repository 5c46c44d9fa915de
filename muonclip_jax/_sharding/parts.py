"""Takes the leaves of a pytree apart into arrays of matrices, and puts them together again.

A sharded axis that flattens several, such as heads · head_dim over a mesh axis, is unflattened so
that each device keeps its shard: the heads are sharded, and nothing is sent.
"""

import collections
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from muonclip_jax._common.paths import path_string
from muonclip_jax._common.types import ArrayTree
from muonclip_jax._orthogonalize.matrices import Axes
from muonclip_jax._orthogonalize.split import Split


class Parts(NamedTuple):
    """A pytree whose split leaves are taken apart.

    Attributes:
      tree: The pytree. A leaf of several parts is a mapping from their names.
      axes: The axes of each array as a batch of matrices, in the order of `jax.tree.leaves`.
      shardings: The shardings that the user passed, by path of each array.
    """

    tree: ArrayTree
    axes: list[Axes]
    shardings: dict[str, Any]


def take_apart(
    caller: str, tree: ArrayTree, splits: Sequence[Split], shardings: Mapping[str, Any]
) -> Parts:
    """Takes the leaves of a pytree apart.

    Args:
      caller: Name of the public function that was called.
      tree: Arrays.
      splits: How each of its leaves is split.
      shardings: How leaves are sharded on an Auto mesh, by path; may be empty.

    Returns:
      The parts.

    Raises:
      ValueError: if shards cut through the parts of a leaf, with its path.
    """
    flat = jax.tree_util.tree_leaves_with_path(tree)
    parts, passed, faults = [], dict(shardings), []
    for (path, x), split in zip(flat, splits, strict=True):
        name = path_string(path)
        try:
            typed = _unflattened(jax.typeof(x).sharding, split)
            arrays = _cut(_reshaped(x, split.shape, typed), split)
            if isinstance(given := passed.get(name), NamedSharding):
                passed |= dict.fromkeys(_paths(name, split), _unflattened(given, split))
        except ValueError as error:
            faults.append(f"  {name}: {x.dtype}{list(x.shape)}: {error}")
            continue
        named = zip((part.name for part in split.parts), arrays, strict=True)
        parts.append(collections.OrderedDict(named) if len(arrays) > 1 else arrays[0])
    if faults:
        raise ValueError(
            f"{caller}: {len(faults)} of {len(flat)} leaves are sharded across their heads "
            "or groups.\n"
            + "\n".join(faults)
            + "\nShard the inputs of these leaves instead, or shard over a number of devices that "
            "divides the heads, or leave the leaves out of per_head. For a convolution in groups, "
            "set overrides=."
        )
    axes = [part.axes for split in splits for part in split.parts]
    return Parts(jax.tree.structure(tree).unflatten(parts), axes, passed)


def put_together(
    arrays: Sequence[jax.Array], tree: ArrayTree, splits: Sequence[Split]
) -> ArrayTree:
    """Undoes `take_apart`.

    Args:
      arrays: The parts of all leaves, in order.
      tree: The pytree that was taken apart.
      splits: How each of its leaves is split.

    Returns:
      A pytree like `tree`, sharded as it.
    """
    leaves, structure = jax.tree.flatten(tree)
    rest = iter(arrays)
    together = []
    for x, split in zip(leaves, splits, strict=True):
        parts = [*itertools.islice(rest, len(split.parts))]
        joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts, split.axis)
        together.append(_reshaped(joined, x.shape, jax.typeof(x).sharding))
    return structure.unflatten(together)


def map_matrices(
    caller: str, fn: Callable[..., jax.Array], splits: Sequence[Split], *trees: ArrayTree
) -> ArrayTree:
    """Maps a function over the arrays of matrices of pytrees of equal shapes.

    Args:
      caller: Name of the public function that was called.
      fn: Maps the axes of an array and the array of each pytree to an array of the same shape.
      splits: How each leaf is split.
      *trees: Arrays.

    Returns:
      The pytree of the results, sharded as the first.

    Raises:
      ValueError: if shards cut through the parts of a leaf, with its path.
    """
    first, *others = (take_apart(caller, tree, splits, {}) for tree in trees)
    arrays = [jax.tree.leaves(parts.tree) for parts in (first, *others)]
    found = [fn(axes, *xs) for axes, *xs in zip(first.axes, *arrays, strict=True)]
    return put_together(found, trees[0], splits)


def _paths(name: str, split: Split) -> list[str]:
    """Lists the paths of the parts of a leaf."""
    several = len(split.parts) > 1
    return ["/".join(filter(None, (name, part.name))) if several else name for part in split.parts]


def _cut(x: jax.Array, split: Split) -> list[jax.Array]:
    """Cuts an unflattened leaf into its parts."""
    if len(split.parts) == 1:
        return [x]
    ends = itertools.accumulate(part.size for part in split.parts)
    return jnp.split(x, [*ends][:-1], split.axis)


def _reshaped(x: jax.Array, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """Reshapes an array, to a sharding if it is on Explicit axes."""
    if x.shape == shape:
        return x
    is_explicit = AxisType.Explicit in sharding.mesh.axis_types and any(sharding.spec)
    return jnp.reshape(x, shape, out_sharding=sharding if is_explicit else None)


def _unflattened(sharding: NamedSharding, split: Split) -> NamedSharding:
    """Shards the axes of an unflattened leaf so that every device keeps its shard."""
    spec = [*sharding.spec, *[None] * (len(split.sizes) - len(sharding.spec))]
    if not any(spec) or (all(len(sizes) == 1 for sizes in split.sizes) and len(split.parts) == 1):
        return sharding
    entries = []
    for entry, sizes in zip(spec, split.sizes, strict=True):
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        entries += _entries(names, sizes, sharding)
    if len(split.parts) > 1 and entries[split.axis]:
        names = [part.name for part in split.parts]
        raise ValueError(f"{sharding.spec} shards the axis of its {', '.join(names)}.")
    return NamedSharding(sharding.mesh, PartitionSpec(*(names or None for names in entries)))


def _entries(
    names: tuple[str, ...], sizes: tuple[int, ...], sharding: NamedSharding
) -> Iterator[tuple[str, ...]]:
    """Distributes the mesh axes of a flattened axis over the axes that it flattens."""
    left = list(names)
    for position, size in enumerate(sizes):
        own, rest = [], size
        while left and rest % sharding.mesh.shape[left[0]] == 0:
            rest //= sharding.mesh.shape[left[0]]
            own.append(left.pop(0))
        if left and (rest > 1 or position == len(sizes) - 1):
            devices = math.prod(sharding.mesh.shape[name] for name in names)
            shown = " x ".join(map(str, sizes))
            raise ValueError(f"{sharding.spec} shards {shown} over {devices} devices.")
        yield tuple(own)

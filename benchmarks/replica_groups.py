"""Reads which devices a collective of a compiled program connects."""

import math
import re

import numpy as np

_AXES = r"\[([\d,]+)\]"
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
# Groups as an array: [groups, devices]<=[sizes]T(permutation).
_ARRAY = rf"{_AXES}<={_AXES}(?:T\(([\d,]+)\))?"
_IOTA = re.compile(f"replica_groups={_ARRAY}")
# Groups along some axes of a mesh; device_ids is its array of devices, if they are not in order.
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\) )? ?\{([^}]*)\}")
# An axis, or the part of it that :(before)size cuts out.
_AXIS = re.compile(r"([^,:]+)(?::\((\d+)\)(\d+))?(?:,|$)")


def replica_groups(attributes: str) -> list[list[int]]:
    """Reads the groups of devices that communicate in a collective.

    Args:
      attributes: Text of the instruction after its operands, as XLA writes it.

    Returns:
      Numbers of the devices of each group, in the order of the mesh; pairs for a
      collective-permute. Without any group all devices communicate, and the list is empty.

    Raises:
      ValueError: if the groups have another form.

    Example:
      >>> replica_groups("channel_id=1, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}")
      [[0, 2], [1, 3]]
      >>> replica_groups("replica_groups=mesh['fsdp'=2,'tp'=2] {'tp'}, dimensions={0}")
      [[0, 1], [2, 3]]
    """
    if listed := _LISTED.search(attributes) or _PAIRS.search(attributes):
        return [_integers(group) for group in re.findall(r"\{([\d,]*)\}", listed[1])]
    if found := _IOTA.search(attributes):
        return _iota(*found.groups()).tolist()
    if found := _MESH.search(attributes):
        return _of_mesh(*found.groups())
    if "replica_groups={}" in attributes or "replica_groups=" not in attributes:
        return []
    text = attributes[attributes.index("replica_groups=") :][:80]
    raise ValueError(f"replica_groups: cannot read {text!r}; add this form to replica_groups.py.")


def _iota(shape: str, sizes: str, order: str | None) -> np.ndarray:
    """Counts up in an array of `sizes`, permutes its axes, and reshapes it."""
    dimensions = _integers(sizes)
    devices = np.arange(math.prod(dimensions)).reshape(dimensions)
    return devices.transpose(_integers(order) if order else None).reshape(_integers(shape))


def _of_mesh(axes: str, device_ids: str | None, grouped: str) -> list[list[int]]:
    sizes = {name: int(size) for name, size in (axis.rsplit("=", 1) for axis in axes.split(","))}
    count = math.prod(sizes.values())
    if device_ids is None:
        devices = np.arange(count)
    elif found := re.fullmatch(_ARRAY, device_ids):
        devices = _iota(*found.groups())
    else:
        devices = np.array([int(number) for number in re.findall(r"\d+", device_ids)])
    # Each axis as three: what is before the part that is grouped, the part, and what is after.
    parts = {name: (1, 1, size) for name, size in sizes.items()}
    order = []
    for name, before, size in _AXIS.findall(grouped):
        start, length = (int(before), int(size)) if before else (1, sizes[name])
        parts[name] = (start, length, sizes[name] // (start * length))
        order.append(3 * list(sizes).index(name) + 1)
    others = [axis for axis in range(3 * len(sizes)) if axis not in order]
    array = devices.reshape([size for part in parts.values() for size in part])
    groups = array.transpose(others + order)
    return groups.reshape(-1, math.prod(array.shape[axis] for axis in order)).tolist()


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]

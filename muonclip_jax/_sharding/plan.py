"""Decides which device orthogonalizes which matrix: from shapes and shardings alone, while tracing.

A device that has a block of a matrix cannot run Newton-Schulz alone: every step needs the full
matrix. So matrices are exchanged. Of K equal matrices on N devices, one all-to-all gives each
device K / N full ones, which it orthogonalizes, and a second all-to-all returns the blocks. If
fewer than N matrices remain, several devices share each of them, see `ColumnShards`.
"""

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from muonclip_jax._common.paths import aligned
from muonclip_jax._common.types import ArrayTree
from muonclip_jax._orthogonalize.matrices import Axes, is_tall, sides
from muonclip_jax._orthogonalize.newton_schulz import Orthogonalizer
from muonclip_jax._sharding import strategies
from muonclip_jax._sharding.placement import (
    PASS_SHARDINGS,
    MeshAxes,
    PlacedLeaf,
    Placement,
    find_placement,
)

# Each stack adds two all-to-alls and a Newton-Schulz iteration, which takes time to compile. These
# are the most stacks of a group, and the least numbers that a device has of each.
_MAX_STACKS, _MIN_STACK = 4, 2**20


class Member(NamedTuple):
    """A leaf in a group.

    Attributes:
      leaf: Its index.
      transposed: Whether its matrices are transposed to be sharded as the others.
      count: Matrices of which a device has a shard.
    """

    leaf: int
    transposed: bool
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]


class Group(NamedTuple):
    """Matrices of one shape and sharding, m x n with m <= n.

    Attributes:
      members: The leaves.
      m: Short side.
      n: Long side.
      row_axes: Mesh axes over which the m rows are sharded.
      column_axes: Mesh axes over which the n columns are sharded.
      replica_axes: Mesh axes over which the matrices are replicated, and that share the work.
      full: Matrices that each device orthogonalizes alone.
      chunk: Number of them that are exchanged at once.
      remainder: Matrices that are shared by several devices each.
      sharers: Number of devices that share a matrix of the remainder.
      in_place: Whether the remainder is not exchanged, as its columns are sharded already.
      flops: FLOPs of each device.
      bytes_sent: Bytes that each device sends.
    """

    members: tuple[Member, ...]
    m: int
    n: int
    row_axes: MeshAxes
    column_axes: MeshAxes
    replica_axes: MeshAxes
    full: int
    chunk: int
    remainder: int
    sharers: int
    in_place: bool
    flops: float
    bytes_sent: float

    @property
    def axes(self) -> MeshAxes:
        """The mesh axes over which a matrix is sharded."""
        return (*self.row_axes, *self.column_axes)

    @property
    def count(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Matrices of which a device has a shard."""
        return sum(member.count for member in self.members)

    def stacks(self, sizes: Mapping[str, int]) -> list["Group"]:
        """Splits the group into stacks, each of which is exchanged on its own.

        A large leaf is a stack as it is, without a copy, if its matrices are a multiple of the
        devices. Square matrices are then never transposed. Tall ones are where they are assembled,
        so that m of such a stack is the long side. All other leaves are joined to one stack.

        Args:
          sizes: Size of each mesh axis.
        """
        devices = math.prod(sizes[name] for name in self.axes)
        if not self.axes or self.replica_axes or self.in_place or len(self.members) > _MAX_STACKS:
            return [self]
        matrices = max(1, _MIN_STACK * devices) / max(1, self.m * self.n)  # at least
        alone = [x for x in self.members if x.count >= matrices and x.count % devices == 0]
        others = tuple(member for member in self.members if member not in alone)
        stacks = [self._alone(member, member.count // devices) for member in alone]
        if others:
            full = self.full - sum(stack.full for stack in stacks)
            chunk = strategies.largest_divisor(full, self.chunk)
            stacks.append(self._replace(members=others, full=full, chunk=chunk))
        return stacks

    def _alone(self, member: Member, full: int) -> "Group":
        """Returns the stack of one leaf; see `stacks`."""
        chunk = strategies.largest_divisor(full, self.chunk)
        members = (member._replace(transposed=False),)
        group = self._replace(members=members, full=full, chunk=chunk, remainder=0)
        if not member.transposed:
            return group
        sides = {"m": self.n, "n": self.m}
        return group._replace(row_axes=self.column_axes, column_axes=self.row_axes, **sides)

    def strategy(self) -> str:
        """Describes in words what each device does."""
        if not self.axes:
            return "split over replicas" if self.replica_axes else "local"
        if self.in_place:
            return f"no exchange: each on {self.sharers} devices"
        parts = [f"{self.full} full"] if self.full else []
        parts += [f"{self.remainder} on {self.sharers} devices each"] if self.remainder else []
        return "exchange: " + " + ".join(parts)


class Plan(NamedTuple):
    """Which device orthogonalizes which matrix; `str` of it is a table.

    Attributes:
      mesh: Size of each mesh axis; empty for one device.
      leaves: All leaves, in the order of the pytree.
      groups: The groups, one line each.
      by_xla: Whether `muon` has no plan on this mesh, so that XLA decides how matrices move. Then
        `flops` of each group are those of all devices together.
      placement: How the leaves are sharded; None if there is nothing to exchange.
    """

    mesh: dict[str, int]
    leaves: tuple[PlacedLeaf, ...]
    groups: tuple[Group, ...]
    by_xla: bool = False
    placement: Placement | None = None

    def _head(self) -> str:
        shown = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        flops = sum(group.flops for group in self.groups)
        sent = sum(group.bytes_sent for group in self.groups)
        if self.by_xla:
            return (
                f"mesh {shown}, without `shardings`: XLA decides how matrices move; {flops:.3g} "
                f"FLOPs per step on all devices\n{PASS_SHARDINGS}"
            )
        if not self.mesh:
            return f"one device; per step {flops:.3g} FLOPs"
        return f"mesh {shown}; per device and step {flops:.3g} FLOPs, {sent / 1e6:,.1f} MB sent"

    def __str__(self) -> str:
        """Prints a head with the sums, and one aligned line for each group."""
        head = self._head()
        lines = [("matrices", "rows", "columns", "on each device", "FLOPs", "MB sent", "leaves")]
        for g in self.groups:
            rows, columns = (
                f"{size}" + (f" / {'.'.join(axes)}" if axes else "")
                for size, axes in ((g.m, g.row_axes), (g.n, g.column_axes))
            )
            first, others = self.leaves[g.members[0].leaf].path, len(g.members) - 1
            leaves = first + (f" and {others} more" if others else "")
            strategy, sent = g.strategy(), f"{g.bytes_sent / 1e6:,.1f}"
            strategy, sent = ("XLA decides", "unknown") if self.by_xla else (strategy, sent)
            lines.append((str(g.count), rows, columns, strategy, f"{g.flops:.3g}", sent, leaves))
        return f"{head}\n{aligned(lines)}"


def plan_for(
    caller: str,
    tree: ArrayTree,
    axes: Sequence[Axes],
    shardings: Mapping[str, Any],
    orthogonalize: Orthogonalizer,
) -> Plan | None:
    """Plans the orthogonalization of sharded leaves.

    Args:
      caller: Name of the public function that was called.
      tree: Arrays, traced or not.
      axes: The axes of each leaf as a batch of matrices.
      shardings: The shardings that the user passed, by path; may be empty.
      orthogonalize: Newton-Schulz with its settings.

    Returns:
      The plan, for `exchange.orthogonalize`. None if every device has full matrices or XLA decides
      how they move: then call `matrices.orthogonalize_leaves`.

    Raises:
      ValueError: see `find_placement`.
    """
    placement = find_placement(caller, tree, axes, shardings)
    if placement is None:
        return None
    orthogonalize = orthogonalize.on(placement.platform, placement.device_kind)
    plan = make_plan(
        placement.leaves,
        placement.sizes,
        orthogonalize.flops,
        orthogonalize.compute_dtype,
        functools.partial(orthogonalize.flops, is_shared=True),
    )
    return plan._replace(placement=placement)


def make_plan(
    leaves: Sequence[PlacedLeaf],
    mesh: Mapping[str, int],
    flops: Callable[[int, int, Any], float],
    transfer_dtype: Callable[[Any], Any],
    shared_flops: Callable[[int, int, Any], float] | None = None,
) -> Plan:
    """Plans the orthogonalization of leaves.

    Args:
      leaves: The leaves.
      mesh: Size of each mesh axis.
      flops: FLOPs of one matrix, from m, n and the dtype of the leaf.
      transfer_dtype: The dtype in which matrices are exchanged, from the dtype of the leaf.
      shared_flops: FLOPs of one matrix that devices share, of all of them; None for `flops`.

    Returns:
      The plan.

    Example:
      >>> import numpy as np
      >>> axes, spec = Axes((0,), (1,), (2,)), ((), ("x",), ())
      >>> leaf = PlacedLeaf("w", (4, 8, 8), np.dtype("float32"), axes, spec)
      >>> plan = make_plan([leaf], {"x": 4}, lambda m, n, dtype: 30.0 * m**3, lambda dtype: dtype)
      >>> plan.groups[0].strategy()
      'exchange: 1 full'
    """
    mesh = {name: size for name, size in mesh.items() if size > 1}
    kinds: dict[Hashable, list[Member]] = {}
    for i, leaf in enumerate(leaves):
        member, kind = _orient(i, leaf, mesh)
        if _shard_bytes(leaf, mesh, transfer_dtype) > strategies.MAX_EXCHANGED_BYTES:
            kind = (kind, i)  # a group of its own: the stack of a group is a copy of its leaves
        kinds.setdefault(kind, []).append(member)
    shared_flops = shared_flops or flops
    groups = [
        _group(leaves, tuple(members), mesh, (flops, shared_flops), transfer_dtype)
        for members in kinds.values()
    ]
    return Plan(dict(mesh), tuple(leaves), tuple(groups))


def _orient(i: int, leaf: PlacedLeaf, mesh: Mapping[str, int]) -> tuple[Member, Hashable]:
    """Makes the matrices of a leaf wide; transposes square ones to be sharded as others are.

    The second result is equal for leaves of one group.
    """
    m, n = sides(leaf.shape, leaf.axes)
    row_axes, column_axes = leaf.mesh_axes(leaf.axes.reduction), leaf.mesh_axes(leaf.axes.output)
    batch_axes = leaf.mesh_axes(leaf.axes.batch)
    transposed = is_tall(leaf.shape, leaf.axes) or (m == n and row_axes > column_axes)
    if transposed:
        m, n, row_axes, column_axes = n, m, column_axes, row_axes
    total = math.prod(leaf.shape[axis] for axis in leaf.axes.batch)
    count = total // math.prod(mesh[name] for name in batch_axes)
    kind = (m, n, row_axes, column_axes, tuple(sorted(batch_axes)), leaf.dtype)
    return Member(i, transposed, count), kind


def _shard_bytes(
    leaf: PlacedLeaf, mesh: Mapping[str, int], transfer_dtype: Callable[[Any], Any]
) -> int:
    """Counts the bytes of a device's shard of a leaf in the transfer dtype."""
    shards = math.prod(mesh[name] for names in leaf.spec for name in names)
    return math.prod(leaf.shape) * transfer_dtype(leaf.dtype).itemsize // shards


def _group(
    leaves: Sequence[PlacedLeaf],
    members: tuple[Member, ...],
    mesh: Mapping[str, int],
    flops: tuple[Callable[[int, int, Any], float], Callable[[int, int, Any], float]],
    transfer_dtype: Callable[[Any], Any],
) -> Group:
    """Finds the cheapest strategy for one group."""
    leaf, transposed = leaves[members[0].leaf], members[0].transposed
    m, n = sorted(sides(leaf.shape, leaf.axes))
    row_axes, column_axes = leaf.mesh_axes(leaf.axes.reduction), leaf.mesh_axes(leaf.axes.output)
    row_axes, column_axes = (column_axes, row_axes) if transposed else (row_axes, column_axes)
    used = (*row_axes, *column_axes, *leaf.mesh_axes(leaf.axes.batch))
    alone, shared = (count(m, n, leaf.dtype) for count in flops)
    matrix = strategies.Matrix(m, n, alone, transfer_dtype(leaf.dtype).itemsize, shared)
    count = sum(member.count for member in members)
    shards = math.prod(mesh[name] for name in (*row_axes, *column_axes))
    replica_axes = tuple(name for name in mesh if name not in used)
    replicas = math.prod(mesh[name] for name in replica_axes)
    own = -(-count // replicas)
    gathered = own * (replicas - 1) * matrix.bytes / shards
    if (count - own) * matrix.flops / shards <= strategies.FLOPS_PER_BYTE * gathered:
        replica_axes, own, gathered = (), count, 0.0  # one replica, or not worth the communication
    width = n // math.prod(mesh[name] for name in column_axes)
    best = strategies.cheapest(matrix, own, shards, width, bool(row_axes))
    return Group(
        members=members,
        m=m,
        n=n,
        row_axes=row_axes,
        column_axes=column_axes,
        replica_axes=replica_axes,
        full=best.full,
        chunk=strategies.chunk_size(best.full, matrix.bytes),
        remainder=best.remainder,
        sharers=best.sharers,
        in_place=best.in_place,
        flops=best.flops,
        bytes_sent=best.bytes_sent + gathered,
    )

"""Decides which devices orthogonalize which matrix: from shapes and shardings alone, while tracing.

Where a mesh divides the sides of a matrix, each device has a block of it, and Newton-Schulz needs
all of it at every step. So whole matrices move: of K equal ones on N devices, each device gets
K / N by one all-to-all, orthogonalizes them, and another all-to-all takes the blocks home.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from muonclip_jax._common.paths import aligned
from muonclip_jax._orthogonalize.matrix_axes import Axes, sides

MeshAxes: TypeAlias = tuple[str, ...]

# Bytes of the matrices that move at once. Newton-Schulz holds a few times as many.
MOST_BYTES_MOVED = 2**28

# FLOPs that a device could do while it sends one byte: below it, work is cheaper to repeat than to
# divide. Arithmetic from data sheets: TPU v5p 459e12 / 600e9 = 765, H100 over NVLink 989e12 / 900e9
# = 1100. What is decided by it is far from the edge for matrices of more than a few hundred rows.
FLOPS_PER_BYTE = 1000

# The fix for an Auto mesh.
PASS_SHARDINGS = (
    "Pass the shardings of the parameters: shardings=jax.tree.map(lambda x: x.sharding, params)."
)


class Placed(NamedTuple):
    """One leaf, and where the mesh has put its pieces.

    Attributes:
      path: Where the leaf is in the tree.
      shape: Its shape.
      dtype: Its dtype.
      axes: Its axes as those of a batch of matrices.
      spec: For each axis, the mesh axes that divide it, the slowest first.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: Axes
    spec: tuple[MeshAxes, ...]

    def mesh_axes(self, axes: Sequence[int]) -> MeshAxes:
        """Lists the mesh axes that divide some axes of the leaf, together one side."""
        return tuple(name for axis in axes for name in self.spec[axis])


class Member(NamedTuple):
    """A leaf in a group.

    Attributes:
      leaf: Which.
      transposed: Whether its matrices are turned to lie as those of the others.
      count: Matrices of which a device has a piece.
    """

    leaf: int
    transposed: bool
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]


class Group(NamedTuple):
    """Matrices of one shape that lie on the mesh in one way, m x n with m <= n.

    Attributes:
      members: The leaves.
      m: Short side.
      n: Long side.
      rows: Mesh axes that divide the m rows.
      columns: Mesh axes that divide the n columns.
      replicas: Mesh axes along which every device has the same pieces; those that share the work.
      whole: Matrices that each device orthogonalizes alone.
      chunk: How many of them move at once.
      rest: Matrices that are left, each orthogonalized by a team.
      team: Devices in a team.
      stays: Whether the rest stays where it is, as every team has its columns already.
      flops: Of each device.
      sent: Bytes that each device sends.
    """

    members: tuple[Member, ...]
    m: int
    n: int
    rows: MeshAxes
    columns: MeshAxes
    replicas: MeshAxes
    whole: int
    chunk: int
    rest: int
    team: int
    stays: bool
    flops: float
    sent: float

    @property
    def axes(self) -> MeshAxes:
        """The mesh axes over which a matrix is in pieces."""
        return (*self.rows, *self.columns)

    @property
    def count(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Matrices of which a device has a piece."""
        return sum(member.count for member in self.members)

    def strategy(self) -> str:
        """Says in words what happens."""
        if not self.axes:
            return "replicas share" if self.replicas else "local"
        if self.stays:
            return f"teams of {self.team}, nothing moves"
        parts = [f"{self.whole} whole"] if self.whole else []
        parts += [f"{self.rest} by teams of {self.team}"] if self.rest else []
        return "move: " + " + ".join(parts)


class Plan(NamedTuple):
    """Which device orthogonalizes which matrix; `str` of it is a table.

    Attributes:
      mesh: Size of each mesh axis; empty for one device.
      leaves: All leaves, in the order of the pytree.
      groups: What happens to them, one row each.
      by_xla: Whether `muon` has no plan on this mesh, so that XLA decides how matrices move. Then
        `flops` of each group are those of all devices together.
    """

    mesh: dict[str, int]
    leaves: tuple[Placed, ...]
    groups: tuple[Group, ...]
    by_xla: bool = False

    def _head(self) -> str:
        shown = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        flops, sent = (sum(getattr(g, what) for g in self.groups) for what in ("flops", "sent"))
        if self.by_xla:
            return (
                f"mesh {shown}, without `shardings`: XLA decides how matrices move; {flops:.3g} "
                f"FLOPs per step on all devices\n{PASS_SHARDINGS}"
            )
        if not self.mesh:
            return f"one device; per step {flops:.3g} FLOPs"
        return f"mesh {shown}; per device and step {flops:.3g} FLOPs, {sent / 1e6:,.1f} MB sent"

    def __str__(self) -> str:
        """Aligns one line a group under a head, with the sums."""
        head = self._head()
        lines = [("matrices", "rows", "columns", "on each device", "FLOPs", "MB sent", "leaves")]
        for g in self.groups:
            rows, columns = (
                f"{size}" + (f" / {'.'.join(axes)}" if axes else "")
                for size, axes in ((g.m, g.rows), (g.n, g.columns))
            )
            first, others = self.leaves[g.members[0].leaf].path, len(g.members) - 1
            leaves = first + (f" and {others} more" if others else "")
            way, sent = g.strategy(), f"{g.sent / 1e6:,.1f}"
            way, sent = ("XLA decides", "unknown") if self.by_xla else (way, sent)
            work = (way, f"{g.flops:.3g}", sent)
            lines.append((str(g.count), rows, columns, *work, leaves))
        return f"{head}\n{aligned(lines)}"


def make_plan(
    leaves: Sequence[Placed],
    mesh: Mapping[str, int],
    work: Callable[[int, int, Any], float],
    wire: Callable[[Any], Any],
) -> Plan:
    """Plans the orthogonalization of a tree.

    Args:
      leaves: The leaves.
      mesh: Size of each mesh axis.
      work: FLOPs of one matrix, from m, n and the dtype of the leaf.
      wire: The dtype in which matrices of a dtype move.

    Returns:
      The plan.

    Example:
      >>> axes, spec = Axes((0,), (1,), (2,)), ((), ("x",), ())
      >>> leaf = Placed("w", (4, 8, 8), np.dtype("float32"), axes, spec)
      >>> plan = make_plan([leaf], {"x": 4}, lambda m, n, dtype: 30.0 * m**3, lambda dtype: dtype)
      >>> plan.groups[0].strategy()
      'move: 1 whole'
    """
    mesh = {name: size for name, size in mesh.items() if size > 1}
    kinds: dict[Hashable, list[Member]] = {}
    for i, leaf in enumerate(leaves):
        member, kind = _orient(i, leaf, mesh)
        kinds.setdefault(_alone_if_large(i, leaf, kind, mesh, wire), []).append(member)
    groups = [_group(leaves, tuple(members), mesh, work, wire) for members in kinds.values()]
    return Plan(dict(mesh), tuple(leaves), tuple(groups))


def _orient(i: int, leaf: Placed, mesh: Mapping[str, int]) -> tuple[Member, Hashable]:
    """Turns the matrices of a leaf so that as many leaves as possible lie alike."""
    m, n = sides(leaf.shape, leaf.axes)
    rows, columns = leaf.mesh_axes(leaf.axes.reduction), leaf.mesh_axes(leaf.axes.output)
    batch = leaf.mesh_axes(leaf.axes.batch)
    transposed = m > n or (m == n and rows > columns)
    if transposed:
        m, n, rows, columns = n, m, columns, rows
    total = math.prod(leaf.shape[axis] for axis in leaf.axes.batch)
    count = total // math.prod(mesh[name] for name in batch)
    return Member(i, transposed, count), (m, n, rows, columns, tuple(sorted(batch)), leaf.dtype)


def _alone_if_large(
    i: int, leaf: Placed, kind: Hashable, mesh: Mapping[str, int], wire: Callable[[Any], Any]
) -> Hashable:
    """Keeps a large leaf out of the stack of the others, which would be a copy of it."""
    divided = math.prod(mesh[name] for names in leaf.spec for name in names)
    held = math.prod(leaf.shape) * wire(leaf.dtype).itemsize // divided
    return (kind, i) if held > MOST_BYTES_MOVED else kind


def _group(
    leaves: Sequence[Placed],
    members: tuple[Member, ...],
    mesh: Mapping[str, int],
    work: Callable[[int, int, Any], float],
    wire: Callable[[Any], Any],
) -> Group:
    """Finds the cheapest way for one group."""
    leaf, transposed = leaves[members[0].leaf], members[0].transposed
    m, n = sorted(sides(leaf.shape, leaf.axes))
    rows, columns = leaf.mesh_axes(leaf.axes.reduction), leaf.mesh_axes(leaf.axes.output)
    rows, columns = (columns, rows) if transposed else (rows, columns)
    batch = leaf.mesh_axes(leaf.axes.batch)
    matrix = _Matrix(m, n, work(m, n, leaf.dtype), wire(leaf.dtype).itemsize)
    count = sum(member.count for member in members)
    pieces = math.prod(mesh[name] for name in (*rows, *columns))
    replicas = tuple(name for name in mesh if name not in (*rows, *columns, *batch))
    copies = math.prod(mesh[name] for name in replicas)
    mine = -(-count // copies)
    gathered = mine * (copies - 1) * matrix.bytes / pieces
    if (count - mine) * matrix.flops / pieces <= FLOPS_PER_BYTE * gathered:
        replicas, mine, gathered = (), count, 0.0  # nothing to share, or not worth the sending
    width = n // math.prod(mesh[name] for name in columns)
    way = min(_ways(matrix, mine, pieces, width, bool(rows)), key=lambda way: way.cost)
    return Group(
        members=members,
        m=m,
        n=n,
        rows=rows,
        columns=columns,
        replicas=replicas,
        whole=way.whole,
        chunk=_chunk(way.whole, matrix.bytes),
        rest=way.rest,
        team=way.team,
        stays=way.stays,
        flops=way.flops,
        sent=way.sent + gathered,
    )


class _Matrix(NamedTuple):
    """One matrix of a group: its sides, FLOPs, and bytes of a number on the wire."""

    m: int
    n: int
    flops: float
    item: int

    @property
    def bytes(self) -> int:
        return self.m * self.n * self.item

    def exchanged(self) -> int:
        """Bytes that a member of a team sends: two sums of X Xᴴ, and fourteen products' rows."""
        # Five steps in Gram form: two windows; 3 A B for each step but the first, which has 1, and
        # the last, which needs no new R. Sums are unrounded and go round twice.
        return self.m**2 * (2 * 2 * 4 + 14 * self.item)


class _Way(NamedTuple):
    """How the matrices of a group could be divided among the devices that hold their pieces."""

    whole: int
    rest: int
    team: int
    stays: bool
    flops: float
    sent: float

    @property
    def cost(self) -> float:
        return self.flops + FLOPS_PER_BYTE * self.sent


def _ways(matrix: _Matrix, count: int, pieces: int, width: int, rows_divided: bool) -> list[_Way]:
    """Lists the ways to orthogonalize `count` matrices that lie in so many pieces."""
    if pieces == 1:
        return [_Way(count, 0, 1, False, count * matrix.flops, 0.0)]
    whole, rest = divmod(count, pieces)
    padded = whole + (rest > 0)
    moved = 2 * matrix.bytes / pieces * (pieces - 1) / pieces  # for each matrix
    ways = [_Way(padded, 0, 1, False, padded * matrix.flops, padded * pieces * moved)]
    teams = [p for p in _divisors(pieces) if rest and 1 < p <= pieces // rest and width % p == 0]
    for team in teams:
        flops = (whole + 1 / team) * matrix.flops
        sent = (whole * pieces + pieces // team) * moved + matrix.exchanged()
        ways.append(_Way(whole, rest, team, False, flops, sent))
    if not rows_divided:
        flops, sent = count * matrix.flops / pieces, count * matrix.exchanged()
        ways.append(_Way(0, count, pieces, True, flops, sent))
    return ways


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _chunk(whole: int, bytes_each: int) -> int:
    """Finds how many matrices move at once: equal parts, none of more than `MOST_BYTES_MOVED`."""
    fitting = [d for d in _divisors(whole) if d * bytes_each <= MOST_BYTES_MOVED]
    return max(fitting, default=1) if whole else 0

"""Carries out a plan: moves pieces of matrices between devices, and orthogonalizes them there.

Everything happens inside of `jax.shard_map`, on the pieces that a device has: k x m_l x n_l, of
R = m / m_l rows of pieces and C = n / n_l columns of pieces. How the pieces of a merged side follow
each other does not matter: NS(P X Q) = P NS(X) Q for permutations, and the way back undoes them.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from muonclip_jax._orthogonalize.iterations import nonzero
from muonclip_jax._orthogonalize.matrix_axes import Axes, from_matrices, to_matrices
from muonclip_jax._orthogonalize.newton_schulz import Orthogonalizer, Traced
from muonclip_jax._orthogonalize.team import Team
from muonclip_jax._sharding.placement import Placements
from muonclip_jax._sharding.plan import Group, Plan, make_plan


def plan_for(where: Placements, orthogonalize: Orthogonalizer) -> Plan:
    """Plans the orthogonalization of sharded leaves."""
    orthogonalize = orthogonalize._replace(platform=where.platform)
    return make_plan(
        where.leaves,
        where.sizes,
        work=lambda m, n, dtype: orthogonalize.flops((m, n), dtype),
        wire=orthogonalize.compute_dtype,
    )


def exchange(
    leaves: Sequence[jax.Array], where: Placements, plan: Plan, orthogonalize: Orthogonalizer
) -> list[jax.Array]:
    """Orthogonalizes the matrices of all leaves as planned, group by group.

    Args:
      leaves: Batches of matrices.
      where: How they are sharded.
      plan: The plan for them.
      orthogonalize: Newton-Schulz with its settings.

    Returns:
      Each of `leaves` orthogonalized, in its shape and sharding.
    """
    orthogonalize = orthogonalize._replace(platform=where.platform)
    results: list[Any] = [None] * len(leaves)
    # An argument: what is traced must not be closed over.
    traced = jax.tree.map(jnp.asarray, orthogonalize.traced)
    for group in plan.groups:
        indices = [member.leaf for member in group.members]
        done = _run(
            traced,
            tuple(leaves[i] for i in indices),
            mesh=where.mesh,
            axis_names=where.axis_names,
            specs=tuple(where.specs[i] for i in indices),
            axes=tuple(plan.leaves[i].axes for i in indices),
            group=group,
            orthogonalize=orthogonalize._replace(traced=Traced(None)),
        )
        for i, result in zip(indices, done, strict=True):
            results[i] = result
    return results


# jit: outside of one, shard_map would compile every operation on its own.
@functools.partial(
    jax.jit, static_argnames=("mesh", "axis_names", "specs", "axes", "group", "orthogonalize")
)
def _run(
    traced: Traced,
    leaves: tuple[jax.Array, ...],
    *,
    mesh: Any,
    axis_names: frozenset[str],
    specs: tuple[PartitionSpec, ...],
    **settings: Any,
) -> tuple[jax.Array, ...]:
    """Orthogonalizes the matrices of a group."""
    return jax.shard_map(
        functools.partial(_on_one_device, sizes=mesh.shape, **settings),
        mesh=mesh,
        axis_names=axis_names,
        in_specs=(PartitionSpec(), *specs),
        out_specs=specs,
        # What replicas gather is equal on all of them, which the type system cannot see.
        check_vma=False,
    )(traced, *leaves)


def _on_one_device(
    traced: Traced,
    *blocks: jax.Array,
    sizes: Mapping[str, int],
    axes: tuple[Axes, ...],
    group: Group,
    orthogonalize: Orthogonalizer,
) -> tuple[jax.Array, ...]:
    """Orthogonalizes the matrices of a group, seen from one device."""
    orthogonalize = orthogonalize._replace(traced=traced)
    moves = bool(group.axes or group.replicas)
    wire = orthogonalize.compute_dtype(blocks[0].dtype) if moves else blocks[0].dtype
    stacks = []
    for member, a, block in zip(group.members, axes, blocks, strict=True):
        x = to_matrices(block, a)
        x = x.reshape(member.count, *x.shape[-2:])
        x = _kept(_to_wire(x, wire, group))
        stacks.append(x.mT if member.transposed else x)
    x = stacks[0] if len(stacks) == 1 else jnp.concatenate(stacks)
    x = _shared_by_replicas(x, group, sizes, orthogonalize)
    results, start = [], 0
    for member, a, block in zip(group.members, axes, blocks, strict=True):
        part = jax.lax.slice_in_dim(x, start, start + member.count)
        part = part.mT if member.transposed else part
        results.append(_kept(from_matrices(part, a, block.shape)).astype(block.dtype))
        start += member.count
    return tuple(results)


def _to_wire(x: jax.Array, wire: Any, group: Group) -> jax.Array:
    """Casts to the dtype in which matrices move, which may not have room for every scale."""
    if jnp.finfo(wire).maxexp < jnp.finfo(x.dtype).maxexp:
        largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
        x = x / nonzero(jax.lax.pmax(largest, group.axes) if group.axes else largest)
    return x.astype(wire)


def _shared_by_replicas(
    x: jax.Array, group: Group, sizes: Mapping[str, int], orthogonalize: Orthogonalizer
) -> jax.Array:
    """Lets each replica orthogonalize its part of the stack, and gathers the parts."""
    if not group.replicas:
        return _orthogonalized(x, group, sizes, orthogonalize)
    copies = math.prod(sizes[name] for name in group.replicas)
    mine = -(-len(x) // copies)
    padded = _padded(x, mine * copies)
    start = mine * jax.lax.axis_index(group.replicas)
    part = jax.lax.dynamic_slice_in_dim(padded, start, mine)
    part = _orthogonalized(part, group, sizes, orthogonalize)
    return jax.lax.all_gather(part, group.replicas, tiled=True)[: len(x)]


def _orthogonalized(
    x: jax.Array, group: Group, sizes: Mapping[str, int], orthogonalize: Orthogonalizer
) -> jax.Array:
    """Orthogonalizes a stack of pieces."""
    R, C = (math.prod(sizes[name] for name in axes) for axes in (group.rows, group.columns))
    if R * C == 1:
        return orthogonalize(x)
    if group.stays:
        team = Team(group.axes, group.team, None)
        return jax.lax.map(lambda X: orthogonalize.shared(X, team, (group.m, group.n)), x)
    # One buffer for all: what has been orthogonalized is put back where it was.
    cut = group.whole * R * C
    done = _padded(x, max(len(x), cut))
    if group.whole:
        done = _by_whole_matrices(done, group, (R, C), orthogonalize)
    if group.rest:
        rest = _by_teams(done[cut:], group, (R, C), orthogonalize)
        done = jax.lax.dynamic_update_slice_in_dim(done, rest, cut, 0)
    return done[: len(x)]


def _by_whole_matrices(
    x: jax.Array, group: Group, grid: tuple[int, int], orthogonalize: Orthogonalizer
) -> jax.Array:
    """Moves the first matrices to the devices whole, some at a time, and back."""
    devices = math.prod(grid)
    height = group.chunk * devices

    def there_and_back(pieces):
        moved = _exchange(pieces.reshape(devices, group.chunk, *pieces.shape[1:]), group)
        X = orthogonalize(_kept(_assembled(moved.swapaxes(0, 1), grid)))
        home = _exchange(_taken_apart(_kept(X), grid).swapaxes(0, 1), group)
        return home.reshape(pieces.shape)

    def step(i, x):
        pieces = jax.lax.dynamic_slice_in_dim(x, i * height, height)
        return jax.lax.dynamic_update_slice_in_dim(x, there_and_back(pieces), i * height, 0)

    if height == len(x):
        return there_and_back(x)
    if group.chunk == group.whole:
        return step(0, x)
    return jax.lax.fori_loop(0, group.whole // group.chunk, step, x)


def _by_teams(
    x: jax.Array, group: Group, grid: tuple[int, int], orthogonalize: Orthogonalizer
) -> jax.Array:
    """Moves each matrix to a team, whose members get some columns of every piece, and back."""
    devices, p = math.prod(grid), group.team
    teams, count = devices // p, len(x)
    rows, columns = x.shape[1], x.shape[2] // p
    x = _padded(x, teams).reshape(teams, rows, p, columns).swapaxes(1, 2)
    moved = _exchange(x.reshape(devices, rows, columns), group)
    members = tuple(tuple(range(i * p, (i + 1) * p)) for i in range(teams))
    team = Team(group.axes, p, members)
    X = orthogonalize.shared(_kept(_assembled(moved, grid)), team, (group.m, group.n))
    home = _exchange(_taken_apart(_kept(X), grid), group).reshape(teams, p, rows, columns)
    return home.swapaxes(1, 2).reshape(teams, rows, p * columns)[:count]


def _exchange(x: jax.Array, group: Group) -> jax.Array:
    """Sends entry i to device i, and puts what device j has sent at j."""
    return jax.lax.all_to_all(x, group.axes, 0, 0, tiled=True)


def _kept(X: jax.Array) -> jax.Array:
    """Makes the compiler lay pieces together in 16 bits, by copies alone.

    It would cast them to float32 first, and compile what is before the rounding into each copy.
    """
    return jax.lax.optimization_barrier(X)


def _assembled(pieces: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Makes (..., m, n) matrices of (..., R C, m_l, n_l) pieces."""
    *batch, _, height, width = pieces.shape
    R, C = grid
    # One axis at a time: under jax.vmap, jax 0.10 reshapes no more of a sharded array at once.
    pieces = pieces.reshape(*batch, R, C, height, width).swapaxes(-3, -2)
    return pieces.reshape(*batch, R * height, C, width).reshape(*batch, R * height, C * width)


def _taken_apart(X: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Undoes `_assembled`."""
    *batch, m, n = X.shape
    R, C = grid
    pieces = X.reshape(*batch, m, C, n // C).reshape(*batch, R, m // R, C, n // C)
    return pieces.swapaxes(-3, -2).reshape(*batch, R * C, m // R, n // C)


def _padded(x: jax.Array, count: int) -> jax.Array:
    """Fills a stack up with zero matrices, which stay zero."""
    return x if len(x) == count else jnp.pad(x, ((0, count - len(x)), (0, 0), (0, 0)))

"""Executes a plan: exchanges shards for full matrices, orthogonalizes them, and returns the shards.

Everything is inside `jax.shard_map`, on the shards of one device. A worked example: 13 matrices of
8 x 16, P("x", "y") on a mesh x=2, y=2. That is a grid of 2 x 2 shards on 4 devices, each of which
has [13, 4, 8]. By the plan each device orthogonalizes 3 full matrices alone, and all 4 share 1.

    _full      [12, 4, 8]      the shards of the first 3 x 4 matrices
               [4, 3, 4, 8]    entry i goes to device i, in an all-to-all;
               [4, 3, 4, 8]    then entry j has come from device j
               [3, 8, 16]      the shards assembled to 3 matrices, which are orthogonalized
    _shared    [1, 4, 8]       the shard of the last matrix
               [4, 4, 2]       entry i, some columns of it, goes to device i, in an all-to-all;
               [4, 4, 2]       then entry j has come from device j
               [8, 4]          assembled: all rows and 4 of the 16 columns, see `ColumnShards`

Both ways back mirror this. The columns of [8, 4] are permuted columns of the matrix, and a
merged side may be sharded over any of its axes. Neither matters: with permutations P and Q,
NS(P X Q) = P NS(X) Q, and the way back undoes them.

A leaf of 12 matrices would be exchanged on its own, without a copy; see `Group.stacks`. With the
kernel of `products="pallas"` on TPU, `tpu_shards.py` assembles the shards.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from muonclip_jax._common.types import Scalar
from muonclip_jax._orthogonalize.column_shards import ColumnShards
from muonclip_jax._orthogonalize.divisors import nonzero
from muonclip_jax._orthogonalize.matrices import Axes, from_matrices, to_matrices
from muonclip_jax._orthogonalize.newton_schulz import Orthogonalizer
from muonclip_jax._sharding.plan import Group, Plan

# Rows and columns of a tile in the memory of a TPU.
_ROWS, _LANES = 8, 128


def orthogonalize(
    leaves: Sequence[jax.Array], plan: Plan, orthogonalize: Orthogonalizer, eps: Scalar
) -> list[jax.Array]:
    """Orthogonalizes the matrices of sharded leaves.

    Args:
      leaves: Arrays of any shape.
      plan: The plan of `plan_for` for these leaves.
      orthogonalize: Newton-Schulz with its settings.
      eps: See `newton_schulz`.

    Returns:
      Each leaf orthogonalized, in its shape and sharding.
    """
    placement: Any = plan.placement
    orthogonalize = orthogonalize.on(placement.platform, placement.device_kind)
    eps = jnp.asarray(eps)
    results: dict[int, jax.Array] = {}
    for group in plan.groups:
        indices = [member.leaf for member in group.members]
        done = _group(
            tuple(leaves[i] for i in indices),
            orthogonalize,
            eps,
            mesh=placement.mesh,
            axis_names=placement.axis_names,
            specs=tuple(placement.specs[i] for i in indices),
            axes=tuple(plan.leaves[i].axes for i in indices),
            group=group,
        )
        results |= zip(indices, done, strict=True)
    return [results[i] for i in range(len(leaves))]


# jit: outside of one, shard_map would compile every operation on its own.
@functools.partial(jax.jit, static_argnames=("mesh", "axis_names", "specs", "axes", "group"))
def _group(
    leaves: tuple[jax.Array, ...],
    orthogonalize: Orthogonalizer,
    eps: jax.Array,
    *,
    mesh: Any,
    axis_names: frozenset[str],
    specs: tuple[PartitionSpec, ...],
    axes: tuple[Axes, ...],
    group: Group,
) -> tuple[jax.Array, ...]:
    """Orthogonalizes the matrices of a group."""

    # Traced settings and eps are arguments, as shard_map accepts no traced values from outside.
    def on_one_device(shards, orthogonalize, eps):
        is_exchanged = group.axes or group.replica_axes
        dtype = shards[0].dtype
        transfer_dtype = orthogonalize.compute_dtype(dtype) if is_exchanged else dtype
        leaves = [member.leaf for member in group.members]
        results: dict[int, jax.Array] = {}
        for stack in group.stacks(mesh.shape):
            places = [leaves.index(member.leaf) for member in stack.members]
            of_stack = [shards[i] for i in places], [axes[i] for i in places], stack
            x = _stacked(*of_stack, transfer_dtype)
            x = _split_over_replicas(x, stack, mesh.shape, orthogonalize, eps)
            results |= zip(places, _unstacked(x, *of_stack), strict=True)
        return tuple(results[i] for i in range(len(shards)))

    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        axis_names=axis_names,
        in_specs=(specs, PartitionSpec(), PartitionSpec()),
        out_specs=specs,
        # Gathered arrays are equal on all replicas, which the type system cannot see.
        check_vma=False,
    )(leaves, orthogonalize, eps)


def _stacked(
    shards: Sequence[jax.Array], axes: Sequence[Axes], group: Group, transfer_dtype: Any
) -> jax.Array:
    """Stacks the shards of all matrices of a group, [K, m / R, n / C], in the transfer dtype."""
    stacks = []
    for member, a, shard in zip(group.members, axes, shards, strict=True):
        x = to_matrices(shard, a, member.transposed)
        x = x.reshape(member.count, *x.shape[-2:])
        stacks.append(_materialized(_cast(x, transfer_dtype, group)))
    return stacks[0] if len(stacks) == 1 else jnp.concatenate(stacks)


def _unstacked(
    x: jax.Array, shards: Sequence[jax.Array], axes: Sequence[Axes], group: Group
) -> tuple[jax.Array, ...]:
    """Undoes `_stacked`, in the shapes and dtypes of `shards`."""
    results, start = [], 0
    for member, a, shard in zip(group.members, axes, shards, strict=True):
        part = jax.lax.slice_in_dim(x, start, start + member.count)
        if member.transposed:  # otherwise XLA transposes all of x
            part = _materialized(part)
        part = _materialized(from_matrices(part, a, shard.shape, member.transposed))
        results.append(part.astype(shard.dtype))
        start += member.count
    return tuple(results)


def _cast(x: jax.Array, transfer_dtype: Any, group: Group) -> jax.Array:
    """Casts to the transfer dtype, after scaling each matrix if its range is smaller."""
    if jnp.finfo(transfer_dtype).maxexp < jnp.finfo(x.dtype).maxexp:
        largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
        x = x / nonzero(jax.lax.pmax(largest, group.axes) if group.axes else largest)
    return x.astype(transfer_dtype)


def _split_over_replicas(
    x: jax.Array, group: Group, sizes: Mapping[str, int], orthogonalize: Orthogonalizer, eps: Scalar
) -> jax.Array:
    """Orthogonalizes a part of the stack on each replica, and gathers the parts."""
    if not group.replica_axes:
        return _orthogonalized(x, group, sizes, orthogonalize, eps)
    replicas = math.prod(sizes[name] for name in group.replica_axes)
    count = -(-len(x) // replicas)
    padded = _padded(x, count * replicas)
    start = count * jax.lax.axis_index(group.replica_axes)
    part = jax.lax.dynamic_slice_in_dim(padded, start, count)
    part = _orthogonalized(part, group, sizes, orthogonalize, eps)
    return jax.lax.all_gather(part, group.replica_axes, tiled=True)[: len(x)]


def _orthogonalized(
    x: jax.Array, group: Group, sizes: Mapping[str, int], orthogonalize: Orthogonalizer, eps: Scalar
) -> jax.Array:
    """Orthogonalizes a stack of shards by the strategy of the group."""
    R = math.prod(sizes[name] for name in group.row_axes)
    C = math.prod(sizes[name] for name in group.column_axes)
    f = functools.partial(orthogonalize, eps=eps)
    if R * C == 1:
        return f(x)
    if group.in_place:
        shards = ColumnShards(group.axes, group.sharers, None)
        return jax.lax.map(lambda X: f(X, shards=shards), x)
    # One buffer: orthogonalized shards overwrite the others.
    end = group.full * R * C
    done = _padded(x, max(len(x), end))
    if group.full:
        done = _full(done, group, (R, C), orthogonalize, eps)
    if group.remainder:
        remainder = _shared(done[end:], group, (R, C), f)
        done = jax.lax.dynamic_update_slice_in_dim(done, remainder, end, 0)
    return done[: len(x)]


def _full(
    x: jax.Array, group: Group, grid: tuple[int, int], orthogonalize: Orthogonalizer, eps: Scalar
) -> jax.Array:
    """Orthogonalizes the first matrices, full ones on each device, some of them at a time."""
    devices = math.prod(grid)
    count = group.chunk * devices

    def one_chunk(shards):
        there = _all_to_all(shards.reshape(devices, group.chunk, *shards.shape[1:]), group)
        done = _of_shards(there.swapaxes(0, 1), group, grid, orthogonalize, eps)
        return _all_to_all(done.swapaxes(0, 1), group).reshape(shards.shape)

    def in_place(i, x):
        shards = jax.lax.dynamic_slice_in_dim(x, i * count, count)
        return jax.lax.dynamic_update_slice_in_dim(x, one_chunk(shards), i * count, 0)

    if count == len(x):
        return one_chunk(x)
    if group.chunk == group.full:
        return in_place(0, x)
    return jax.lax.fori_loop(0, group.full // group.chunk, in_place, x)


def _of_shards(
    x: jax.Array, group: Group, grid: tuple[int, int], orthogonalize: Orthogonalizer, eps: Scalar
) -> jax.Array:
    """Orthogonalizes the matrices of shards [chunk, R C, m / R, n / C]; tall ones transposed."""
    is_tall, (*_, height, width) = group.m > group.n, x.shape
    short, long = sorted((group.m, group.n))
    passes = orthogonalize.choose(short, long, x.dtype).products.passes(height, width)
    if passes and orthogonalize.preconditioning != "spectral":
        X = orthogonalize(passes.normalized(x, grid, eps, is_tall), None)
        return passes.taken_apart(X, grid, is_tall)
    X = _materialized(_assembled(x, grid))
    if is_tall:
        X = _materialized(orthogonalize(_materialized(X.mT), eps)).mT
    else:
        X = orthogonalize(X, eps)
    return _taken_apart(_materialized(X), grid)


def _shared(
    x: jax.Array, group: Group, grid: tuple[int, int], f: Callable[..., jax.Array]
) -> jax.Array:
    """Orthogonalizes the remainder, each matrix on several devices with some of its columns."""
    devices, p = math.prod(grid), group.sharers
    sets, count, rows, columns = devices // p, len(x), x.shape[1], x.shape[2] // p
    x = _padded(x, sets).reshape(sets, rows, p, columns).swapaxes(1, 2)
    there = _all_to_all(x.reshape(devices, rows, columns), group)
    groups = tuple(tuple(range(i * p, (i + 1) * p)) for i in range(sets))
    X = f(_materialized(_assembled(there, grid)), shards=ColumnShards(group.axes, p, groups))
    back = _all_to_all(_taken_apart(_materialized(X), grid), group)
    back = back.reshape(sets, p, rows, columns).swapaxes(1, 2)
    return back.reshape(sets, rows, p * columns)[:count]


def _all_to_all(x: jax.Array, group: Group) -> jax.Array:
    """Sends entry i to device i; entry j of the result has come from device j."""
    return jax.lax.all_to_all(x, group.axes, 0, 0, tiled=True)


def _materialized(X: jax.Array) -> jax.Array:
    """Stops XLA from moving the cast to float32 in front of the copies that assemble shards.

    XLA would also fuse the computation of the shards into each copy.
    """
    return jax.lax.optimization_barrier(X)


def _assembled(shards: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Assembles (..., R C, m / R, n / C) shards to (..., m, n) matrices."""
    *batch, _, height, width = shards.shape
    R, C = grid
    # One axis at a time: under jax.vmap, jax 0.10 cannot merge more axes of a sharded array.
    if C > 1 and height % _ROWS == 0 and width % _LANES == 0:
        # As tiles, which move as they are. In a tile of (C, width), C would be padded.
        tiles = height // _ROWS, _ROWS, width // _LANES, _LANES
        shards = jnp.moveaxis(shards.reshape(*batch, R, C, *tiles), -5, -3)
        shards = shards.reshape(*batch, R, height, C, *tiles[2:])
        shards = shards.reshape(*batch, R * height, C, *tiles[2:])
        shards = shards.reshape(*batch, R * height, C, width)
        return shards.reshape(*batch, R * height, C * width)
    shards = shards.reshape(*batch, R, C, height, width).swapaxes(-3, -2)
    return shards.reshape(*batch, R * height, C, width).reshape(*batch, R * height, C * width)


def _taken_apart(X: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Splits (..., m, n) matrices into (..., R C, m / R, n / C) shards."""
    *batch, m, n = X.shape
    R, C = grid
    shards = X.reshape(*batch, m, C, n // C).reshape(*batch, R, m // R, C, n // C)
    return shards.swapaxes(-3, -2).reshape(*batch, R * C, m // R, n // C)


def _padded(x: jax.Array, count: int) -> jax.Array:
    """Pads a stack with zero matrices, which stay zero."""
    return x if len(x) == count else jnp.pad(x, ((0, count - len(x)), (0, 0), (0, 0)))

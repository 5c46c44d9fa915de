"""Key heads that several query heads share, on an Explicit mesh that shards the query heads.

Query heads are split into `[key_heads, group]` to meet their keys, and JAX requires equal shardings
there. So keys are sharded along their heads as the queries are. With 8 query heads over 4 devices
and 2 key heads that is impossible, since each device has half of a group: every query head then
gets a copy of its key.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float


def with_query_heads(
    x: Array, query: Float[Array, "*batch t heads h"], axis: int = -2, *, repeat: bool = False
) -> Array:
    """Shards keys, values or factors of key heads along their heads as the queries are.

    Args:
      x: Array whose `axis` has the key heads.
      query: Queries, on the mesh of `x`.
      axis: Axis of the heads in `x`, negative.
      repeat: Whether to repeat `x` for each query head in any case.

    Returns:
      `x`, repeated if the sharding of the query heads does not divide the key heads. Without an
      Explicit mesh, or for one key head, `x` as it is, unless `repeat` is set.

    Example:
      >>> key, query = jnp.ones((1, 4, 2, 3)), jnp.ones((1, 4, 8, 3))
      >>> with_query_heads(key, query).shape, with_query_heads(key, query, repeat=True).shape
      ((1, 4, 2, 3), (1, 4, 8, 3))
    """
    key_heads, group = x.shape[axis], query.shape[-2] // x.shape[axis]
    mesh, heads = (typed := jax.typeof(query).sharding).mesh, typed.spec[-2]
    if AxisType.Explicit not in mesh.axis_types or (key_heads == 1 and not repeat):
        return jnp.repeat(x, group, axis=axis) if repeat else x
    # A mesh axis shards one axis of an array only.
    spec = [_without(entry, _names(heads)) for entry in jax.typeof(x).sharding.spec]
    if repeat or key_heads % math.prod(mesh.shape[name] for name in _names(heads)):
        spec[axis] = None
        x = jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))
        x = jnp.repeat(x, group, axis=axis)
    spec[axis] = heads
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))


def _names(entry: Any) -> tuple[str, ...]:
    """Lists the mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _without(entry: Any, names: tuple[str, ...]) -> tuple[str, ...] | None:
    """Drops mesh axes from one entry of a PartitionSpec."""
    return tuple(name for name in _names(entry) if name not in names) or None

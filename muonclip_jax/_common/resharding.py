"""Moves an array to the sharding of another one on an Explicit mesh.

JAX combines two arrays on an Explicit mesh only if their shardings agree, or if one of them is
unsharded; then the result is sharded as the other. These functions make shardings agree. They do
nothing for arrays on one device, and `placed_like` does nothing on Auto axes, where XLA decides.
"""

from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def unsharded(x: jax.Array) -> jax.Array:
    """Copies an array to every device of its mesh.

    Use it for small arrays only. Manual axes, of a `jax.shard_map` around the call, stay.

    Args:
      x: Array of any shape and dtype.

    Returns:
      `x`, unsharded over the Explicit and the Auto axes of its mesh.

    Example:
      >>> import jax.numpy as jnp
      >>> unsharded(jnp.ones(3)).tolist()
      [1.0, 1.0, 1.0]
    """
    mesh = jax.typeof(x).sharding.mesh
    everywhere = NamedSharding(mesh, PartitionSpec(*[None] * x.ndim))
    if AxisType.Explicit in mesh.axis_types:
        x = jax.sharding.reshard(x, everywhere)
    if AxisType.Auto in mesh.axis_types:
        x = jax.lax.with_sharding_constraint(x, everywhere)
    return x


def placed_like(x: Any, like: Any) -> Any:
    """Gives an array the sharding of another one.

    Args:
      x: Array of the shape of `like`, or with axes of size 1 where `like` has more.
      like: Array of any dtype, also a NumPy array.

    Returns:
      `x`, with the axes that both have sharded as in `like` over the Explicit axes of its mesh.

    Example:
      >>> import jax.numpy as jnp
      >>> placed_like(jnp.ones((1, 3)), jnp.ones((2, 3))).shape
      (1, 3)
    """
    sharding = jax.typeof(like).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    target = _restricted(sharding, x.shape, like.shape)
    return x if jax.typeof(x).sharding == target else jax.sharding.reshard(x, target)


def placed_like_tree(tree: Any, like: Any) -> Any:
    """Gives each array of a pytree the sharding of the same one in another pytree.

    Args:
      tree: Arrays; float0 gradients of integer parameters are returned as they are.
      like: A pytree of the same structure, or None.

    Returns:
      `tree`; unchanged if `like` is None.

    Example:
      >>> placed_like_tree({"w": 1.0}, None)
      {'w': 1.0}
    """
    if like is None:
        return tree
    is_float0 = lambda x: getattr(x, "dtype", None) == jax.dtypes.float0  # noqa: E731
    return jax.tree.map(lambda x, y: x if is_float0(x) else placed_like(x, y), tree, like)


def _restricted(sharding: Any, shape: tuple[int, ...], full: tuple[int, ...]) -> NamedSharding:
    """Drops the entries of a sharding for axes that are broadcast."""
    entries = [*sharding.spec, *[None] * (len(full) - len(sharding.spec))]
    kept = (e if n == m else None for e, n, m in zip(entries, shape, full, strict=True))
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))

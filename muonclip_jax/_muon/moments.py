"""Runs an optimizer in the dtype and in the sharding of its moments."""

import jax
import optax

from muonclip_jax._common.dtypes import cast, widened
from muonclip_jax._common.resharding import placed_like_tree
from muonclip_jax._common.types import ArrayTree


def where_moments_are(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs an optimizer on gradients and parameters that are sharded as its first moment `mu`.

    Args:
      tx: A transform without extra arguments, with one `mu` in its state.

    Returns:
      A transform whose updates are sharded as the parameters, and whose state keeps its shardings.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = where_moments_are(optax.adamw(0.1))
      >>> tx.update(jnp.ones(()), tx.init(jnp.ones(())), jnp.ones(()))[0].round(3)
      Array(-0.1, dtype=float32)
    """

    def update_fn(updates, state, params=None):
        mu = optax.tree.get(state, "mu")
        there = None if params is None else placed_like_tree(params, mu)
        updates, state = tx.update(placed_like_tree(updates, mu), state, there)
        return placed_like_tree(updates, params), state

    return optax.GradientTransformation(tx.init, update_fn)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs a transform on float32 copies of 16-bit gradients and parameters.

    Args:
      tx: A transform without extra arguments.

    Returns:
      A transform whose updates have the dtypes of the gradients, and whose state keeps its dtypes.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = in_float32(optax.scale(1 / 3))
      >>> tx.update(jnp.ones((), jnp.bfloat16), tx.init(0.0))[0]
      Array(0.333984, dtype=bfloat16)
    """

    def update_fn(updates, state, params=None):
        wide_updates, wide_params = jax.tree.map(widened, (updates, params))
        new, new_state = tx.update(wide_updates, state, wide_params)
        return _cast_like(new, updates), _cast_like(new_state, state)

    return optax.GradientTransformation(tx.init, update_fn)


def _cast_like(new: ArrayTree, old: ArrayTree) -> ArrayTree:
    return jax.tree.map(lambda a, b: cast(a, getattr(b, "dtype", None)), new, old)

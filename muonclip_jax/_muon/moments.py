"""Runs an optimizer in the dtype and in the sharding of its moments, and checks their shapes."""

import jax
import optax

from muonclip_jax._common.dtypes import cast, widened
from muonclip_jax._common.paths import path_string
from muonclip_jax._common.resharding import placed_like_tree
from muonclip_jax._common.types import ArrayTree


def with_sharding_of_mu(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs an optimizer on gradients and parameters that are sharded as its first moment `mu`.

    Args:
      tx: A transform without extra arguments, with one `mu` in its state.

    Returns:
      A transform whose updates are sharded as the parameters, and whose state keeps its shardings.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = with_sharding_of_mu(optax.adamw(0.1))
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


def check_match(caller: str, updates: ArrayTree, mu: ArrayTree) -> None:
    """Checks that gradients have the leaves and shapes of the momentum.

    Args:
      caller: Name of the public function.
      updates: Gradients.
      mu: Momentum in the state.

    Raises:
      ValueError: if they differ, with the path and both shapes of each such leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> check_match("scale_by_muon", {"w": jnp.ones(2)}, {"w": jnp.zeros(2)})
    """
    shapes = [
        {path_string(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (updates, mu)
    ]
    got, expected = shapes
    faults = [
        f"  {path}: got {got.get(path, 'no leaf')}, expected {expected.get(path, 'no leaf')}."
        for path in sorted(got.keys() | expected.keys())
        if got.get(path) != expected.get(path)
    ]
    if faults:
        raise ValueError(
            f"{caller}: the gradients do not match the state.\n"
            + "\n".join(faults)
            + "\nCall init with the parameters of these gradients."
        )

"""Shared by the chains of Muon and AdamW: weight decay, float32, the sharding of their moments."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._common.dtypes import cast, widened
from muonclip_jax._common.folding import differences
from muonclip_jax._common.paths import leaf_paths
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


def add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule,
    mask: ArrayTree | Callable[[ArrayTree], ArrayTree] | None = None,
) -> optax.GradientTransformation:
    """Builds `optax.add_decayed_weights`, and counts the steps of a schedule.

    optax 0.2.6 returns the count as it was, so that a schedule stays at its first value.

    Args:
      weight_decay: Number or schedule.
      mask: Pytree or prefix of booleans, or a function of the parameters that returns one: which
        leaves decay. None: all.

    Returns:
      A transform with the state of optax.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = add_decayed_weights(lambda step: 0.5 * step)
      >>> _, state = tx.update(jnp.ones(()), tx.init(jnp.ones(())), jnp.ones(()))
      >>> print(tx.update(jnp.ones(()), state, jnp.ones(()))[0])
      1.5
    """
    decay = optax.add_decayed_weights(weight_decay, mask)

    def update_fn(updates, state, params=None):
        updates, new_state = decay.update(updates, state, params)
        pairs = zip(jax.tree.leaves(new_state), jax.tree.leaves(state), strict=True)
        if all(new is old for new, old in pairs):  # no counter, or one that optax leaves as it is
            new_state = jax.tree.map(optax.safe_increment, new_state)
        return updates, new_state

    return optax.GradientTransformation(decay.init, update_fn)


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
    if lines := _differences(updates, mu):
        raise ValueError("\n".join([f"{caller}: {_OTHER_STATE}", *lines, _IF_OTHER_STATE]))


def check_state(caller: str, state: Any, kind: type) -> None:
    """Checks that a state is the state of this transform.

    Args:
      caller: Name of the public function.
      state: The state that the user passed.
      kind: The type of its own states.

    Raises:
      ValueError: for another type, with the states that were found.

    Example:
      >>> check_state("scale", optax.scale(2.0).init({}), optax.ScaleState)
    """
    if not isinstance(state, kind):
        raise _of_another_optimizer(caller, transforms_in(state), kind.__name__)


def transforms_in(state: Any) -> str:
    """Names the transforms that a state of optax belongs to.

    Args:
      state: The state.

    Returns:
      The types of states, with the states inside of chains, masks and partitions.

    Example:
      >>> transforms_in(optax.masked(optax.sgd(0.1), True).init({}))
      'MaskedState((EmptyState, EmptyState))'
    """
    if type(state) is tuple:
        return f"({', '.join(map(transforms_in, state))})"
    name = type(state).__name__
    if hasattr(state, "inner_states"):  # of a partition, by label
        inner = sorted(state.inner_states.items())
        return f"{name}({', '.join(f'{label}: {transforms_in(x)}' for label, x in inner)})"
    return f"{name}({transforms_in(state.inner_state)})" if hasattr(state, "inner_state") else name


@contextlib.contextmanager
def same_model(
    caller: str,
    updates: ArrayTree,
    state: ArrayTree,
    params: ArrayTree,
    init: Callable[[ArrayTree], ArrayTree] | None = None,
) -> Iterator[None]:
    """Explains an error inside, if gradients, state and parameters do not belong together.

    optax and JAX print all keys of both pytrees.

    Args:
      caller: Name of the public function.
      updates: Gradients.
      state: The state of all optimizers; each first moment `mu` is a pytree like its gradients.
      params: The parameters, or None.
      init: Makes a state of this optimizer. None: the type of the state was checked.

    Raises:
      ValueError: if they are of different models, with each path, or if the state is of another
        optimizer.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if params is not None and (lines := _differences(params, updates)):
            head = f"{caller}: the parameters do not match the gradients."
            raise ValueError("\n".join([head, *lines, _IF_OTHER_PARAMS])) from error
        if init is not None:
            like = updates if params is None else params
            found, own = transforms_in(state), transforms_in(jax.eval_shape(init, like))
            if found != own:
                raise _of_another_optimizer(caller, found, own) from error
        states = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu"))
        moments = [x.mu for x in states if hasattr(x, "mu")]
        if moments and (lines := _differences(updates, *moments)):
            head = f"{caller}: {_OTHER_STATE}"
            raise ValueError("\n".join([head, *lines, _IF_OTHER_STATE])) from error
        raise


def _differences(got: ArrayTree, *expected: ArrayTree) -> list[str]:
    """Lists the paths with other shapes in one pytree than in several others together."""
    shapes = [
        {
            path: str(jnp.shape(leaf))
            for tree in trees
            for path, leaf in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True)
        }
        for trees in ((got,), expected)
    ]
    return differences(shapes[0], shapes[1], ("leaf", "leaves"))


def _of_another_optimizer(caller: str, got: str, expected: str) -> ValueError:
    return ValueError(
        f"{caller}: the state is from another optimizer.\n  got {got}, expected {expected}.\n"
        "Pass the state of this optimizer: state = optimizer.init(params)."
    )


_OTHER_STATE = "the gradients do not match the state."
_IF_OTHER_STATE = "Call init with the parameters of these gradients."
_IF_OTHER_PARAMS = "Pass the parameters of these gradients: tx.update(grads, state, params)."

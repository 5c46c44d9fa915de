"""The dtypes of sums and of optimizer arithmetic: float32 at least, rounded once at the end."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._common.types import ArrayTree


def accumulator(*dtypes: Any) -> Any:
    """Returns the dtype in which to compute sums: the widest of `dtypes`, and at least float32.

    Args:
      *dtypes: Floating or complex dtypes, one or more.

    Returns:
      float32 if all are 16-bit floats.

    Example:
      >>> accumulator(jnp.bfloat16), accumulator(jnp.float16, jnp.complex64)
      (dtype('float32'), dtype('complex64'))
    """
    wide = [jnp.dtype(d) for d in dtypes if jnp.finfo(d).bits >= 32]
    return max(wide, key=lambda d: d.itemsize, default=jnp.dtype(jnp.float32))


def widened(x: Any) -> Any:
    """Casts 16-bit floats to float32, and returns everything else as it is."""
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return x
    return cast(x, accumulator(dtype))


def cast(x: Any, dtype: Any) -> Any:
    """Casts an array to a dtype; None keeps its own."""
    return x if dtype is None or x.dtype == dtype else jnp.asarray(x).astype(dtype)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs a transform on float32 copies of 16-bit gradients and parameters.

    Args:
      tx: A transform without extra arguments.

    Returns:
      A transform whose updates have the dtypes of the gradients, and whose state keeps its dtypes.

    Example:
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

"""The dtypes of sums and of optimizer arithmetic: float32 at least, rounded once at the end."""

from typing import Any

import jax.numpy as jnp


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

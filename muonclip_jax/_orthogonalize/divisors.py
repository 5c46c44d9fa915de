"""Divisors of matrices of any magnitude, zero too."""

import jax
import jax.numpy as jnp

# 2⁶⁴ is exact in every dtype we normalize in, and takes the reciprocal of the largest and smallest
# float32 out of the subnormal range, where XLA flushes it to zero.
SHIFT = 2.0**64


def nonzero(x: jax.Array) -> jax.Array:
    """Replaces what is not above zero by one, so that it can be a divisor."""
    return jnp.where(x > 0, x, jnp.ones_like(x))

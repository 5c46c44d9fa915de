"""Powers of γ, the factor on the logits of a head."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from muonclip_jax._common.types import Scalar


def power(gamma: Float[Array, "..."], exponent: Scalar) -> Float[Array, "..."]:
    """Raises to a power; exactly 1 for heads that are not clipped, however a device rounds."""
    return jnp.where((gamma == 1) | (exponent == 0), 1, jnp.power(gamma, exponent))

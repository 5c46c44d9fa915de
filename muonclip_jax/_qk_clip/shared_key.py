"""How gamma, the factor on the logits of a query head, is shared out between queries and keys."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from muonclip_jax._common.types import Scalar

# query: the paper's treatment of what heads share, its rotary key: keep it, gamma on the query.
# group: Megatron-LM, attention.py, the clip of grouped queries. min: LLM-quest. exact: algebra,
# from the wish that every head lands where it would land alone.


def query_and_key_factors(
    gamma: Float[Array, "*stack heads"], key_heads: int, alpha: Scalar, shared_key: str
) -> tuple[Float[Array, "*stack heads"], Float[Array, "*stack key_heads"]]:
    """Shares gamma out between queries and keys.

    With a = alpha, and g the smallest gamma among the query heads of one key head:

        every query head its own key        γᵃ            γ¹⁻ᵃ
        "query"                             γ             1
        "group"                             gᵃ            g¹⁻ᵃ
        "min"                               γᵃ            g¹⁻ᵃ
        "exact"                             γ / g¹⁻ᵃ      g¹⁻ᵃ

    Args:
      gamma: Factor on the logits of each query head, in (0, 1].
      key_heads: Number of key heads; a divisor of heads.
      alpha: Share of the query, in [0, 1].
      shared_key: One of `SHARED_KEY_RULES`.

    Returns:
      The factors of the query heads and of the key heads.

    Example:
      >>> query, key = query_and_key_factors(jnp.array([0.25, 1.0]), 1, 0.5, "exact")
      >>> query.tolist(), key.tolist()
      ([0.5, 2.0], [0.5])
    """
    if key_heads == gamma.shape[-1]:
        return _power(gamma, alpha), _power(gamma, 1 - alpha)
    groups = gamma.reshape(*gamma.shape[:-1], key_heads, -1)
    least = jnp.min(groups, axis=-1, keepdims=True)
    if shared_key == "query":
        query, key = groups, jnp.ones_like(least)
    elif shared_key == "group":
        query, key = jnp.broadcast_to(_power(least, alpha), groups.shape), _power(least, 1 - alpha)
    elif shared_key == "min":
        query, key = _power(groups, alpha), _power(least, 1 - alpha)
    else:
        key = _power(least, 1 - alpha)
        query = jnp.where(key == 1, groups, groups / key)
    return query.reshape(gamma.shape), key[..., 0]


def _power(gamma: Float[Array, "..."], exponent: Scalar) -> Float[Array, "..."]:
    """Raises to a power; exactly 1 where nothing is clipped, however an accelerator rounds."""
    return jnp.where((gamma == 1) | (exponent == 0), 1, jnp.power(gamma, exponent))

"""γ, the factor on the logits of a head, and its distribution between queries and keys."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from muonclip_jax._common.types import Scalar


def gamma_of(
    s: Float[Array, "*stack heads"], threshold: Scalar, where: bool | Bool[Array, ""]
) -> Float[Array, "*stack heads"]:
    """Computes γ = τ / S if S is finite and exceeds τ, otherwise exactly 1.

    min(1, τ / S) alone is negative for a negative S, and 0 for an infinite one.
    """
    tau = jnp.asarray(threshold, jnp.float32)
    exceeds = (s > tau) & ~is_nonfinite(s) & where
    # Both sides are 1 where unused, so that nothing there divides by zero or infinity.
    ratio = jnp.where(exceeds, tau, 1) / jnp.where(exceeds, s, 1)
    # The smallest normal number: a head cannot recover from weights that a gamma of 0 scaled.
    return jnp.where(exceeds, jnp.maximum(ratio, jnp.finfo(jnp.float32).tiny), 1)


def is_nonfinite(s: Float[Array, "..."]) -> Bool[Array, "..."]:
    """Marks NaN and +inf, which show nothing about the weights; -inf is a fully masked head."""
    return jnp.isnan(s) | (s == jnp.inf)


def power(gamma: Float[Array, "..."], exponent: Scalar) -> Float[Array, "..."]:
    """Raises to a power; exactly 1 for heads that are not clipped, however a device rounds."""
    return jnp.where((gamma == 1) | (exponent == 0), 1, jnp.power(gamma, exponent))


def query_and_key_factors(
    gamma: Float[Array, "*stack heads"], key_heads: int, alpha: Scalar, shared_key: str
) -> tuple[Float[Array, "*stack heads"], Float[Array, "*stack key_heads"]]:
    """Distributes γ between the queries and the keys of each head.

    With a = alpha, and g the smallest γ among the query heads of one key head:

                               queries       key
        a key for each query   γᵃ            γ¹⁻ᵃ
        "query"                γ             1            as the paper scales a shared rotary key
        "group"                gᵃ            g¹⁻ᵃ         as Megatron-LM does, in attention.py
        "exact"                γ / g¹⁻ᵃ      g¹⁻ᵃ         from γᵃ γ¹⁻ᵃ = γ for every query head

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
        return power(gamma, alpha), power(gamma, 1 - alpha)
    groups = gamma.reshape(*gamma.shape[:-1], key_heads, -1)
    g = jnp.min(groups, axis=-1, keepdims=True)
    query, key = factors_of_group(groups, g, alpha, shared_key)
    return query.reshape(gamma.shape), key[..., 0]


def factors_of_group(
    gamma: Float[Array, "..."], g: Float[Array, "..."], alpha: Scalar, shared_key: str
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns the factors of queries and keys of heads that share a key; see above.

    Args:
      gamma: Factor on the logits of each query head.
      g: The smallest of the query heads that share the key of each; broadcasts against `gamma`.
      alpha: Share of the query.
      shared_key: One of `SHARED_KEY_RULES`.

    Returns:
      The factors of the queries, in the shape of `gamma`, and of the keys, in the shape of `g`.
    """
    if shared_key == "query":
        return gamma, jnp.ones_like(g)
    key = power(g, 1 - alpha)
    if shared_key == "group":
        return jnp.broadcast_to(power(g, alpha), gamma.shape), key
    return jnp.where(key == 1, gamma, gamma / key), key

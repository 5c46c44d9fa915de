"""Max logits as the gradient of a slot: an input that the forward pass reads and ignores.

The cotangent of the slot is the max logit, whatever the loss is. So the max logits leave a model
through scans over layers and rematerialization, and no module in between has to return them. A
counter beside each number shows what happened on the way: 1 if it arrived once, 0 if no gradient
reached the attention, another number if gradients were summed or scaled.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The max logit of each head, and how often it arrived.
Slot: TypeAlias = tuple[Float[Array, "*heads"], Float[Array, "*heads"]]


@jax.custom_vjp
def attach(query: Array, slot: Slot, s: Float[Array, "*heads"]) -> Array:
    """Returns `query`; the gradient of `slot` becomes the max logit and a 1.

    Args:
      query: The queries, or another array that the loss depends on.
      slot: Zeros.
      s: The max logit, of the shape of both arrays of the slot.

    Returns:
      The queries.

    Example:
      >>> zero = jnp.zeros(())
      >>> jax.grad(lambda slot: attach(jnp.ones(()), slot, jnp.float32(7.0)))((zero, zero))
      (Array(7., dtype=float32), Array(1., dtype=float32))
    """
    del slot, s
    return query


def _forward(query: Array, slot: Slot, s: Array) -> tuple[Array, tuple[Slot, Array]]:
    return query, (slot, s)


def _backward(kept: tuple[Slot, Array], cotangent: Array) -> tuple[Array, Slot, None]:
    (value, count), s = kept
    # The 1 is made of the max logit: under jax.vmap, whatever sums one sums the other.
    one = jnp.where(jnp.isnan(s), 1, 1).astype(count.dtype)
    return cotangent, (s.astype(value.dtype), one), None


attach.defvjp(_forward, _backward)


def joined(a: Slot, b: Slot) -> Slot:
    """Joins the slots of two micro-batches: the maximum of what arrived.

    Zeros are the identity, since a sum of gradients starts with zeros. So a negative maximum stays.

    Args:
      a: Slot of one micro-batch, of several already joined, or zeros.
      b: Slot of another.

    Returns:
      The slot of both.

    Example:
      >>> one, zero = jnp.ones(()), jnp.zeros(())
      >>> [float(x) for x in joined((zero, zero), (-3.0 * one, one))]
      [-3.0, 1.0]
    """
    (s_a, count_a), (s_b, count_b) = a, b
    largest = jnp.where(count_b == 0, s_a, jnp.maximum(s_a, s_b))
    return jnp.where(count_a == 0, s_b, largest), jnp.maximum(count_a, count_b)


def arrived_once(slot: Slot) -> Float[Array, "*heads"]:
    """Returns the max logit, NaN if it did not arrive exactly once.

    `qk_clip` does not scale a head with a NaN, and counts it in `nonfinite_heads`.

    Args:
      slot: Gradient of a slot.

    Returns:
      The max logit of each head.

    Example:
      >>> arrived_once((jnp.array([7.0, 0.0, 14.0]), jnp.array([1.0, 0.0, 2.0]))).tolist()
      [7.0, nan, nan]
    """
    s, count = slot
    return jnp.where(count == 1, s, jnp.nan)

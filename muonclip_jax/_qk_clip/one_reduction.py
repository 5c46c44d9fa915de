"""The maximum of all max logits over the batch, by one reduction for the whole model.

    S_h = max over the batch of max_logits[..., h]        for every head h of every module

On a mesh that shards the batch, each reduction is an all-reduce over the network. One for each
layer costs its latency once per layer, so the max logits of all modules are joined into one array
first. For two modules on a batch of 4, one with 8 heads, one with 3 stacked layers of 6 heads:

    sown                       attn [4, 8]            layers [3, 4, 6]
    stack axes moved last      [4, 8]                 [4, 6, 3]
    heads in gcd(8, 6) parts   [4, 2, 4]              [4, 2, 3 * 3]
    joined                     [4, 2, 4 + 9]
    maximum over the batch     [2, 13]                the one reduction
    taken apart                [2, 4]                 [2, 9]
    heads and stack axes       [8]                    [6, 3]
    stack axes moved first     [8]                    [3, 6]

The heads are joined along a second axis, and not along one long axis of all heads, because heads
may be sharded too: they are sharded along the parts, of which all modules have the same number, so
that joining moves nothing between devices.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from muonclip_jax._common.resharding import unsharded


class Sown(NamedTuple):
    """Max logits that one call of a module sowed.

    Attributes:
      name: Path of the module.
      max_logits: Stack axes anywhere, heads last of the other axes.
      stack_axes: The stack axes, outermost first.
    """

    name: str
    max_logits: Shaped[Array, "..."]
    stack_axes: tuple[int, ...]


def maxima_over_batch(sown: Iterable[Sown]) -> dict[str, Float[Array, "*stack heads"]]:
    """Reduces max logits to one number for each layer and head.

    Args:
      sown: Max logits of all calls of all modules. All axes but stack axes and heads are reduced.

    Returns:
      The maxima by path of the module, `[*stack, heads]` float32, over all calls of a module. They
      are unsharded, because any kernel may need them. One reduction serves all modules whose max
      logits have equal leading axes, sharded equally.

    Example:
      >>> attn = Sown("attn", jnp.arange(32.0).reshape(4, 8), ())
      >>> layers = Sown("layers", jnp.ones((3, 4, 6)), (0,))
      >>> maxima = maxima_over_batch([attn, layers])
      >>> maxima["attn"].tolist(), maxima["layers"].shape
      ([24.0, 25.0, 26.0, 27.0, 28.0, 29.0, 30.0, 31.0], (3, 6))
    """
    groups, order = defaultdict(list), {}
    for name, entry, axes in sown:
        order[name] = None
        x = jnp.moveaxis(entry, axes, range(-len(axes), 0)).astype(jnp.float32)
        leading = x.ndim - 1 - len(axes)
        mesh, spec = (typed := jax.typeof(x).sharding).mesh, typed.spec
        # A sharded stack axis cannot be joined with the heads without communication.
        alone = any(spec[leading + 1 :])
        key = x.shape[:leading], mesh, spec[: leading + 1], name if alone else None
        groups[key].append((name, x))
    largest: dict[str, jax.Array] = {}
    for (shape, *_, alone), members in groups.items():
        names, arrays = zip(*members, strict=True)
        reduce = _each_maximum if alone else _joint_maximum
        for name, x in zip(names, reduce(arrays, len(shape)), strict=True):
            x = jnp.moveaxis(x, 0, -1)
            largest[name] = jnp.maximum(largest[name], x) if name in largest else x
    return {name: unsharded(largest[name]) for name in order}


def _each_maximum(
    arrays: Sequence[Float[Array, "..."]], leading: int
) -> list[Float[Array, " heads *stack"]]:
    """Reduces each array `[*leading, heads, *stack]` alone."""
    return [unsharded(jnp.max(x, axis=tuple(range(leading)), initial=-jnp.inf)) for x in arrays]


def _joint_maximum(
    arrays: Sequence[Float[Array, "..."]], leading: int
) -> list[Float[Array, " heads *stack"]]:
    """Reduces all arrays `[*leading, heads, *stack]` by one reduction."""
    shapes = [x.shape[leading:] for x in arrays]
    parts = math.gcd(*(heads for heads, *_ in shapes)) or 1
    joined = jnp.concatenate([_in_parts(x, leading, parts) for x in arrays], axis=-1)
    maxima = unsharded(jnp.max(joined, axis=tuple(range(leading)), initial=-jnp.inf))
    ends = np.cumsum([math.prod(shape) // parts for shape in shapes])
    return [
        x.reshape(parts, heads // parts, *stack).reshape(heads, *stack)
        for x, (heads, *stack) in zip(jnp.split(maxima, ends[:-1], axis=-1), shapes, strict=True)
    ]


def _in_parts(x: Float[Array, "..."], axis: int, parts: int) -> Float[Array, "..."]:
    """Splits heads, at `axis`, into `[parts, rest]`; the stack axes behind them join the rest."""
    before, (heads, *stack) = x.shape[:axis], x.shape[axis:]
    # Two steps: JAX infers the sharding of a split axis or of a joined axis, not of both at once.
    x = x.reshape(*before, parts, heads // parts, *stack)
    return x.reshape(*before, parts, heads // parts * math.prod(stack))

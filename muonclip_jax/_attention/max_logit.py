"""Largest attention logit of each head, without the T x S matrix of all logits.

S_h = max over i, j that may attend of  scale * q_i . k_j + bias_ij        (Kimi K2, section 2.1)
"""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from muonclip_jax._attention.shared_keys import with_query_heads
from muonclip_jax._attention.visible import (
    Block,
    Pair,
    Rules,
    Start,
    Window,
    band,
    block_pairs,
    cut,
    tile,
    visible,
)
from muonclip_jax._common.settings import COUNT, flag, is_real, shown
from muonclip_jax._common.types import Scalar

Lengths: TypeAlias = Integer[Array, " batch"]
# One array for queries and keys, or one for each.
SegmentIds: TypeAlias = (
    Integer[Array, "batch length"] | tuple[Integer[Array, "batch t"], Integer[Array, "batch s"]]
)


def max_attention_logit(
    query: Float[Array, "batch t heads width"],
    key: Float[Array, "batch s key_heads width"],
    *,
    scale: Scalar | Float[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    is_causal: bool = False,
    segment_ids: SegmentIds | None = None,
    query_seq_lengths: Lengths | None = None,
    key_value_seq_lengths: Lengths | None = None,
    local_window_size: Window | None = None,
    block_size: int = 512,
) -> Float[Array, "batch heads"]:
    """Computes the max logit of each head: after scale and bias, before softmax.

    The result is exact, in float32. Queries and keys are processed in blocks, so that no temporary
    is larger than one block of logits. Arguments have the meaning of
    `jax.nn.dot_product_attention`. The gradient is zero. Attention with a soft cap passes query and
    key as they are: the max logit is the one before the cap.

    Args:
      query: Queries. Head h uses key head `h // (heads // key_heads)`.
      key: Keys. The number of heads divides the number of query heads.
      scale: Factor on `q . k`: a number, or an array that broadcasts to `[batch, heads, t, s]`,
        such as a temperature of shape `(heads, 1, 1)`. `(key_heads, 1, 1)` is a factor for each key
        head, as in `jax.nn`. None is `width ** -0.5`.
      bias: Added after the scale; four axes, each full or 1: `[batch, heads, t, s]`.
      mask: True where a pair may attend; four axes, each full or 1. A masked pair does not count.
      is_causal: Whether query i sees only keys j <= i.
      segment_ids: A pair attends only if its ids are equal. `[batch, length]` for t == s, else one
        array for the queries and one for the keys. No id is special: mask the padding.
      query_seq_lengths: Number of queries of each row of the batch without padding, `[batch]`.
      key_value_seq_lengths: The same for keys.
      local_window_size: `(left, right)`: query i sees only keys i - left <= j <= i + right. One
        number sets both. None is no limit.
      block_size: Queries, and keys, of one block.

    Returns:
      float32; -inf for a head whose pairs are all masked. A NaN in an input gives NaN in its own
      row of the batch and its own head.

    Raises:
      ValueError: if shapes do not fit together, or `block_size` is less than 1.
      TypeError: if `mask` is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> import muonclip_jax as mc
      >>> query = jnp.array([3.0, -4.0]).reshape(1, 2, 1, 1)
      >>> mc.max_attention_logit(query, key=query, is_causal=True)
      Array([[16.]], dtype=float32)

    References:
      Kimi K2, arXiv 2507.20534, section 2.1, definition of S_max.
    """
    ids = _query_and_key_ids(segment_ids)
    lengths = (query_seq_lengths, key_value_seq_lengths)
    query, key, bias, mask = map(_array, (query, key, bias, mask))
    options = (lengths, local_window_size, ids, block_size, scale, is_causal)
    check_arguments("max_attention_logit", query, key, bias, mask, *options)
    factor = scale_with_four_axes(scale)
    if np.ndim(factor) and factor.shape[1] == key.shape[2]:
        factor = with_query_heads(factor, query, axis=-3)
    arrays = (query, with_query_heads(key, query), factor, bias)
    return _blockwise(
        *jax.lax.stop_gradient(arrays),
        Rules(None, lengths, ids, mask),
        within=band(query.shape[1], key.shape[1], bool(is_causal), _window(local_window_size)),
        block_size=int(block_size),
    )


# jit: without it, the scan is compiled at every call outside of jit. inline: inside of jit, nothing
# changes.
@functools.partial(jax.jit, static_argnames=("within", "block_size"), inline=True)
def _blockwise(
    query: Array,
    key: Array,
    scale: Any,
    bias: Array | None,
    rules: Rules,
    *,
    within: Pair | None,
    block_size: int,
) -> Float[Array, "batch heads"]:
    """Computes `max_attention_logit` from arguments that fit."""
    (batch, t, heads, width), (s, key_heads) = query.shape, key.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    size, key_size = min(block_size, t), min(block_size, s)
    rules = rules._replace(band=within)

    def block_max(i: Start, j: Start) -> Float[Array, "batch key_heads group"]:
        own, other = Block(i, size), Block(j, key_size)
        q, k = cut(query, {1: own}), cut(key, {1: other})
        logits = _dot(q.reshape(batch, size, key_heads, heads // key_heads, width), k)
        factor = tile(scale, own, other, key_heads) if jnp.ndim(scale) else scale
        logits = jnp.asarray(factor, logits.dtype) * logits
        if bias is not None:
            logits += tile(bias, own, other, key_heads).astype(logits.dtype)
        # -inf, not a large number: a masked pair must never be the maximum that is reported.
        seen = jnp.where(visible(rules, own, other, key_heads), logits, -jnp.inf)
        return jnp.max(seen, axis=(-2, -1))

    def step(largest, pair):
        return jnp.maximum(largest, block_max(*pair)), None

    first, *others = block_pairs(t, s, size, key_size, within)
    # The first block is the start value; a constant would lack the varying axes of `shard_map`.
    largest = block_max(*first)
    if others:
        largest, _ = jax.lax.scan(step, largest, jnp.asarray(others, jnp.int32))
    return largest.reshape(batch, heads).astype(jnp.float32)


def scale_with_four_axes(scale: Any) -> Any:
    """Adds leading axes of size 1 to a scale with axes; a number stays a number."""
    if scale is None or np.ndim(scale) == 0:
        return scale
    return jnp.reshape(scale, (1,) * (4 - np.ndim(scale)) + np.shape(scale))


def _array(x: Any) -> Any:
    return x if x is None or hasattr(x, "dtype") else jnp.asarray(x)


def _window(window: Any) -> Window | None:
    """Returns a window of hashable numbers."""
    return (int(window[0]), int(window[1])) if isinstance(window, tuple) else window


def _dot(
    query: Float[Array, "b t k g h"], key: Float[Array, "b s k h"]
) -> Float[Array, "b k g t s"]:
    """Multiplies queries and keys, accumulating in float32 or wider."""
    if query.dtype != key.dtype:
        query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    wide = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    return jnp.einsum(
        "btkgh,bskh->bkgts",
        query,
        key,
        # f32: the default of accelerators, TF32 or one bf16 pass, is wrong by 1e-3.
        precision=jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None,
        preferred_element_type=wide,
    )


def _query_and_key_ids(ids: SegmentIds | None) -> tuple[Array, Array] | None:
    """Returns the ids of the queries and of the keys, if there are any."""
    return ids if ids is None or isinstance(ids, tuple) else (ids, ids)


def check_arguments(
    caller,
    query,
    key,
    bias,
    mask,
    lengths=(None, None),
    window=None,
    ids=None,
    block_size=1,
    scale=None,
    is_causal=False,
) -> None:
    """Raises one error, in the name of `caller`, with every argument that does not fit."""
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(
            f"{caller}: query {query.shape} and key {key.shape} need four axes: "
            "[batch, t, heads, width] and [batch, s, key_heads, width]."
        )
    (b, t, n, h), (s, k) = query.shape, key.shape[1:3]
    faults = []
    if (key.shape[0], key.shape[3]) != (b, h):
        faults.append(f"key {key.shape} and query {query.shape} differ in batch or width.")
    if k == 0 or n % k:
        faults.append(f"query has {n} heads, not a multiple of the {k} heads of key.")
    if 0 in (t, s):
        faults.append(f"there are {t} queries and {s} keys; a maximum needs one of each.")
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None and not _broadcasts(x.shape, (b, n, t, s)):
            faults.append(f"{name} {x.shape} does not broadcast to [b, n, t, s] {(b, n, t, s)}.")
    for x, length in zip(ids or (), (t, s), strict=False):
        if x.shape != (b, length):
            faults.append(f"segment_ids {x.shape} should be {(b, length)}; pass a pair if t != s.")
    for name, x in zip(("query_seq_lengths", "key_value_seq_lengths"), lengths, strict=True):
        if x is not None and x.shape != (b,):
            faults.append(f"{name} {x.shape} should be {(b,)}, one number for each row.")
    if not _is_window(window):
        faults.append(f"local_window_size is {window!r}; it must be an int or a pair of them.")
    if fault := COUNT(block_size):
        faults.append(f"block_size must be {fault}.")
    if fault := flag(is_causal):
        faults.append(f"is_causal must be {fault}.")
    if fault := _scale_fault(scale, (b, n, t, s), k):
        faults.append(f"scale must be {fault}.")
    if faults:
        raise ValueError("\n  ".join([f"{caller}: the arguments do not fit.", *faults]))
    if mask is not None and mask.dtype != bool:
        raise TypeError(
            f"{caller}: mask has dtype {mask.dtype}, expected bool. A mask of zeros and "
            "ones: mask.astype(bool). A mask that is added to the logits: pass it as bias."
        )


def _scale_fault(scale: Any, full: tuple[int, ...], key_heads: int) -> str:
    """Describes what is wrong with a scale; empty if nothing is."""
    fault = f"a number or an array that broadcasts to [b, n, t, s] {full}, got "
    if scale is None:
        return ""
    if is_real(scale):
        shape = (1,) * (4 - np.ndim(scale)) + np.shape(scale)
        fits = (_broadcasts(shape, (full[0], heads, *full[2:])) for heads in (full[1], key_heads))
        return "" if any(fits) else fault + f"the shape {np.shape(scale)}"
    return fault + shown(scale)


def _is_window(window: Any) -> bool:
    """Returns whether a window is static: one number, or two."""
    if window is None or isinstance(window, int):
        return True
    return (
        isinstance(window, tuple)
        and len(window) == 2
        and all(isinstance(side, (int, np.integer)) for side in window)
    )


def _broadcasts(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Returns whether every axis is full or 1; a missing axis does not count as 1."""
    return len(shape) == len(full) and all(a in (1, b) for a, b in zip(shape, full, strict=True))

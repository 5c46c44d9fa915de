"""Largest attention logit of each head, without the T x S matrix of all logits.

S_h = max over i, j that may attend of  scale * q_i . k_j + bias_ij        (Kimi K2, section 2.1)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Shaped

from muonclip_jax._types import Scalar

# Where a block starts: a number for the first, traced inside the scan.
Start = int | Integer[Array, ""]
Pair = tuple[int, int]
# One array for queries and keys alike, or one for each.
SegmentIds = (
    Integer[Array, "batch length"] | tuple[Integer[Array, "batch t"], Integer[Array, "batch s"]]
)


def max_attention_logit(
    query: Float[Array, "batch t heads width"],
    key: Float[Array, "batch s key_heads width"],
    *,
    scale: Scalar | None = None,
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    is_causal: bool = False,
    segment_ids: SegmentIds | None = None,
    block_size: int = 512,
) -> Float[Array, "batch heads"]:
    """Finds the largest attention logit of each head: scaled, biased, before softmax.

    Exact and in float32. Works through blocks of queries and keys, so that no temporary is larger
    than one block of logits. Arguments mean what they mean in `jax.nn.dot_product_attention`.
    Nothing flows back through it: the gradient is zero. Soft-capped attention passes query and key
    as they are; the number wanted is the one before the cap.

    Args:
      query: Queries. Head h uses key head `h // (heads // key_heads)`.
      key: Keys. The number of heads divides the number of query heads.
      scale: Factor on `q . k`. None is `width ** -0.5`.
      bias: Added after the scale; four axes, each full or 1: `[batch, heads, t, s]`.
      mask: True where a pair may attend; four axes, each full or 1. A masked pair does not count.
      is_causal: Whether query i sees only keys j <= i.
      segment_ids: A pair attends only if its ids are equal. `[batch, length]` for t == s, else one
        array for the queries and one for the keys. No id is special: mask padding out.
      block_size: Queries, and keys, of one block.

    Returns:
      float32. A head whose pairs are all masked gives -inf. A NaN in an input gives NaN in its own
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
    _check_shapes(query, key, bias, mask, ids, block_size)
    query, key, bias, scale = jax.lax.stop_gradient((query, key, bias, scale))
    (batch, t, heads, width), (s, key_heads) = query.shape, key.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    size, key_size = min(block_size, t), min(block_size, s)

    def block_max(i: Start, j: Start) -> Float[Array, "batch key_heads group"]:
        q, k = _block(query, i, size, axis=1), _block(key, j, key_size, axis=1)
        logits = _dot(q.reshape(batch, size, key_heads, heads // key_heads, width), k)
        logits = jnp.asarray(scale, logits.dtype) * logits
        if bias is not None:
            logits += _tile(bias, i, j, size, key_size, key_heads).astype(logits.dtype)
        visible = _causal(i, j, size, key_size) if is_causal else True
        if mask is not None:
            visible &= _tile(mask, i, j, size, key_size, key_heads)
        if ids is not None:
            visible &= _same_segment(ids, i, j, size, key_size)
        # -inf, not a large number: a masked pair must never be the maximum that is reported.
        return jnp.max(jnp.where(visible, logits, -jnp.inf), axis=(-2, -1))

    def step(largest, pair):
        return jnp.maximum(largest, block_max(*pair)), None

    first, *others = _block_pairs(t, s, size, key_size, is_causal)
    # The first block is the start value; a constant would lack the varying axes of `shard_map`.
    largest = block_max(*first)
    if others:
        largest, _ = jax.lax.scan(step, largest, jnp.asarray(others, jnp.int32))
    return largest.reshape(batch, heads).astype(jnp.float32)


def _block_pairs(t: int, s: int, size: int, key_size: int, is_causal: bool) -> list[Pair]:
    """Lists where each pair of blocks starts, less those that causality masks whole."""
    # The last block is moved back to end at the end: what is seen twice does not change a maximum.
    starts = [min(i, t - size) for i in range(0, t, size)]
    key_starts = [min(j, s - key_size) for j in range(0, s, key_size)]
    return [(i, j) for i in starts for j in key_starts if not is_causal or j < i + size]


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


def _block(x: Array, start: Start, size: int, axis: int) -> Array:
    """Cuts one block; an axis of that size already (or of size 1, to broadcast) stays."""
    if x.shape[axis] in (1, size):
        return x
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _tile(
    x: Shaped[Array, "#b #n #t #s"], i: Start, j: Start, size: int, key_size: int, key_heads: int
) -> Shaped[Array, "#b #k #g #bt #bs"]:
    """Cuts the block of a bias or mask, its heads in groups, its axes of size 1 left alone."""
    batch, heads = x.shape[:2]
    x = _block(_block(x, i, size, axis=2), j, key_size, axis=3)
    groups = (1, 1) if heads == 1 else (key_heads, heads // key_heads)
    return x.reshape(batch, *groups, *x.shape[2:])


def _causal(i: Start, j: Start, size: int, key_size: int) -> Bool[Array, "1 1 1 bt bs"]:
    """Marks the pairs whose key is not later than their query."""
    visible = j + jnp.arange(key_size)[None, :] <= i + jnp.arange(size)[:, None]
    return visible[None, None, None]


def _query_and_key_ids(ids: SegmentIds | None) -> tuple[Array, Array] | None:
    """Gives the ids of the queries and of the keys, where there are any."""
    return ids if ids is None or isinstance(ids, tuple) else (ids, ids)


def _same_segment(
    ids: tuple[Array, Array], i: Start, j: Start, size: int, key_size: int
) -> Bool[Array, "b 1 1 bt bs"]:
    """Marks the pairs that lie in one segment."""
    own, other = _block(ids[0], i, size, axis=1), _block(ids[1], j, key_size, axis=1)
    return (own[:, :, None] == other[:, None, :])[:, None, None]


def _check_shapes(query, key, bias, mask, ids, block_size) -> None:
    """Raises one error that names every argument that does not fit."""
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(
            f"max_attention_logit: query {query.shape} and key {key.shape} need four axes: "
            "[batch, t, heads, width] and [batch, s, key_heads, width]."
        )
    (b, t, n, h), (s, k) = query.shape, key.shape[1:3]
    faults = []
    if (key.shape[0], key.shape[3]) != (b, h):
        faults.append(f"key {key.shape} has another batch or width than query {query.shape}.")
    if k == 0 or n % k:
        faults.append(f"query has {n} heads, no multiple of the {k} heads of key.")
    if 0 in (t, s):
        faults.append(f"there are {t} queries and {s} keys; a maximum needs one of each.")
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None and not _broadcasts(x.shape, (b, n, t, s)):
            faults.append(f"{name} {x.shape} does not broadcast to [b, n, t, s] {(b, n, t, s)}.")
    for x, length in zip(ids or (), (t, s), strict=False):
        if x.shape != (b, length):
            faults.append(f"segment_ids {x.shape} should be {(b, length)}; give a pair if t != s.")
    if block_size < 1:
        faults.append(f"block_size is {block_size}; it must be at least 1.")
    if faults:
        raise ValueError("\n  ".join(["max_attention_logit: the arguments do not fit.", *faults]))
    if mask is not None and mask.dtype != bool:
        raise TypeError(
            f"max_attention_logit: mask has dtype {mask.dtype}, expected bool. A mask of zeros and "
            "ones: mask.astype(bool). A mask that is added to the logits: pass it as bias."
        )


def _broadcasts(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Tells whether every axis is full or 1; a missing axis does not count as 1."""
    return len(shape) == len(full) and all(a in (1, b) for a, b in zip(shape, full, strict=True))

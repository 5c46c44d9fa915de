"""Marks the pairs of queries and keys that may attend, one block of both at a time.

Query i sees key j if  lo <= j - i <= hi,  i and j are within their lengths,  their ids are equal,
and the mask is True: the rules of `jax.nn.dot_product_attention`, and segments.
"""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Integer, Shaped

# Start of a block: a number for the first, traced inside a scan.
Start: TypeAlias = int | Integer[Array, ""]
Pair: TypeAlias = tuple[int, int]
# Both sides of a window, or one number for each of them.
Window: TypeAlias = int | Pair


class Block(NamedTuple):
    """A run of queries or of keys.

    Attributes:
      start: Position of the first.
      size: Number of positions.
    """

    start: Start
    size: int

    @property
    def positions(self) -> Integer[Array, " size"]:
        """Lists their positions."""
        return self.start + jnp.arange(self.size, dtype=jnp.int32)


class Rules(NamedTuple):
    """The rules that hide pairs; None hides nothing.

    Attributes:
      band: Least and largest j - i.
      lengths: Numbers of queries and of keys without padding, `[batch]` each.
      ids: Segments of the queries and of the keys, `[batch, t]` and `[batch, s]`.
      mask: True where a pair may attend; four axes, each full or 1.
    """

    band: Pair | None
    lengths: tuple[Integer[Array, " batch"] | None, Integer[Array, " batch"] | None] = (None, None)
    ids: tuple[Integer[Array, "batch t"], Integer[Array, "batch s"]] | None = None
    mask: Bool[Array, "#batch #heads #t #s"] | None = None


def band(t: int, s: int, is_causal: bool, window: Window | None) -> Pair | None:
    """Returns the least and the largest j - i that causality and the window allow.

    Args:
      t: Number of queries.
      s: Number of keys.
      is_causal: Whether j <= i.
      window: `(left, right)`, for i - left <= j <= i + right; None for all.

    Returns:
      `(lo, hi)`, or None if every pair passes. No pair passes if lo > hi.

    Example:
      >>> band(8, 8, is_causal=True, window=3)
      (-3, 0)
    """
    lo, hi = 1 - t, s - 1
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        lo, hi = max(lo, -left), min(hi, right)
    if is_causal:
        hi = min(hi, 0)
    return None if (lo, hi) == (1 - t, s - 1) else (lo, hi)


def block_pairs(t: int, s: int, size: int, key_size: int, within: Pair | None) -> list[Pair]:
    """Lists the starts of all pairs of blocks that touch the band.

    Args:
      t: Number of queries.
      s: Number of keys.
      size: Queries of one block.
      key_size: Keys of one block.
      within: The band.

    Returns:
      Starts of queries and of keys; the first pair if all are outside.

    Example:
      >>> block_pairs(4, 4, 2, 2, within=(-3, 0))
      [(0, 0), (2, 0), (2, 2)]
    """
    # The last block is moved back to end at the end: a maximum may see a pair twice.
    starts = [min(i, t - size) for i in range(0, t, size)]
    key_starts = [min(j, s - key_size) for j in range(0, s, key_size)]
    lo, hi = within or (1 - t, s - 1)

    def touches(i: int, j: int) -> bool:
        # Inside a pair of blocks, j - i has every value between its values at two corners.
        return max(lo, j - (i + size - 1)) <= min(hi, j + key_size - 1 - i)

    return [(i, j) for i in starts for j in key_starts if touches(i, j)] or [(0, 0)]


def visible(
    rules: Rules, own: Block, other: Block, key_heads: int
) -> Bool[Array, "#b #k #g #bt #bs"] | bool:
    """Marks the pairs of one block of queries and one of keys that may attend.

    Args:
      rules: The rules that hide pairs.
      own: The queries.
      other: The keys.
      key_heads: Number of heads of the keys.

    Returns:
      `[batch, key_heads, group, queries, keys]`, axes of size 1 if it is the same for all;
      True without a rule.
    """
    marks = True
    if rules.band is not None:
        lo, hi = rules.band
        ahead = other.positions[None, :] - own.positions[:, None]
        marks &= ((lo <= ahead) & (ahead <= hi))[None, None, None]
    for length, block, axis in zip(rules.lengths, (own, other), (-1, -2), strict=True):
        if length is not None:
            inside = block.positions[None, :] < length[:, None]
            marks &= jnp.expand_dims(inside, (1, 2, axis))
    if rules.ids is not None:
        marks &= _same_segment(rules.ids, own, other)
    if rules.mask is not None:
        marks &= tile(rules.mask, own, other, key_heads)
    return marks


def cut(x: Array, blocks: dict[int, Block]) -> Array:
    """Cuts a block out of each of these axes.

    An axis of that size already (or of size 1, to broadcast) stays.
    """
    starts: list[Start] = [0] * x.ndim
    sizes = list(x.shape)
    for axis, block in blocks.items():
        if x.shape[axis] not in (1, block.size):
            starts[axis], sizes[axis] = block.start, block.size
    if sizes == list(x.shape):
        return x

    def sliced(x: Array, starts: list[Start]) -> Array:
        return jax.lax.dynamic_slice(x, starts, sizes)

    def sliced_alone(x: Array, starts: list[Start]) -> Array:
        return sliced(*jax.lax.optimization_barrier((x, starts)))

    if x.dtype != jnp.bfloat16:
        return sliced(x, starts)
    # XLA for CPU (jaxlib 0.10) casts bfloat16 to float32 to slice it, and moves the cast, of all of
    # x, out of the loop. The barrier keeps it in, for one block; on TPU it would copy x every step.
    return jax.lax.platform_dependent(x, starts, cpu=sliced_alone, default=sliced)


def tile(
    x: Shaped[Array, "#b #n #t #s"], own: Block, other: Block, key_heads: int
) -> Shaped[Array, "#b #k #g #bt #bs"]:
    """Cuts the block of a bias or mask, and splits its heads into groups; axes of size 1 stay."""
    batch, heads = x.shape[:2]
    x = cut(x, {2: own, 3: other})
    groups = (1, 1) if heads == 1 else (key_heads, heads // key_heads)
    return x.reshape(batch, *groups, *x.shape[2:])


def _same_segment(ids: tuple[Array, Array], own: Block, other: Block) -> Bool[Array, "b 1 1 bt bs"]:
    """Marks the pairs within one segment."""
    mine, theirs = cut(ids[0], {1: own}), cut(ids[1], {1: other})
    return (mine[:, :, None] == theirs[:, None, :])[:, None, None]

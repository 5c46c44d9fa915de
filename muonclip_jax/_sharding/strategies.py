"""Counts the FLOPs and bytes of every way to distribute equal matrices over devices."""

from typing import NamedTuple

# Bytes of the matrices that are exchanged at once. Newton-Schulz holds a few times more.
MAX_EXCHANGED_BYTES = 3 * 2**27

# FLOPs that a device computes in the time of sending one byte. Work with fewer FLOPs is repeated on
# several devices rather than shared. From data sheets: TPU v5p 459e12 / 600e9 = 765, H100 over
# NVLink 989e12 / 900e9 = 1100. Matrices of more than a few hundred rows are far from the limit.
FLOPS_PER_BYTE = 1000


class Matrix(NamedTuple):
    """One matrix of a group.

    Attributes:
      m: Short side.
      n: Long side.
      flops: FLOPs of a device that orthogonalizes it alone.
      itemsize: Bytes of a number in transfer.
      shared_flops: FLOPs of all devices that share it; None for `flops`.
    """

    m: int
    n: int
    flops: float
    itemsize: int
    shared_flops: float | None = None

    def flops_of_sharing(self, sharers: int) -> float:
        """FLOPs of each of its sharers."""
        return (self.flops if self.shared_flops is None else self.shared_flops) / sharers

    @property
    def bytes(self) -> int:
        return self.m * self.n * self.itemsize

    def bytes_of_sharing(self) -> int:
        """Bytes that a sharer sends: two sums of X Xᴴ, and rows of fourteen products."""
        # Five Gram steps: two windows; 3 products in each step, but 1 in the first and 2 in the
        # last, whose R is not needed. Sums are unrounded, and are sent twice.
        return self.m**2 * (2 * 2 * 4 + 14 * self.itemsize)


class Strategy(NamedTuple):
    """A way to distribute the matrices of a group over devices; see `Group`."""

    full: int
    remainder: int
    sharers: int
    in_place: bool
    flops: float
    bytes_sent: float

    @property
    def cost(self) -> float:
        return self.flops + FLOPS_PER_BYTE * self.bytes_sent


def cheapest(
    matrix: Matrix, count: int, shards: int, width: int, are_rows_sharded: bool
) -> Strategy:
    """Finds the strategy that takes least time.

    Args:
      matrix: One of the matrices.
      count: Number of matrices of which a device has a shard.
      shards: Number of shards of each.
      width: Columns of a shard.
      are_rows_sharded: Whether a shard lacks rows.

    Returns:
      The strategy.

    Example:
      >>> cheapest(Matrix(512, 512, 30 * 512**3, 2), 16, 4, 128, False).full
      4
    """
    found = candidates(matrix, count, shards, width, are_rows_sharded)
    return min(found, key=lambda strategy: strategy.cost)


def candidates(
    matrix: Matrix, count: int, shards: int, width: int, are_rows_sharded: bool
) -> list[Strategy]:
    """Lists the ways to orthogonalize `count` matrices, each in `shards` blocks of `width` columns.

    1. full matrices, padded with zero matrices
    2. full matrices, and a remainder that is shared
    3. all of them shared in place
    """
    if shards == 1:
        return [Strategy(count, 0, 1, False, count * matrix.flops, 0.0)]
    full, remainder = divmod(count, shards)
    padded = full + (remainder > 0)
    exchanged = 2 * matrix.bytes / shards * (shards - 1) / shards  # for each matrix
    found = [Strategy(padded, 0, 1, False, padded * matrix.flops, padded * shards * exchanged)]
    for sharers in _divisors(shards):
        if remainder and 1 < sharers <= shards // remainder and width % sharers == 0:
            flops = full * matrix.flops + matrix.flops_of_sharing(sharers)
            sent = (full * shards + shards // sharers) * exchanged + matrix.bytes_of_sharing()
            found.append(Strategy(full, remainder, sharers, False, flops, sent))
    if not are_rows_sharded:
        flops, sent = count * matrix.flops_of_sharing(shards), count * matrix.bytes_of_sharing()
        found.append(Strategy(0, count, shards, True, flops, sent))
    return found


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def chunk_size(full: int, bytes_each: int) -> int:
    """Returns how many matrices to exchange at once: the largest divisor that fits the memory."""
    return largest_divisor(full, MAX_EXCHANGED_BYTES // max(1, bytes_each))


def largest_divisor(number: int, limit: int) -> int:
    """Returns the largest divisor of a number up to a limit, at least 1; 0 of 0."""
    return max((d for d in _divisors(number) if d <= limit), default=1) if number else 0

"""How the kernel of `tpu_kernel.py` cuts its products: the tiles with the fewest cycles.

The cycles of each part of the kernel were read from what the TPU compiler generates, for every
generation: benchmarks/results/tpu_kernel_cycles.json, by `python -m benchmarks.tpu_kernel_cycles`.
No chip has confirmed them yet.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple


class Tiles(NamedTuple):
    """How a symmetric n x n product, whose sums have m terms, is cut.

    Attributes:
      side: Rows and columns of a tile of the result, a multiple of 128.
      depth: Terms that are fetched at once: m, or a multiple of `chunk`.
      chunk: Terms that are multiplied at once, a multiple of 128.
    """

    side: int
    depth: int
    chunk: int

    def positions(self, n: int) -> int:
        """Counts the tiles on and above the diagonal."""
        count = -(-n // self.side)
        return count * (count + 1) // 2

    def share(self, n: int) -> float:
        """Returns the FLOPs, as a fraction of those of a product that computes every number."""
        return self.positions(n) * self.side**2 / n**2

    def vmem(self, itemsize: int) -> int:
        """Counts the bytes in fast memory: two buffers of each block, and tiles for the sums."""
        blocks = 2 * self.side * self.depth + 3 * self.side**2  # factors; A, B and the result
        return 2 * blocks * itemsize + self.side**2 * (itemsize + 4)


class Regions(NamedTuple):
    """The cycles of the parts of the kernel, for one side of its tiles.

    Attributes:
      chunk: Terms that are multiplied at once.
      sum: Cycles to multiply them, and to add them up.
      write: Cycles of the sum with A, B and I, once for each position.
      mirror: Cycles of the transposed tile, once for each position off the diagonal.
      step: Cycles of the pipeline of blocks, once for each step.
    """

    chunk: int
    sum: int
    write: int
    mirror: int
    step: int


class Chip(NamedTuple):
    """A generation of TPUs; for each device of JAX.

    Attributes:
      cores: Cores that share a kernel.
      macs: Multiply-adds of bfloat16 that the matrix units of a core do in a cycle.
      bandwidth: Bytes of HBM that a core reads or writes in a cycle.
      vmem: Bytes of fast memory of a core.
      smallest: Short side from which the kernel takes fewer cycles than XLA's product.
      sides: The cycles for each side of tiles.
    """

    cores: int
    macs: int
    bandwidth: float
    vmem: int
    smallest: int
    sides: dict[int, Regions]


# By JAX's name of a device. Memories: jax.experimental.pallas.tpu.get_tpu_info_for_chip, whose
# bytes in a second are divided by the clock: the FLOPs there, by two for each multiply-add.
CHIPS = {
    "TPU v5 lite": Chip(1, 4 * 128**2, 546, 2**27, 1024, {
        256: Regions(1024, 918, 84, 135, 158),
        512: Regions(512, 1917, 300, 417, 160),
    }),
    "TPU v5": Chip(2, 4 * 128**2, 702, 2**26, 1024, {
        256: Regions(1024, 918, 84, 135, 155),
        512: Regions(512, 1917, 300, 417, 155),
    }),
    "TPU v6 lite": Chip(1, 4 * 256**2, 935, 2**27, 2048, {
        512: Regions(1024, 1232, 297, 217, 154),
        1024: Regions(1024, 4331, 1161, 840, 154),
    }),
    "TPU7x": Chip(1, 4 * 256**2, 1680, 2**26, 2048, {
        512: Regions(1024, 667, 379, 208, 709),
        1024: Regions(1024, 2932, 1531, 811, 156),
    }),
}  # fmt: skip
CHIPS |= {
    "TPU v5e": CHIPS["TPU v5 lite"],
    "TPU v5p": CHIPS["TPU v5"],
    "TPU v6e": CHIPS["TPU v6 lite"],
}

# The kind whose tiles are interpreted on a CPU. A program that is compiled on a CPU for an unknown
# TPU has them as well: they fit all kinds.
DEFAULT_KIND = "TPU v5"

# Part of the fast memory that the kernel may use: XLA and the compiler need some of it.
_PART_OF_VMEM = 0.85
_DEPTHS = (1024, 2048, 4096, 8192)


def cycles(
    n: int, m: int, itemsize: int, added: int, tiles: Tiles, r: Regions, chip: Chip
) -> float:
    """Estimates the cycles of a product.

    A step takes as long as its instructions, or as the blocks that it fetches for the next step.
    All steps take as long as that, or as all bytes. The first blocks are fetched before, and the
    last tile is written after them.

    Args:
      n: Short side.
      m: Terms of the sums.
      itemsize: Bytes of a number.
      added: Matrices in the sum with A and B.
      tiles: How the product is cut.
      r: The cycles for this side of tiles.
      chip: The device.

    Returns:
      Cycles of the device.
    """
    side, depth, positions = tiles.side, min(tiles.depth, m), tiles.positions(n)
    count, K = -(-n // side), -(-m // depth)
    last = m - (K - 1) * depth
    chunk = max(r.sum / r.chunk * tiles.chunk, side**2 * tiles.chunk / chip.macs)
    remainder = side**2 * (last % tiles.chunk) / chip.macs
    mirrored = (positions - count) / positions  # the others are on the diagonal
    block, tile = side * depth * itemsize, side**2 * itemsize
    # The next step needs two blocks. With all terms in a step, a row of tiles shares the left one.
    fetched = 2 * block if K > 1 else block * (1 + count / positions)
    fetch = (fetched + added * tile) / chip.bandwidth
    steps = [r.step + depth // tiles.chunk * chunk] * (K - 1)
    steps += [r.step + last // tiles.chunk * chunk + remainder + r.write]
    position = sum(max(step, fetch) for step in steps) + r.step + mirrored * r.mirror
    bytes_of_position = K * fetched + (added + 1 + mirrored) * tile
    in_turn = -(-positions // chip.cores)
    ends = (2 * block + tile) / chip.bandwidth
    return ends + in_turn * max(position, bytes_of_position / chip.bandwidth)


@functools.cache
def fastest(n: int, m: int, itemsize: int, kind: str | None) -> Tiles | None:
    """Finds the tiles with the fewest cycles, of the side that has the fewest for m = n.

    Args:
      n: Short side.
      m: Terms of the sums.
      itemsize: Bytes of a number.
      kind: JAX's name of the device; None if it is not known.

    Returns:
      The tiles. None if the product is too small for the kernel.

    Raises:
      ValueError: if the device has no measured tiles.

    Example:
      >>> fastest(4096, 4096, 2, "TPU v5").side, fastest(128, 512, 2, "TPU v5")
      (256, None)
    """
    if (kind := kind or DEFAULT_KIND) not in CHIPS:
        raise ValueError(
            f"newton_schulz: products='pallas' has no tiles for {kind!r}, only for "
            f"{', '.join(CHIPS)}. Pass products='xla'."
        )
    chip = CHIPS[kind]
    if n < chip.smallest:
        return None

    def best(m: int, sides: Iterable[int]) -> Tiles | None:
        found = [
            (cycles(n, m, itemsize, 1, tiles, chip.sides[side], chip), tiles)
            for side in sides
            for tiles in cuts(m, side, chip.sides[side].chunk, itemsize, chip)
        ]
        return min(found)[1] if found else None

    square = best(n, chip.sides)  # so that all products of a matrix have the same share
    return square and best(m, [square.side])


def cuts(m: int, side: int, chunk: int, itemsize: int, chip: Chip) -> list[Tiles]:
    """Lists the tiles of one side that fit the fast memory."""
    chunk = min(chunk, m // 128 * 128)
    depths = [d for d in (m, *_DEPTHS) if 0 < chunk <= d <= m]
    found = (Tiles(side, depth, chunk) for depth in depths)
    return [tiles for tiles in found if tiles.vmem(itemsize) <= _PART_OF_VMEM * chip.vmem]

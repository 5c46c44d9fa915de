"""How the kernel of `tpu_kernel.py` cuts its products: the tiles with the fewest cycles.

The cycles of each part of the kernel were read from what the TPU compiler generates, for every
generation: benchmarks/results/tpu_kernel_cycles.json, by `python -m benchmarks.tpu_kernel_cycles`.
No chip has confirmed them yet.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

# Rows and columns of a tile.
Part: TypeAlias = tuple[slice, slice]


class Tiles(NamedTuple):
    """How a product is cut. A symmetric n x n one has tiles on and above the diagonal.

    Attributes:
      side: Rows and columns of a tile of the result, a multiple of 128.
      depth: Terms of the sums that are fetched at once: all, or a multiple of `chunk`.
      chunk: Terms that are multiplied at once, a multiple of 128.
    """

    side: int
    depth: int
    chunk: int

    def on_side(self, n: int) -> int:
        """Counts the tiles on a side."""
        return -(-n // self.side)

    def positions(self, n: int) -> int:
        """Counts the tiles on and above the diagonal."""
        count = self.on_side(n)
        return count * (count + 1) // 2

    def parts(self, is_diagonal: bool) -> list[Part]:
        """Lists what is computed of a tile: of one on the diagonal, three of four blocks."""
        half, whole = self.side // 2, slice(0, self.side)
        if not is_diagonal or half % 128:
            return [(whole, whole)]
        return [(slice(0, half), whole), (slice(half, self.side), slice(half, self.side))]

    def area(self, n: int) -> int:
        """Counts the numbers that are computed of a symmetric n x n product."""
        diagonal = sum(_size(part) for part in self.parts(is_diagonal=True))
        count = self.on_side(n)
        return (self.positions(n) - count) * self.side**2 + count * diagonal

    def edge(self, m: int) -> int:
        """Counts the columns that are computed of the last tiles of a full product."""
        return -(-(m - (self.on_side(m) - 1) * self.side) // 128) * 128

    def flop_fraction(self, n: int) -> float:
        """Returns the FLOPs, as a fraction of those of a product that computes every number."""
        return self.area(n) / n**2

    def vmem(self, itemsize: int, is_symmetric: bool = True) -> int:
        """Counts the bytes in fast memory: two buffers of each block, and tiles of numbers."""
        blocks = 2 * self.side * self.depth + 3 * self.side**2  # factors; A, B and the result
        # The sums, and the transposed tile, or two tiles of float32 for the compiler.
        tiles = 4 + itemsize if is_symmetric else 3 * 4
        return 2 * blocks * itemsize + self.side**2 * tiles


def _size(part: Part) -> int:
    return math.prod(x.stop - x.start for x in part)


class Regions(NamedTuple):
    """The cycles of the parts of the kernel, for one side of its tiles.

    Attributes:
      chunk: Terms that are multiplied at once.
      step: Cycles of the pipeline of blocks, once for each step.
      sum: Cycles to multiply a chunk, and to add it up.
      write: Cycles of the last chunk, with the sum with A, B and I, once for each position.
      transposed: Cycles to write the transposed tile, once for each position off the diagonal.
      diagonal_sum: `sum` of a tile on the diagonal.
      diagonal_write: `write` of a tile on the diagonal.
    """

    chunk: int
    step: int
    sum: int
    write: int
    transposed: int = 0
    diagonal_sum: int = 0
    diagonal_write: int = 0


class Chip(NamedTuple):
    """A generation of TPUs; for each device of JAX.

    Attributes:
      cores: Cores that share a kernel.
      macs: Multiply-adds of bfloat16 that the matrix units of a core do in a cycle.
      bandwidth: Bytes of HBM that a core reads or writes in a cycle.
      vmem: Bytes of fast memory of a core.
      smallest: Short side from which a symmetric product takes fewer cycles than XLA's.
      smallest_full: Shortest of all three sides from which a full product does.
      sides: The cycles for each side of the tiles of a symmetric product.
      full_sides: The cycles for each side of the tiles of a full product.
    """

    cores: int
    macs: int
    bandwidth: float
    vmem: int
    smallest: int
    smallest_full: int
    sides: dict[int, Regions]
    full_sides: dict[int, Regions]


class Shape(NamedTuple):
    """A product.

    Attributes:
      rows: Rows of the result.
      columns: Columns of the result.
      terms: Terms of its sums.
      itemsize: Bytes of a number.
      is_symmetric: Whether half of its tiles are computed.
      added: Matrices that are added to the product.
    """

    rows: int
    columns: int
    terms: int
    itemsize: int
    is_symmetric: bool
    added: int = 1


# By JAX's name of a device. Memories: jax.experimental.pallas.tpu.get_tpu_info_for_chip, whose
# bytes in a second are divided by the clock: the FLOPs there, by two for each multiply-add.
CHIPS = {
    "TPU v5 lite": Chip(1, 4 * 128**2, 546, 2**27, 1024, 1024, {
        256: Regions(1024, 171, 916, 1018, 37, 736, 722),
        512: Regions(512, 170, 1915, 2110, 133, 1492, 1491),
    }, {
        512: Regions(512, 172, 1915, 1951),
        1024: Regions(512, 173, 7855, 7048),
    }),
    "TPU v5": Chip(2, 4 * 128**2, 702, 2**26, 1024, 1024, {
        256: Regions(1024, 168, 916, 1018, 37, 736, 722),
        512: Regions(512, 169, 1915, 2110, 133, 1492, 1491),
    }, {
        512: Regions(512, 174, 1915, 1951),
        1024: Regions(512, 173, 7855, 7048),
    }),
    "TPU v6 lite": Chip(1, 4 * 256**2, 935, 2**27, 2048, 2048, {
        512: Regions(1024, 168, 1230, 1284, 69, 998, 1006),
        1024: Regions(1024, 167, 4329, 4412, 261, 3350, 3388),
    }, {
        512: Regions(1024, 168, 1230, 1240),
        1024: Regions(1024, 168, 4329, 4393),
    }),
    "TPU7x": Chip(1, 4 * 256**2, 1680, 2**26, 2048, 2048, {
        512: Regions(1024, 172, 667, 964, 63, 752, 847),
        1024: Regions(1024, 172, 2932, 3553, 255, 2224, 2686),
    }, {
        512: Regions(1024, 164, 667, 937),
        1024: Regions(1024, 164, 2932, 3707),
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
_BFLOAT16 = 2  # bytes

# Of the kernel for GPUs, by the bytes of a number, and the short side from which it is used. All
# are untimed; 64 terms at a time in float32 would not fit the registers of an H100.
_GPU_TILES, _SMALLEST_ON_GPU = {2: Tiles(128, 64, 64), 4: Tiles(128, 32, 32)}, 1024
# Rows have to start at a multiple of these bytes, or a GPU loads single numbers, which is slow.
_GPU_ALIGNMENT = 16


def cycles(shape: Shape, tiles: Tiles, r: Regions, chip: Chip) -> float:
    """Estimates the cycles of a product.

    A step takes as long as its instructions, as the matrix units, or as the blocks that it fetches
    for the next step. All steps take as long as that, or as all bytes. The first blocks are fetched
    before, and the last tile is written after them.

    Args:
      shape: The product.
      tiles: How it is cut.
      r: The cycles for this side of tiles.
      chip: The device.

    Returns:
      Cycles of the device.
    """
    side, depth = tiles.side, min(tiles.depth, shape.terms)
    rows, K = tiles.on_side(shape.rows), -(-shape.terms // depth)
    kinds = list(_kinds(shape, tiles, r))
    positions = sum(kind.count for kind in kinds)
    mirrored = kinds[0].count / positions if shape.is_symmetric else 0.0
    block, tile = side * depth * shape.itemsize, side**2 * shape.itemsize
    # The next step needs two blocks. With all terms in a step, a row of tiles shares the left one.
    fetched = 2 * block if K > 1 else block * (1 + rows / positions)
    fetch = (fetched + shape.added * tile) / chip.bandwidth

    def position(kind: _Kind) -> float:
        last = (shape.terms - 1) % tiles.chunk + 1  # terms of the last chunk
        in_units = kind.area / chip.macs  # cycles of the matrix units for each term
        chunk = max(kind.sum / r.chunk, in_units) * tiles.chunk
        last_chunk = max(kind.write - (r.chunk - last) * kind.sum / r.chunk, last * in_units)
        in_last_step = -(-(shape.terms - (K - 1) * depth) // tiles.chunk)
        steps = [r.step + depth // tiles.chunk * chunk] * (K - 1)
        steps += [r.step + (in_last_step - 1) * chunk + last_chunk]
        return sum(max(step, fetch) for step in steps) + kind.own

    mean = sum(kind.count * position(kind) for kind in kinds) / positions
    bytes_of_position = K * fetched + (shape.added + 1 + mirrored) * tile
    in_turn = -(-positions // chip.cores)
    ends = (2 * block + tile) / chip.bandwidth
    return ends + in_turn * max(mean, bytes_of_position / chip.bandwidth)


class _Kind(NamedTuple):
    """Positions that take equal cycles; `own` are the cycles of step K."""

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    area: int
    sum: float
    write: float
    own: int


def _kinds(shape: Shape, tiles: Tiles, r: Regions) -> Iterator[_Kind]:
    """Yields the kinds of positions: above the diagonal and on it, or inside and at the edge."""
    side, rows = tiles.side, tiles.on_side(shape.rows)
    if shape.is_symmetric:
        area = sum(_size(part) for part in tiles.parts(is_diagonal=True))
        above = tiles.positions(shape.rows) - rows
        yield _Kind(above, side**2, r.sum, r.write, r.step + r.transposed)
        yield _Kind(rows, area, r.diagonal_sum, r.diagonal_write, r.step)
    else:
        edge, inside = tiles.edge(shape.columns), tiles.on_side(shape.columns) - 1
        yield _Kind(rows * inside, side**2, r.sum, r.write, 0)
        yield _Kind(rows, side * edge, r.sum * edge / side, r.write * edge / side, 0)


@functools.cache
def fastest(n: int, m: int, itemsize: int, kind: str | None) -> Tiles | None:
    """Finds the tiles of a symmetric product, of the side that has the fewest cycles for m = n.

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
      (512, None)
    """
    if is_nvidia(kind):
        is_aligned = n * itemsize % _GPU_ALIGNMENT == m * itemsize % _GPU_ALIGNMENT == 0
        return _GPU_TILES[itemsize] if n >= _SMALLEST_ON_GPU and is_aligned else None
    chip = chip_of(kind)
    if n < chip.smallest:
        return None
    if (square := _best(Shape(n, n, n, itemsize, True), chip.sides, chip)) is None:
        return None
    # One side, so that all products of a matrix compute the same fraction.
    only = {square.side: chip.sides[square.side]}
    return _best(Shape(n, n, m, itemsize, True), only, chip)


@functools.cache
def fastest_full(
    rows: int, columns: int, terms: int, itemsize: int, kind: str | None
) -> Tiles | None:
    """Finds the tiles of a full product.

    Args:
      rows: Rows of the result.
      columns: Columns of the result.
      terms: Terms of the sums.
      itemsize: Bytes of a number.
      kind: See `fastest`.

    Returns:
      The tiles. None if XLA's product takes fewer cycles, or is the only one that was measured.

    Raises:
      ValueError: if the device has no measured tiles.
    """
    if is_nvidia(kind):
        return None
    chip = chip_of(kind)
    if min(rows, columns, terms) < chip.smallest_full or itemsize != _BFLOAT16:
        return None
    return _best(Shape(rows, columns, terms, itemsize, False), chip.full_sides, chip)


def is_nvidia(kind: str | None) -> bool:
    """Whether a kind of device is a GPU whose kernel is `gpu_kernel.py`."""
    return kind is not None and kind.startswith("NVIDIA")


def chip_of(kind: str | None) -> Chip:
    """Returns the generation of a device; raises ValueError if it is unknown."""
    if (kind := kind or DEFAULT_KIND) not in CHIPS:
        raise ValueError(
            f"newton_schulz: products='pallas' has no tiles for {kind!r}, only for NVIDIA GPUs, "
            f"{', '.join(CHIPS)}. Pass products='xla'."
        )
    return CHIPS[kind]


def _best(shape: Shape, sides: Mapping[int, Regions], chip: Chip) -> Tiles | None:
    found = [
        (cycles(shape, tiles, r, chip), tiles)
        for side, r in sides.items()
        for tiles in cuts(shape, side, r.chunk, chip)
    ]
    return min(found)[1] if found else None


def cuts(shape: Shape, side: int, chunk: int, chip: Chip) -> list[Tiles]:
    """Lists the tiles of one side that fit the fast memory."""
    terms, itemsize, limit = shape.terms, shape.itemsize, _PART_OF_VMEM * chip.vmem
    chunk = min(chunk, terms // 128 * 128)
    depths = [d for d in (terms, *_DEPTHS) if 0 < chunk <= d <= terms]
    found = [Tiles(side, depth, chunk) for depth in depths]
    return [x for x in found if x.vmem(itemsize, shape.is_symmetric) <= limit]

"""Estimates the cycles of the symmetric-product kernel from the TPU compiler's dump of its bundles.

A TPU executes one bundle of instructions per cycle, unless it waits. The dump has all bundles of a
kernel, with their loops and branches. From these come the cycles of each region of the kernel:

    sum       one chunk of terms: its bundles, or the cycles of the matrix units if these are more
    write     the epilogue, once for each position
    mirror    the transposed tile, once for each position off the diagonal
    step      everything around these, once for each step: the pipeline of blocks

A step takes as long as its regions, or as the blocks that it fetches for the next step. All
positions take as long as their steps, or as all bytes. The first fetch comes before. This is an
estimate from what the compiler wrote. No chip was at hand to confirm it.
"""

import dataclasses
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from muonclip_jax._orthogonalize.tiles import Tiles


class Chip(NamedTuple):
    """A device, as JAX counts them.

    Attributes:
      topology: A slice to compile for.
      kind: JAX's name of it.
      cores: Cores that share a kernel.
      macs: Multiply-adds of bfloat16 that the matrix units of a core do in a cycle.
      clock: Cycles in a second: the published FLOPs, by 2 `macs` `cores`.
      bandwidth: Bytes of HBM that a core reads and writes in a cycle.
    """

    topology: str
    kind: str
    cores: int
    macs: int
    clock: float
    bandwidth: float


def _chip(
    topology: str, kind: str, cores: int, macs: int, flops: float, bandwidth: float
) -> Chip:
    """Makes a chip from its FLOPs, and its bytes of HBM, in a second."""
    clock = flops / (2 * macs * cores)
    return Chip(topology, kind, cores, macs, clock, bandwidth / clock / cores)


# FLOPs and bandwidth: jax.experimental.pallas.tpu.get_tpu_info_for_chip. Matrix units: four of
# 128 x 128 (v5e, v5p), and of 256 x 256; a TPU7x is two devices.
CHIPS = {
    "v5e": _chip("v5e:2x2", "TPU v5 lite", 1, 4 * 128**2, 1.97e14, 8.2e11),
    "v5p": _chip("v5p:2x2x1", "TPU v5", 2, 4 * 128**2, 4.59e14, 2.46e12),
    "v6e": _chip("v6e:2x2", "TPU v6 lite", 1, 4 * 256**2, 9.2e14, 1.64e12),
    "tpu7x": _chip("tpu7x:2x2x1", "TPU7x", 1, 4 * 256**2, 1.155e15, 3.7e12),
}


@dataclasses.dataclass(frozen=True)
class Regions:
    """The bundles of a kernel.

    Attributes:
      sum: Of one chunk.
      sum_head: Around the loop over chunks, once for each step that sums.
      write: Of the epilogue.
      mirror: Of the transposed tile.
      step: Of the rest of a step.
    """

    sum: int
    sum_head: int
    write: int
    mirror: int
    step: int


class _Bundle(NamedTuple):
    """A bundle: its depth in loops, whether it is a target of branches, and its instructions."""

    depth: int
    is_target: bool
    text: str


_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*([> ]*)\{(.*)$")
_SKIP = re.compile(r"sbr\.rel \(!?%p\w+\) target = \$region(\d+)")


def read_regions(dump: str) -> Regions:
    """Reads the regions of a kernel from its file `*-final_bundles.txt`.

    Args:
      dump: The text of the file.

    Raises:
      ValueError: if there are not three regions that a branch skips.
    """
    bundles = _bundles(dump)
    skips = [
        (i, end)
        for i, bundle in enumerate(bundles)
        for number in _SKIP.findall(bundle.text)
        if (end := _end(bundles, i, number)) is not None
    ]
    inner = [
        (start, end)
        for start, end in skips
        if not any((start, end) != s and start <= s[0] and s[1] <= end for s in skips)
    ]
    if len(inner) != 3:
        raise ValueError(f"read_regions: 3 regions are expected, got {len(inner)}.")
    (first, last), *_ = inner
    depth = bundles[first].depth
    chunk = sum(b.depth > depth for b in bundles[first:last])
    sizes = [end - start - 1 for start, end in inner]
    step = sum(b.depth >= depth for b in bundles) - sum(sizes)
    head = sizes[0] - chunk if chunk else 0
    return Regions(chunk or sizes[0], head, sizes[1], sizes[2], step)


def _bundles(dump: str) -> list[_Bundle]:
    found: list[_Bundle] = []
    for line in dump.splitlines():
        if match := _BUNDLE.match(line):
            label, loops, text = match.groups()
            found.append(_Bundle(loops.count(">"), label in ("PF", "CT", "LE"), text))
        elif found:  # instructions may have line breaks
            found[-1] = found[-1]._replace(text=found[-1].text + line)
    return found


def _end(bundles: list[_Bundle], start: int, number: str) -> int | None:
    """Finds the bundle behind a region that a branch skips; None for branches backwards."""
    region = re.compile(rf"Start(/End empty)? region {number}\b")
    later = range(start + 1, len(bundles))
    return next((i for i in later if bundles[i].is_target and region.search(bundles[i].text)), None)


def newest_dump(folder: pathlib.Path, name: str) -> str:
    """Reads the bundles of the kernel of some name that was compiled last."""
    files = [f for f in folder.glob(f"*{name}*final_bundles.txt") if "schedule" not in f.name]
    return max(files, key=lambda f: f.stat().st_mtime_ns).read_text()


@dataclasses.dataclass(frozen=True)
class Product:
    """A product that the kernel computes, of single matrices.

    Attributes:
      kind: `"gram"`, X Xᵀ − r I; `"square"`, a A + c A A; `"product"`, a A + b B + c A B.
      n: Short side.
      m: Long side; n for the last two kinds.
      dtype: Dtype of the factors and the result.
    """

    kind: str
    n: int
    m: int
    dtype: Any = jnp.bfloat16

    @property
    def added(self) -> int:
        """Tiles that the epilogue reads."""
        return {"gram": 0, "square": 1, "product": 2}[self.kind]


def estimate(product: Product, tiles: Tiles, chip: Chip, regions: Regions) -> dict[str, float]:
    """Estimates the cycles of a product on one device.

    Returns:
      `cycles`, and what they consist of for one position: `position_cycles`, `position_fetches`
      (cycles of its blocks alone), and `first_fetch`.
    """
    n, m, side = product.n, product.m, tiles.side
    itemsize = jnp.dtype(product.dtype).itemsize
    count, positions = -(-n // side), tiles.positions(n)
    depth = min(tiles.depth, m)
    K = -(-m // depth)
    last_depth = m - (K - 1) * depth
    chunk = max(regions.sum, side**2 * tiles.chunk / chip.macs)
    remainder = side**2 * (last_depth % tiles.chunk) / chip.macs
    mirrored = (positions - count) / positions  # the others are on the diagonal

    def sums(terms: int) -> float:
        return regions.step + regions.sum_head + terms // tiles.chunk * chunk

    block, tile = side * depth * itemsize, side**2 * itemsize
    # The next step fetches two blocks; with all terms in one step, a row of tiles shares the left.
    fetched = 2 * block if K > 1 else block * (1 + count / positions)
    fetch, first = (b / chip.bandwidth for b in (fetched + product.added * tile, 2 * block))
    steps = [sums(depth)] * (K - 1) + [sums(last_depth) + regions.write + remainder]
    long = sum(max(step, fetch) for step in steps)
    position = long + regions.step + mirrored * regions.mirror
    written = tile * (1 + mirrored)
    all_bytes = (K * fetched + product.added * tile + written) / chip.bandwidth
    in_turn = -(-positions // chip.cores)
    return {
        "cycles": first + in_turn * max(position, all_bytes),
        "position_cycles": position,
        "position_fetches": all_bytes,
        "first_fetch": first,
    }

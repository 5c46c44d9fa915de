"""The cycles of the kernel of products, from the TPU compiler's dump of its bundles.

A core executes one bundle of instructions in a cycle, unless it waits. The dump has all bundles of
a kernel, with their loops and branches. A branch skips each part of the kernel that does not run at
every step: the loop over chunks, the last chunk with the epilogue, and the transposed tile.
"""

import math
import pathlib
import re
from typing import Any, NamedTuple

from benchmarks.compiled import FAST_MEMORY
from benchmarks.hlo import array_bytes, dimensions
from muonclip_jax._orthogonalize.tiles import (
    CHIPS,
    Chip,
    Regions,
    Shape,
    cycles,
    fastest,
    fastest_full,
)

# The passes of `tpu_shards`: how often they move each number of their argument, and the bundles for
# 1024 numbers, the most of four generations and of some shards: results/tpu_kernel_cycles.json.
PASSES = {"sums_of_squares": (1, 4.55), "assembled": (2, 4.47), "taken_apart": (2, 3.11)}

# Set before libtpu is loaded; {} is a folder.
DUMP_FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true"

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*([> ]*)\{(.*)$")
# Operands and results in fast memory, except vectors of settings.
_IN_FAST_MEMORY = re.compile(r"inlined_call_operand\.vmem \[shape: (\w+\[\d+(?:,\d+)+\])")
_SKIP = re.compile(r"sbr\.rel \(!?%p\w+\) target = \$region(\d+)")


class _Bundle(NamedTuple):
    """A bundle: how many loops it is in, whether branches may jump to it, its instructions."""

    depth: int
    is_target: bool
    text: str


def newest_dump(folder: pathlib.Path, kernel: str) -> str:
    """Reads the bundles of the kernel that was compiled last."""
    files = [f for f in folder.glob(f"*{kernel}*final_bundles.txt") if "schedule" not in f.name]
    return max(files, key=lambda f: f.stat().st_mtime_ns).read_text()


def read_regions(dump: str, chunk: int) -> Regions:
    """Reads the cycles of each part of the kernel.

    Args:
      dump: Text of the file `*-final_bundles.txt` of the kernel.
      chunk: Terms that one run of the inner loop multiplies.

    Raises:
      ValueError: if the dump does not have the parts of a symmetric or of a full product, or copies
        blocks of an array that XLA has placed in fast memory.
    """
    if array := _IN_FAST_MEMORY.search(dump):
        raise ValueError(
            f"read_regions: {array[1]} is in fast memory, and the bundles have the copies of its "
            "blocks. Expected all arrays in HBM: call the kernel by tpu_call.call_in_hbm."
        )
    bundles = _bundles(dump)
    skips = list(_skips(bundles))
    start, end = max(skips, key=lambda s: s[1] - s[0], default=(0, 0))
    depth = bundles[start].depth
    loops = [loop for loop in _loops(bundles, depth) if start < loop[0] and loop[1] <= end]
    inside = [s for s in skips if start < s[0] and s[1] <= end]
    stores = [s for s in inside if _has("vst ", bundles, s)]  # the pipeline of blocks has none
    without = [s for s in stores if not any(s[0] < loop[0] < s[1] for loop in loops)]
    parts = [
        s for s in without if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in without)
    ]
    sums = [last - first for first, last in loops]
    writes = [last - first - 1 for first, last in parts]
    if (len(sums), len(writes)) not in ((2, 3), (1, 1)):
        raise ValueError(
            "read_regions: a symmetric product has two loops and three other parts, a full one has "
            f"one of each, this dump has {len(sums)} and {len(writes)}."
        )
    step = sum(bundle.depth >= depth for bundle in bundles) - sum(sums) - sum(writes)
    write, *others = writes
    transposed, diagonal_write = others or (0, 0)
    return Regions(chunk, step, sums[0], write, transposed, sum(sums[1:]), diagonal_write)


def bundles_of_block(dump: str) -> int:
    """Counts the bundles that a pass needs for each block, from its dump."""
    return sum(bundle.depth > 0 for bundle in _bundles(dump))


def _loops(bundles: list[_Bundle], depth: int) -> list[tuple[int, int]]:
    """Lists the first and the last bundle of each loop below a depth that multiplies matrices."""
    found, first = [], None
    for i, bundle in enumerate(bundles):
        if bundle.depth > depth and first is None:
            first = i
        elif bundle.depth <= depth and first is not None:
            found.append((first, i))
            first = None
    return [loop for loop in found if _has(r"vmat", bundles, loop)]


def _has(instruction: str, bundles: list[_Bundle], part: tuple[int, int]) -> bool:
    """Whether an instruction that starts so is in a part."""
    return any(re.search(rf"\b{instruction}", bundle.text) for bundle in bundles[slice(*part)])


def _bundles(dump: str) -> list[_Bundle]:
    found: list[_Bundle] = []
    for line in dump.splitlines():
        if match := _BUNDLE.match(line):
            label, loops, text = match.groups()
            found.append(_Bundle(loops.count(">"), label in ("PF", "CT", "LE"), text))
        elif found:  # the comment of an instruction may have line breaks
            found[-1] = found[-1]._replace(text=found[-1].text + line)
    return found


def _skips(bundles: list[_Bundle]) -> Any:
    """Yields the first and the last bundle of each branch forwards."""
    for i, bundle in enumerate(bundles):
        for number in _SKIP.findall(bundle.text):
            region = re.compile(rf"Start(/End empty)? region {number}\b")
            for j in range(i + 1, len(bundles)):
                if bundles[j].is_target and region.search(bundles[j].text):
                    yield i, j
                    break


def cycles_of(kernels: dict[str, int], kind: str) -> float:
    """Estimates the cycles of all kernels of a program.

    Args:
      kernels: How often each runs, see `compiled.Cost`.
      kind: JAX's name of the device.

    Raises:
      ValueError: if one is not the kernel of products, or has an array in fast memory.
    """
    return sum(times * _cycles_of_one(kernel, kind) for kernel, times in kernels.items())


def _cycles_of_pass(name: str, array: str, chip: Chip) -> float:
    """Estimates the cycles of a pass: all bytes, or the bundles if they are more."""
    moves, bundles = PASSES[name]
    in_memory = moves * sum(array_bytes(array)) / chip.bandwidth
    return max(in_memory, bundles * math.prod(dimensions(array)) / 1024) / chip.cores


def _cycles_of_one(kernel: str, kind: str) -> float:
    """Estimates the cycles of a kernel, from its name and the shapes of its arrays."""
    name, *arrays = kernel.split()
    if FAST_MEMORY in arrays:
        raise ValueError(f"cycles_of: an array of {kernel} is in fast memory, expected HBM.")
    if name in PASSES:
        return _cycles_of_pass(name, arrays[0], CHIPS[kind])
    if name not in ("symmetric_gram_matrix", "symmetric_product", "full_product"):
        raise ValueError(f"cycles_of: {name} is not the kernel of products.")
    shapes = [[int(size) for size in re.findall(r"\d+", x.partition("[")[2])] for x in arrays]
    (count, n, terms), (*_, m) = shapes[:2]
    itemsize, added, chip = 4 if arrays[0].startswith("f32") else 2, len(shapes) - 2, CHIPS[kind]
    if name == "full_product":
        shape = Shape(n, m, terms, itemsize, False, added)
        cut, sides = fastest_full(n, m, terms, itemsize, kind), chip.full_sides
    else:
        shape = Shape(n, n, terms, itemsize, True, added)
        cut, sides = fastest(n, terms, itemsize, kind), chip.sides
    if cut is None:
        raise ValueError(f"cycles_of: {kind} has no kernel for {kernel}.")
    return count * cycles(shape, cut, sides[cut.side], chip)

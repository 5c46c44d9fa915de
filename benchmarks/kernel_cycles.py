"""The cycles of the symmetric-product kernel, from the TPU compiler's dump of its bundles.

A core executes one bundle of instructions in a cycle, unless it waits. The dump has all bundles of
a kernel, with their loops and branches. A branch skips each of the three parts of the kernel that
do not run at every step: the loop over chunks, the epilogue and the mirrored tile.
"""

import pathlib
import re
from typing import Any, NamedTuple

from muonclip_jax._orthogonalize.tiles import CHIPS, Regions, cycles, fastest

# Set before libtpu is loaded; {} is a folder.
DUMP_FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true"

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*([> ]*)\{(.*)$")
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
      ValueError: if the dump does not have the three parts.
    """
    bundles = _bundles(dump)
    skips = list(_skips(bundles))
    start, end = max(skips, key=lambda s: s[1] - s[0], default=(0, 0))
    stores = re.compile(r"\bvst ")  # the pipeline of blocks has none
    inside = [
        s
        for s in skips
        if start < s[0] and s[1] <= end and any(stores.search(b.text) for b in bundles[slice(*s)])
    ]
    parts = [s for s in inside if not any(o[0] < s[0] and s[1] <= o[1] for o in inside)]
    if len(parts) != 3:
        raise ValueError(f"read_regions: the kernel has three parts, this dump has {len(parts)}.")
    depth = bundles[start].depth
    head, write, mirror = (last - first - 1 for first, last in parts)
    loop = sum(bundle.depth > depth for bundle in bundles[slice(*parts[0])])
    if not loop:  # a single chunk has no loop
        loop = head
    step = sum(bundle.depth >= depth for bundle in bundles) - loop - write - mirror
    return Regions(chunk, loop, write, mirror, step)


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
      ValueError: if one is not the symmetric-product kernel.
    """
    total = 0.0
    for kernel, times in kernels.items():
        name, first, *others = kernel.split()
        if name not in ("symmetric_gram_matrix", "symmetric_product"):
            raise ValueError(f"cycles_of: {name} is not the symmetric-product kernel.")
        count, n, m = (int(size) for size in re.findall(r"\d+", first.partition("[")[2]))
        itemsize = 4 if first.startswith("f32") else 2
        cut, chip = fastest(n, m, itemsize, kind), CHIPS[kind]
        if cut is None:
            raise ValueError(f"cycles_of: {kind} has no kernel for {kernel}.")
        added = len(others) - 1
        each = cycles(n, m, itemsize, added, cut, chip.sides[cut.side], chip)
        total += times * count * each
    return total

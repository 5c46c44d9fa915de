"""Reads what a compiled step costs on each device; nothing is run.

    print(compiled_cost(jax.jit(step).lower(*arguments).compile()))

The program that XLA has made is text: functions of instructions, each with its shapes. Here those
that matter are counted, and what is in a loop as often as the loop runs. Works for CPU and TPU.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np

COLLECTIVES = (
    *("all-gather", "all-reduce", "all-to-all"),
    *("collective-permute", "ragged-all-to-all", "reduce-scatter"),
)
# Sums under "flops", "cycles", "unknown", ("count", kind) and ("sent", kind).
Figures: TypeAlias = dict[Any, float]

_FUNCTION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
# %name = shape opcode(%operand, ...), attributes
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
# Cycles that stand for none: 2^63 - 1, at what a SparseCore does.
_UNKNOWN = 2**62
# What runs another function once. The collectives of TPU7x run on its SparseCores: call-start.
_CALLS = ("fusion", "call", "async-start", "call-start")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does in one step.

    Attributes:
      flops: Of all matrix products; a multiply-add is two.
      counts: Number of collectives of each kind, but those of one device.
      sent: Bytes of each kind: the larger of what a device puts in and what it gets out.
      cycles: Cycles that the TPU compiler expects each of its kernels to take; 0 elsewhere.
      seconds: The TPU compiler's estimate for the step, without the time of links; None elsewhere.
      unknown_loops: Loops that do not tell how often they run: counted once, so that the figures
        are then too small.
      argument_bytes: Memory of the arguments.
      temporary_bytes: Memory besides arguments and results, as the compiler adds it up.
      peak_bytes: Most memory in use at any time, arguments included.
    """

    flops: float
    counts: dict[str, int]
    sent: dict[str, float]
    cycles: float
    seconds: float | None
    unknown_loops: int
    argument_bytes: int | None = None
    temporary_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def sent_bytes(self) -> float:
        """Bytes of all collectives."""
        return sum(self.sent.values())


def compiled_cost(compiled: Any) -> Cost:
    """Counts what a `jax.stages.Compiled` costs."""
    cost, once = (program_cost(compiled.as_text(), loops=loops) for loops in (True, False))
    memory = compiled.memory_analysis()
    seconds = (compiled.cost_analysis() or {}).get("optimal_seconds", 0.0)
    # The compiler takes each loop as if it ran once. On CPU its figure is negative.
    repeated = cost.cycles / once.cycles if once.cycles else 1.0
    return dataclasses.replace(
        cost,
        seconds=seconds * repeated if seconds > 0 else None,
        argument_bytes=getattr(memory, "argument_size_in_bytes", None),
        temporary_bytes=getattr(memory, "temp_size_in_bytes", None),
        peak_bytes=getattr(memory, "peak_memory_in_bytes", None),
    )


def program_cost(text: str, loops: bool = True) -> Cost:
    """Counts the same from the text alone, without what is only in the compiler.

    Args:
      text: Of the compiled program.
      loops: Whether a loop counts as often as it runs, or once.

    Raises:
      ValueError: if this is no such text.
    """
    program = _Program(text, loops)
    found = collections.defaultdict(float, program.total(program.entry))
    return Cost(
        flops=found["flops"],
        counts={kind: int(found["count", kind]) for kind in COLLECTIVES if found["count", kind]},
        sent={kind: found["sent", kind] for kind in COLLECTIVES if found["count", kind]},
        cycles=found["cycles"],
        seconds=None,
        unknown_loops=int(found["unknown"]),
    )


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names what it works on; in some programs each shape stands before its name."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def called(self, *keys: str) -> list[str]:
        """Lists the functions that stand under some attributes."""
        found = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return [name for names in found for name in re.findall(r"[\w.\-]+", names)]


class _Program:
    """The functions of a program; figures of each are found once."""

    def __init__(self, text: str, loops: bool) -> None:
        self.loops = loops
        self.functions: dict[str, dict[str, _Instruction]] = {}
        self.entry, inside = "", None
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if inside is not None and (match := _INSTRUCTION.match(line)):
                name, shape, opcode, rest = match.groups()
                inside[name] = _Instruction(name, shape, opcode, *_cut(rest))
            elif match := _FUNCTION.match(line):
                inside = self.functions.setdefault(match[2], {})
                self.entry = match[2] if match[1] else self.entry
            elif line.startswith("}"):
                inside = None
        if not self.entry:
            raise ValueError("program_cost: no ENTRY; expected what compiled.as_text() gives.")
        self.total = functools.cache(self._total)

    def _total(self, function: str) -> Figures:
        """Adds up one run of a function."""
        return _sum(self._figures(function, i) for i in self.functions[function].values())

    def _figures(self, function: str, i: _Instruction) -> Figures:
        """Gives the figures of one instruction and of all that it calls."""
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            return self._collective(function, i, kind)
        if i.opcode in ("dot", "convolution"):
            left, right = (_dimensions(self.functions[function][x].shape) for x in i.operands)
            flops = _dot_flops if i.opcode == "dot" else _convolution_flops
            return {"flops": flops(left, right, _dimensions(i.shape), i.attributes)}
        if i.opcode == "while":
            times, body = self._times(i), self.total(*i.called("body"))
            repeated = {key: value * (times or 1) for key, value in body.items()}
            return _sum([repeated, {"unknown": float(times is None)}])
        if i.opcode == "conditional":  # the dearest branch, figure by figure
            names = i.called("branch_computations", "true_computation", "false_computation")
            branches = [self.total(name) for name in names]
            return {k: max(b.get(k, 0.0) for b in branches) for branch in branches for k in branch}
        calls = ("calls", "to_apply") if i.opcode in _CALLS else ()
        inner = _sum(self.total(name) for name in (i.called(*calls) if calls else ()))
        expected = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
        if expected is None or int(expected[1]) >= _UNKNOWN:
            return inner
        return inner | {"cycles": float(expected[1])}  # of a fusion, for all that is in it

    def _times(self, i: _Instruction) -> int | None:
        """Tells how often a loop runs: while a counter is below a constant; None if not so."""
        if not self.loops:
            return 1
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', i.attributes):
            return int(known[1])
        condition = self.functions[i.called("condition")[0]]
        limits = [j.arguments for j in condition.values() if j.opcode == "constant"]
        below = [j for j in condition.values() if "direction=LT" in j.attributes]
        if not (below and len(limits) == 1 and limits[0].isdigit()):
            return None
        return math.ceil(int(limits[0]) / self._step(i, condition.get(below[0].operands[0])))

    def _step(self, i: _Instruction, counter: _Instruction | None) -> int:
        """Tells what a loop adds to its counter: 2 where XLA has put two turns into one."""
        body = self.functions[i.called("body")[0]]
        place = re.match(r"\W*index=(\d+)", counter.attributes) if counter else None
        root = list(body.values())[-1]
        if place is None or root.opcode != "tuple":
            return 1
        added = body[root.operands[int(place[1])]]
        terms = [body[name] for name in added.operands] if added.opcode == "add" else []
        steps = [int(term.arguments) for term in terms if term.opcode == "constant"]
        return steps[0] if steps else 1

    def _collective(self, function: str, i: _Instruction, kind: str) -> Figures:
        """Counts a collective, unless its groups are of one device."""
        if re.search(r"replica_groups=(\{\{\d+\}|\[\d+,1\])", i.attributes):
            return {}
        put_in = sum(sum(_bytes(self.functions[function][name].shape)) for name in i.operands)
        got_out = _bytes(i.shape)
        if i.opcode.endswith("-start") and kind != "all-reduce":  # inputs, outputs and others
            got_out = got_out[len(i.operands) : 2 * len(i.operands)]
        return {("count", kind): 1, ("sent", kind): max(put_in, sum(got_out))}


def _sum(parts: Iterable[Figures]) -> Figures:
    """Adds up figures of the same name."""
    total: dict[Any, float] = collections.defaultdict(float)
    for part in parts:
        for key, value in part.items():
            total[key] += value
    return dict(total)


def _cut(rest: str) -> tuple[str, str]:
    """Separates `arguments), attributes`."""
    depth = 1
    for end, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[:end], rest[end + 1 :]
    return rest, ""


def _dimensions(shape: str) -> list[int]:
    return [int(size) for size in _ARRAY.findall(shape)[0][1].split(",") if size]


def _bytes(shape: str) -> list[float]:
    """Lists the bytes of each array of a shape, which may be a tuple."""
    found = []
    for dtype, sizes in _ARRAY.findall(shape):
        width = re.search(r"\d+", dtype)  # of f8e4m3fn the first, too
        bits = int(width[0]) if width else 8  # pred
        found.append(math.prod(int(size) for size in sizes.split(",") if size) * bits / 8)
    return found


def _dot_flops(left: list[int], _: list[int], out: list[int], attributes: str) -> float:
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
    contracted = (left[int(axis)] for axis in axes[1].split(",") if axis) if axes else ()
    return 2.0 * math.prod(out) * math.prod(contracted)


def _convolution_flops(left: list[int], right: list[int], out: list[int], attributes: str) -> float:
    """Counts as products those of an entry that is there: a batch is a window full of holes."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels is not None
    of_left, of_right, of_out = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", attributes)
    settings = dict(pair.split("=") for pair in window[1].split()) if window else {}
    flops = 2.0 * right[of_right.index("i")]
    flops *= out[of_out.index("b")] * out[of_out.index("f")]
    for axis, label in enumerate(sorted(label for label in of_out if label.isdigit())):

        def setting(key: str, default: str, axis: int = axis) -> int:
            return int(settings.get(key, "x".join([default] * 9)).split("x")[axis].split("_")[0])

        o = np.arange(out[of_out.index(label)])[:, None]
        k = np.arange(right[of_right.index(label)])[None, :]
        at = o * setting("stride", "1") + k * setting("rhs_dilate", "1") - setting("pad", "0")
        holes = setting("lhs_dilate", "1")
        last = (left[of_left.index(label)] - 1) * holes
        flops *= np.count_nonzero((at >= 0) & (at <= last) & (at % holes == 0))
    return float(flops)

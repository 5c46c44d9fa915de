"""Reads the cost of a compiled program on each device. Nothing is executed.

    print(compiled_cost(jax.jit(step).lower(*arguments).compile()))

XLA returns the optimized program as text: computations of instructions, each with its shapes. This
module counts matrix products and collectives, and multiplies the contents of a loop by its trip
count. It reads programs compiled for CPU, TPU and GPU. On GPU it counts products of Triton and of
cuBLAS, not of cuDNN's attention.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

COLLECTIVES = (
    *("all-gather", "all-reduce", "all-to-all", "collective-broadcast"),
    *("collective-permute", "ragged-all-to-all", "reduce-scatter"),
)
# Sums under "flops", "cycles", "product cycles", "unknown", ("count", kind), ("sent", kind),
# ("kernel", name) and "kernel seconds".
Figures: TypeAlias = dict[Any, float]

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
# %name = shape opcode(%operand, ...), attributes
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
# The TPU compiler writes 2^63 - 1 cycles where it has no estimate: kernels on a SparseCore.
_NO_ESTIMATE = 2**62
# The compiler's roofline of a Pallas kernel on v5p, read from programs: FLOPs and bytes a second.
_PEAK, _BANDWIDTH = 394e12, 2.35e12
# Opcodes that run another computation once. TPU7x runs collectives on its SparseCores: call-start.
_CALLS = ("fusion", "call", "async-start", "call-start")
_GEMM = re.compile(r'custom_call_target="__cublas\$(gemm|lt\$matmul)')


@dataclasses.dataclass(frozen=True)
class Cost:
    """The work of one device in one step.

    Attributes:
      flops: FLOPs of all matrix products; a multiply-add counts as two.
      counts: Number of collectives of each kind, without collectives within a single device.
      sent: Bytes of each kind: the larger of the operands and the results on one device.
      cycles: Sum of the TPU compiler's estimates, without Pallas kernels; 0 on other platforms.
      seconds: The TPU compiler's estimate for the step without communication and without Pallas
        kernels; None elsewhere.
      unknown_loops: Loops without a known trip count. They count once, so the figures are too small
        if there are any.
      argument_bytes: Memory of the arguments.
      temporary_bytes: Memory allocated besides arguments and results.
      peak_bytes: Largest memory in use at any time, arguments included.
      kernels: How often each Pallas kernel runs, by its name and the shapes of its arrays.
      product_cycles: The part of `cycles` of fusions with matrix products.
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
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    product_cycles: float = 0.0

    @property
    def sent_bytes(self) -> float:
        """Bytes of all collectives."""
        return sum(self.sent.values())


class Collective(NamedTuple):
    """One collective instruction.

    Attributes:
      kind: Opcode, such as `"all-to-all"`.
      bytes: The larger of its operands and its results on one device.
      times: How often a step executes it; None inside a loop without a known trip count.
    """

    kind: str
    bytes: int
    times: int | None


def compiled_cost(compiled: Any) -> Cost:
    """Reads the cost of a `jax.stages.Compiled`."""
    text = compiled.as_text()
    cost, once = (program_cost(text, loops=loops) for loops in (True, False))
    memory = compiled.memory_analysis()
    seconds = (compiled.cost_analysis() or {}).get("optimal_seconds", 0.0)
    program = Program(text, loops=False)
    seconds -= program.total(program.entry).get("kernel seconds", 0.0)
    # The compiler's estimate counts each loop once. On CPU it is negative.
    repeated = cost.cycles / once.cycles if once.cycles else 1.0
    return dataclasses.replace(
        cost,
        seconds=seconds * repeated if seconds > 0 else None,
        argument_bytes=getattr(memory, "argument_size_in_bytes", None),
        temporary_bytes=getattr(memory, "temp_size_in_bytes", None),
        peak_bytes=getattr(memory, "peak_memory_in_bytes", None),
    )


def program_cost(text: str, loops: bool = True) -> Cost:
    """Reads the cost from the text of a compiled program; memory and seconds are then None.

    Args:
      text: Text of the compiled program.
      loops: Whether the contents of a loop count as often as they run, or once.

    Raises:
      ValueError: if `text` is not the text of a compiled program.
    """
    program = Program(text, loops)
    found = collections.defaultdict(float, program.total(program.entry))
    return Cost(
        flops=found["flops"],
        counts={kind: int(found["count", kind]) for kind in COLLECTIVES if found["count", kind]},
        sent={kind: found["sent", kind] for kind in COLLECTIVES if found["count", kind]},
        cycles=found["cycles"],
        seconds=None,
        unknown_loops=int(found["unknown"]),
        kernels={key[1]: int(times) for key, times in found.items() if key[0] == "kernel"},
        product_cycles=found["product cycles"],
    )


def collectives(compiled: Any) -> list[Collective]:
    """Lists the collectives of a `jax.stages.Compiled`; a combined one counts once."""
    program = Program(compiled.as_text())
    return [
        Collective(kind, int(program.bytes_sent(inside, i)), times)
        for inside, i, times in program.walk(program.entry, 1)
        if (kind := collective_kind(i))
    ]


def instruction_counts(compiled: Any) -> collections.Counter[str]:
    """Counts the instructions of a `jax.stages.Compiled` by opcode; those in a loop count once."""
    computations = Program(compiled.as_text()).computations.values()
    return collections.Counter(i.opcode for found in computations for i in found.values())


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: `name = shape opcode(arguments), attributes`."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands; in some programs each name follows its shape."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def called(self, *keys: str) -> list[str]:
        """Names of the computations under some attributes."""
        found = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return [name for names in found for name in re.findall(r"[\w.\-]+", names)]

    @property
    def branches(self) -> list[str]:
        """Names of the computations of which a conditional runs one."""
        return self.called("branch_computations", "true_computation", "false_computation")

    @property
    def inner(self) -> list[str]:
        """Names of the computations that this instruction runs once."""
        return self.called("calls", "to_apply") if self.opcode in _CALLS else []


class Program:
    """The computations of a program; the figures of each are computed once."""

    def __init__(self, text: str, loops: bool = True) -> None:
        self.loops = loops
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = "", None
        # The settings of a kernel inside of a fusion have line breaks.
        text = re.sub(r'\n(?="|\}, )', "", re.sub(r"/\*.*?\*/", "", text))
        for line in text.splitlines():
            if current is not None and (match := _INSTRUCTION.match(line)):
                name, shape, opcode, rest = match.groups()
                current[name] = Instruction(name, shape, opcode, *_split_attributes(rest))
            elif match := _COMPUTATION.match(line):
                current = self.computations.setdefault(match[2], {})
                self.entry = match[2] if match[1] else self.entry
            elif line.startswith("}"):
                current = None
        if not self.entry:
            raise ValueError(
                "program_cost: text has no ENTRY computation; pass the text of a compiled program, "
                "compiled.as_text()."
            )
        self.total = functools.cache(self._total)

    def walk(self, computation: str, times: int | None) -> Iterator[tuple[Any, Any, int | None]]:
        """Walks through one computation that runs `times` times, and all that it runs.

        Yields:
          The instructions around an instruction, the instruction, and how often it is executed;
          None inside a loop without a known trip count.
        """
        instructions = self.computations[computation]
        for i in instructions.values():
            yield instructions, i, times
            for name in (*i.branches, *i.inner):
                yield from self.walk(name, times)
            if i.opcode == "while":
                trips = self._trip_count(i)
                product = None if times is None or trips is None else times * trips
                yield from self.walk(i.called("body")[0], product)

    def _total(self, computation: str) -> Figures:
        """Adds up one run of a computation."""
        instructions = self.computations[computation]
        return _sum(self._figures(instructions, i) for i in instructions.values())

    def _figures(self, instructions: dict[str, Instruction], i: Instruction) -> Figures:
        """Returns the figures of one instruction and of all computations that it calls."""
        if kind := collective_kind(i):
            return {("count", kind): 1, ("sent", kind): self.bytes_sent(instructions, i)}
        if flops := self.product_flops(instructions, i):
            return {"flops": flops}
        if i.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in i.attributes:
            return _kernel_figures(instructions, i)
        if i.opcode == "while":
            trips, body = self._trip_count(i), self.total(*i.called("body"))
            repeated = {key: value * (trips or 1) for key, value in body.items()}
            return _sum([repeated, {"unknown": float(trips is None)}])
        if i.opcode == "conditional":  # the most expensive branch, figure by figure
            branches = [self.total(name) for name in i.branches]
            return {k: max(b.get(k, 0.0) for b in branches) for branch in branches for k in branch}
        inner = _sum(self.total(name) for name in i.inner)
        estimate = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
        if estimate is None or int(estimate[1]) >= _NO_ESTIMATE:
            return inner
        cycles = float(estimate[1])  # of a fusion with all its contents
        return inner | {"cycles": cycles, "product cycles": cycles * bool(inner.get("flops"))}

    def _trip_count(self, i: Instruction) -> int | None:
        """Reads how often a loop runs; None unless a counter stays below a constant."""
        if not self.loops:
            return 1
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', i.attributes):
            return int(known[1])
        condition = self.computations[i.called("condition")[0]]
        limits = [j.arguments for j in condition.values() if j.opcode == "constant"]
        below = [j for j in condition.values() if "direction=LT" in j.attributes]
        if not (below and len(limits) == 1 and limits[0].isdigit()):
            return None
        return math.ceil(int(limits[0]) / self._stride(i, condition.get(below[0].operands[0])))

    def _stride(self, i: Instruction, counter: Instruction | None) -> int:
        """Reads what a loop adds to its counter: 2 if XLA has unrolled it once."""
        body = self.computations[i.called("body")[0]]
        place = re.match(r"\W*index=(\d+)", counter.attributes) if counter else None
        root = list(body.values())[-1]
        if place is None or root.opcode != "tuple":
            return 1
        added = body[root.operands[int(place[1])]]
        terms = [body[name] for name in added.operands] if added.opcode == "add" else []
        steps = [int(term.arguments) for term in terms if term.opcode == "constant"]
        return steps[0] if steps else 1

    def product_flops(self, instructions: dict[str, Instruction], i: Instruction) -> float:
        """Counts the FLOPs of a matrix product; 0 for all other instructions."""
        is_library = i.opcode == "custom-call" and _GEMM.search(i.attributes)
        if i.opcode not in ("dot", "convolution") and not is_library:
            return 0.0
        left, right = (_dimensions(instructions[x].shape) for x in i.operands[:2])
        flops = _convolution_flops if i.opcode == "convolution" else _dot_flops
        return flops(left, right, _dimensions(i.shape), i.attributes)

    def bytes_sent(self, instructions: dict[str, Instruction], i: Instruction) -> float:
        """Counts the larger of the operands and the results of a collective."""
        operands = [n for name in i.operands for n in _array_bytes(instructions[name].shape)]
        results = _array_bytes(i.shape)
        # An asynchronous one also returns its operands, before the results. The all-reduce of a TPU
        # does not.
        if i.opcode.endswith("-start") and len(results) >= 2 * len(operands):
            results = results[len(operands) : 2 * len(operands)]
        return max(sum(operands), sum(results))


def _kernel_figures(instructions: dict[str, Instruction], i: Instruction) -> Figures:
    """Reads the figures of a Pallas kernel, as its `cost_estimate` has them."""
    estimate = re.search(r'"cost_estimate":\s*\{([^}]*)\}', i.attributes)
    if estimate is None:
        return {}
    figures = {k: float(v) for k, v in re.findall(r'"(\w+)":"?(\d+)', estimate[1])}
    name = re.search(r'/(\w+)/pallas_call"', i.attributes)
    arrays = (_ARRAY.search(instructions[x].shape) for x in i.operands)
    shapes = (array[0] for array in arrays if array and "," in array[0])  # no vectors of settings
    called = " ".join([name[1] if name else i.name, *shapes])
    seconds = max(figures["flops"] / _PEAK, figures["bytes_accessed"] / _BANDWIDTH)
    return {"flops": figures["flops"], ("kernel", called): 1, "kernel seconds": seconds}


def collective_kind(i: Instruction) -> str | None:
    """Returns the opcode of a collective; None for others, and within single devices."""
    kind = i.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES and not _alone(i) else None


def _alone(i: Instruction) -> bool:
    """Whether each group of a collective is a single device, so that nothing is sent."""
    return re.search(r"replica_groups=(\{\{\d+\}|\[\d+,1\])", i.attributes) is not None


def _sum(parts: Iterable[Figures]) -> Figures:
    """Adds up figures of the same name."""
    total: dict[Any, float] = collections.defaultdict(float)
    for part in parts:
        for key, value in part.items():
            total[key] += value
    return dict(total)


def _split_attributes(rest: str) -> tuple[str, str]:
    """Splits `arguments), attributes`."""
    depth = 1
    for end, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[:end], rest[end + 1 :]
    return rest, ""


def _dimensions(shape: str) -> list[int]:
    return [int(size) for size in _ARRAY.findall(shape)[0][1].split(",") if size]


def _array_bytes(shape: str) -> list[float]:
    """Lists the bytes of each array of a shape, which may be a tuple."""
    found = []
    for dtype, sizes in _ARRAY.findall(shape):
        width = re.search(r"\d+", dtype)  # the first number, also of f8e4m3fn
        bits = int(width[0]) if width else 8  # pred
        found.append(math.prod(int(size) for size in sizes.split(",") if size) * bits / 8)
    return found


def _dot_flops(left: list[int], _: list[int], out: list[int], attributes: str) -> float:
    # Of a dot lhs_contracting_dims={1}, of cuBLAS "lhs_contracting_dimensions":["1"].
    axes = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', attributes)
    contracted = (left[int(axis)] for axis in re.findall(r"\d+", axes[1])) if axes else ()
    return 2.0 * math.prod(out) * math.prod(contracted)


def _convolution_flops(left: list[int], right: list[int], out: list[int], attributes: str) -> float:
    """Counts only products with entries that exist: TPUs write a batch as a dilated window."""
    (of_left, of_right, of_out), *_ = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
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
        dilation = setting("lhs_dilate", "1")
        last = (left[of_left.index(label)] - 1) * dilation
        flops *= np.count_nonzero((at >= 0) & (at <= last) & (at % dilation == 0))
    return float(flops)

"""Reads the cost of a compiled program on each device. Nothing is executed.

    print(compiled_cost(jax.jit(step).lower(*arguments).compile()))

XLA returns the optimized program as text, which `benchmarks.hlo` reads. This module counts matrix
products and collectives, and multiplies the contents of a loop by its trip count. It reads programs
compiled for CPU, TPU and GPU. On GPU it counts products of Triton and of cuBLAS, not of cuDNN's
attention.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from benchmarks.hlo import (
    ARRAY,
    COLLECTIVES,
    Instruction,
    Program,
    array_bytes,
    collective_kind,
    dimensions,
)

# Sums under "flops", "cycles", "product cycles", "unknown", ("count", kind), ("sent", kind),
# ("kernel", name) and "kernel seconds".
Figures: TypeAlias = dict[Any, float]

# The TPU compiler writes 2^63 - 1 cycles where it has no estimate: kernels on a SparseCore.
_NO_ESTIMATE = 2**62
# In the layout of an array that XLA places in the fast memory of a TPU.
FAST_MEMORY = "S(1)"
# The compiler's roofline of a Pallas kernel on v5p, read from programs: FLOPs and bytes a second.
_PEAK, _BANDWIDTH = 394e12, 2.35e12
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
      kernels: How often each Pallas kernel runs, by its name and the shapes of its arrays; then
        `S(1)` if one of them, or a result, is in fast memory.
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
    seconds -= _figures_of(text, loops=False).get("kernel seconds", 0.0)
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
    found = collections.defaultdict(float, _figures_of(text, loops))
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
        Collective(kind, int(bytes_sent(inside, i)), times)
        for inside, i, times in program.walk(program.entry, 1)
        if (kind := collective_kind(i))
    ]


def instruction_counts(compiled: Any) -> collections.Counter[str]:
    """Counts the instructions of a `jax.stages.Compiled` by opcode; those in a loop count once."""
    computations = Program(compiled.as_text()).computations.values()
    return collections.Counter(i.opcode for found in computations for i in found.values())


def _figures_of(text: str, loops: bool) -> Figures:
    """Adds up one run of a program."""
    program = Program(text, loops)
    return _Sums(program).total(program.entry)


class _Sums:
    """The figures of each computation of a program, which are computed once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.total = functools.cache(self._total)

    def _total(self, computation: str) -> Figures:
        """Adds up one run of a computation."""
        instructions = self.program.computations[computation]
        return _sum(self._figures(instructions, i) for i in instructions.values())

    def _figures(self, instructions: dict[str, Instruction], i: Instruction) -> Figures:
        """Returns the figures of one instruction and of all computations that it calls."""
        if kind := collective_kind(i):
            return {("count", kind): 1, ("sent", kind): bytes_sent(instructions, i)}
        if flops := product_flops(instructions, i):
            return {"flops": flops}
        if i.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in i.attributes:
            return _kernel_figures(instructions, i)
        if i.opcode == "while":
            trips, body = self.program.trip_count(i), self.total(*i.called("body"))
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


def product_flops(instructions: dict[str, Instruction], i: Instruction) -> float:
    """Counts the FLOPs of a matrix product; 0 for all other instructions."""
    is_library = i.opcode == "custom-call" and _GEMM.search(i.attributes)
    if i.opcode not in ("dot", "convolution") and not is_library:
        return 0.0
    left, right = (dimensions(instructions[x].shape) for x in i.operands[:2])
    flops = _convolution_flops if i.opcode == "convolution" else _dot_flops
    return flops(left, right, dimensions(i.shape), i.attributes)


def bytes_sent(instructions: dict[str, Instruction], i: Instruction) -> float:
    """Counts the larger of the operands and the results of a collective."""
    operands = [n for name in i.operands for n in array_bytes(instructions[name].shape)]
    results = array_bytes(i.shape)
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
    operands = [instructions[x].shape for x in i.operands]
    arrays = [(ARRAY.search(shape), shape) for shape in operands]
    # No vectors of settings.
    found = [(array[0], shape) for array, shape in arrays if array and "," in array[0]]
    in_fast_memory = any(FAST_MEMORY in shape for shape in (i.shape, *(s for _, s in found)))
    words = [name[1] if name else i.name, *(array for array, _ in found)]
    called = " ".join([*words, FAST_MEMORY] if in_fast_memory else words)
    seconds = max(figures["flops"] / _PEAK, figures["bytes_accessed"] / _BANDWIDTH)
    return {"flops": figures["flops"], ("kernel", called): 1, "kernel seconds": seconds}


def _sum(parts: Iterable[Figures]) -> Figures:
    """Adds up figures of the same name."""
    total: dict[Any, float] = collections.defaultdict(float)
    for part in parts:
        for key, value in part.items():
            total[key] += value
    return dict(total)


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

"""The text of a compiled program, which XLA writes as computations of instructions."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

COLLECTIVES = (
    *("all-gather", "all-reduce", "all-to-all", "collective-broadcast"),
    *("collective-permute", "ragged-all-to-all", "reduce-scatter"),
)

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
# %name = shape opcode(%operand, ...), attributes
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
# dtype[size, ...]
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
# Opcodes that run another computation once. TPU7x runs collectives on its SparseCores: call-start.
_CALLS = ("fusion", "call", "async-start", "call-start")


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
    """The computations of a program, and how often each instruction runs."""

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
                trips = self.trip_count(i)
                product = None if times is None or trips is None else times * trips
                yield from self.walk(i.called("body")[0], product)

    def trip_count(self, i: Instruction) -> int | None:
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


def collective_kind(i: Instruction) -> str | None:
    """Returns the opcode of a collective; None for others, and within single devices."""
    kind = i.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES and not _alone(i) else None


def _alone(i: Instruction) -> bool:
    """Whether each group of a collective is a single device, so that nothing is sent."""
    return re.search(r"replica_groups=(\{\{\d+\}|\[\d+,1\])", i.attributes) is not None


def _split_attributes(rest: str) -> tuple[str, str]:
    """Splits `arguments), attributes`."""
    depth = 1
    for end, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[:end], rest[end + 1 :]
    return rest, ""


def dimensions(shape: str) -> list[int]:
    """Lists the sizes of the axes of the first array of a shape."""
    return [int(size) for size in ARRAY.findall(shape)[0][1].split(",") if size]


def array_bytes(shape: str) -> list[float]:
    """Lists the bytes of each array of a shape, which may be a tuple."""
    found = []
    for dtype, sizes in ARRAY.findall(shape):
        width = re.search(r"\d+", dtype)  # the first number, also of f8e4m3fn
        bits = int(width[0]) if width else 8  # pred
        found.append(math.prod(int(size) for size in sizes.split(",") if size) * bits / 8)
    return found

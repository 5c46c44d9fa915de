"""Inputs and outputs among the axes of a kernel: common parts of the rules for kernels."""

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from optax.contrib import MuonDimensionNumbers

from muonclip_jax._muon import role_names as names
from muonclip_jax._muon.evidence import Evidence, Leaf, Path, Shape, Stack

# The modules of a head layout by name: the axes of a kernel, each a tuple of names, and the axis at
# which layers are stacked.
HeadPatterns: TypeAlias = Mapping[str, tuple[tuple[tuple[str, ...], ...], int]]


class Decision(NamedTuple):
    """The optimizer of a parameter, with the reason.

    Attributes:
      numbers: The axes of its matrices; None assigns it to AdamW.
      reason: Why.
      doubt: Why this may be wrong; empty if it rests on more than a guess.
    """

    numbers: MuonDimensionNumbers | None
    reason: str
    doubt: str = ""


class Settings(NamedTuple):
    """Settings of the user.

    Attributes:
      outputs_first: Whether matrices are stored (outputs, inputs); None decides by evidence.
      scale_by_sides: Whether the scale of an update depends on which side is which.
      heads: For each head layout, the modules that project into heads.
    """

    outputs_first: bool | None = None
    scale_by_sides: bool = True
    heads: tuple[HeadPatterns, ...] = ()


DEFAULTS = Settings()


def sizes(shape: Shape, numbers: MuonDimensionNumbers) -> tuple[int, int, list[tuple[int, int]]]:
    """Returns n_in, n_out, and each batch axis with its size."""
    sides = [(side,) if isinstance(side, int) else tuple(side) for side in numbers]
    reduction, output = ([axis % len(shape) for axis in side] for side in sides)
    batch = [(axis, n) for axis, n in enumerate(shape) if axis not in (*reduction, *output)]
    n_in, n_out = (math.prod(shape[axis] for axis in side) for side in (reduction, output))
    return n_in, n_out, batch


def numbers_of(leaf: Leaf, stack: Stack, inputs: Shape, outputs: Shape) -> MuonDimensionNumbers:
    """Writes axes of one layer as negative axes of the parameter."""
    ndim = len(leaf.shape)
    kept = [axis - ndim for axis in range(ndim) if axis not in stack.axes]
    sides = [tuple(kept[axis] for axis in side) for side in (inputs, outputs)]
    return MuonDimensionNumbers(*(side[0] if len(side) == 1 else side for side in sides))


def layer_of(leaf: Leaf, evidence: Evidence) -> tuple[Stack, Shape]:
    stack = evidence.stack_of(leaf)
    return stack, stack.without(leaf.shape)


# Names


def module_and_name(leaf: Leaf) -> tuple[Path, str]:
    """Splits a path into the attention module and the name of the projection."""
    is_inside = len(leaf.core) > 1 and names.matches(names.MATRIX_NAMES, leaf.core[-1])
    depth = len(leaf.core) - (2 if is_inside else 1)
    name = leaf.core[depth]
    return leaf.core[:depth], name if is_inside else names.stem(name)


def heads_name(leaf: Leaf, evidence: Evidence) -> str | None:
    """Returns `in` or `out` if a parameter has the name of a projection into or out of heads."""
    module, name = module_and_name(leaf)
    if names.matches(names.INTO_HEADS, name):
        return "in"
    if names.matches(names.OUT_OF_HEADS, name):
        return "out"
    if names.matches(names.PERHAPS_OUT, name) and partners(module, "in", evidence):
        return "out"
    return None


def partners(module: Path, side: str, evidence: Evidence) -> dict[str, Leaf]:
    """Lists the kernels of the projections of an attention module, by name."""
    pattern = names.INTO_HEADS
    if side == "out":
        pattern = f"{names.OUT_OF_HEADS}|{names.PERHAPS_OUT}"
    found = {}
    for child in evidence.children.get(module, ()):
        if not names.matches(pattern, names.stem(child)):
            continue
        paths = [(*module, child), *((*module, child, k) for k in ("kernel", "w", "weight"))]
        for path in paths:
            if leaf := evidence.by_core.get(path):
                found[child] = leaf
    return found


def fused_axis(name: str, shape: Shape) -> int | None:
    """Finds the axis that numbers queries, keys and values in one kernel."""
    count = next((n for fused, n in names.FUSED.items() if fused in name.lower()), None)
    if count is None or len(shape) < 3 or names.matches(r"w?kv_b(_proj)?", name):
        return None
    return next((axis for axis, n in enumerate(shape[:-1]) if n == count), None)


def is_expert(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a parameter named `wo` or the like stacks the matrices of experts."""
    if any(names.matches(names.EXPERTS, name) for name in leaf.core):
        return True
    module, _ = module_and_name(leaf)
    if partners(module, "in", evidence) or any("att" in name.lower() for name in leaf.core):
        return False
    if any(names.matches(names.FEED_FORWARD, name) for name in leaf.core):
        return True
    _, shape = layer_of(leaf, evidence)
    if len(shape) < 3:
        return False
    return bool(evidence.experts(module).get((shape[:-3], shape[-3]), [])[1:])


def is_window(window: Shape, channels: Shape, square: bool = False) -> bool:
    small = max(window) <= 16 and max(window) < max(channels)
    if square:
        return small and len({*window}) == 1 and 1 < window[0] <= min(11, *channels)
    return small


def is_convolution(leaf: Leaf) -> bool:
    """Returns whether a parameter, its module or the list around it is named a convolution."""
    depth = 3 if len(leaf.core) > 2 and leaf.core[-2].isdigit() else 2
    return any(names.matches(names.CONVOLUTION, name) for name in leaf.core[-depth:])


def is_convolution_shape(shape: Shape) -> bool:
    """Returns whether four axes begin or end with a square window, beside more channels."""
    if len(shape) != 4:
        return False
    return is_window(shape[:2], shape[2:], square=True) or is_window(
        shape[2:], shape[:2], square=True
    )

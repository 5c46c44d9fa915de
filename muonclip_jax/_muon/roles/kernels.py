"""Inputs and outputs among the axes of a kernel: common parts of the rules for matrices."""

import math
import re

from optax.contrib import MuonDimensionNumbers

from muonclip_jax._muon.roles import names
from muonclip_jax._muon.roles.evidence import Evidence
from muonclip_jax._muon.roles.modules import Leaf, Path, Shape, Stack


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


def heads_name(leaf: Leaf, evidence: Evidence) -> str | None:
    """Returns `in` or `out` if a parameter has the name of a projection into or out of heads."""
    if names.matches(names.INTO_HEADS, leaf.name) or _is_glued(leaf, evidence):
        return None if evidence.is_lone_letter(leaf) else "in"
    if names.matches(names.OUT_OF_HEADS, leaf.name):
        return "out"
    if names.matches(names.PERHAPS_OUT, leaf.name) and partners(leaf.module, "in", evidence):
        return "out"
    return None


_GLUED = re.compile(r"(\w+?)[qkv](_proj(?:ection)?)")


def _is_glued(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a name is `q_projection` behind a prefix, with keys and values beside it.

    Source: AlphaFold 3 glues the name of its transformer to the names of the projections.
    """
    match = _GLUED.fullmatch(leaf.name)
    children = evidence.children.get(leaf.module, set())
    return match is not None and all(f"{match[1]}{one}{match[2]}" in children for one in "qkv")


def inputs_near(module: Path, evidence: Evidence) -> list[Leaf]:
    """Lists the projections into heads in a module, and in the modules directly in it."""
    found = [*partners(module, "in", evidence).values()]
    for child in evidence.children.get(module, ()):
        found += partners((*module, child), "in", evidence).values()
    return found


def partners(module: Path, side: str, evidence: Evidence) -> dict[str, Leaf]:
    """Lists the kernels of the projections of an attention module, by name."""
    pattern = names.INTO_HEADS
    if side == "out":
        pattern = f"{names.OUT_OF_HEADS}|{names.PERHAPS_OUT}"
    found = {}
    for child in evidence.children.get(module, ()):
        if not names.matches(pattern, names.stem(child)):
            continue
        paths = [
            (*module, child),
            *((*module, child, k) for k in ("kernel", "w", "weight", "weights")),
        ]
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


def has_transposed(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a matrix beside a parameter has its last two axes in the other order."""
    *lead, n_in, n_out = leaf.shape
    others = (x for x in evidence.beside(leaf) if x.role is None or len(x.name) == 1)
    return n_in != n_out and any(x.shape == (*lead, n_out, n_in) for x in others)


def is_expert(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a parameter named `wo` or the like stacks the matrices of experts."""
    if leaf.has(names.EXPERTS):
        return True
    if _is_glued(leaf, evidence):
        return False
    if partners(leaf.module, "in", evidence) or any("att" in n.lower() for n in leaf.core):
        return False
    if leaf.has(names.FEED_FORWARD):
        return True
    _, shape = evidence.layer_of(leaf)
    if len(shape) < 3:
        return False
    return bool(evidence.experts(leaf.module).get((shape[:-3], shape[-3]), [])[1:])

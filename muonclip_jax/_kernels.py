"""Which axes of a kernel are its inputs and outputs: what the rules for kernels have in common."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from optax.contrib import MuonDimensionNumbers

from muonclip_jax import _role_names as names
from muonclip_jax._evidence import Evidence, Leaf, Path, Shape, Stack


class Decision(NamedTuple):
    """What happens to a parameter.

    Attributes:
      numbers: The axes of its matrices; None assigns it to AdamW.
      reason: Why.
      doubt: Why this may be wrong; empty if it rests on more than a guess.
    """

    numbers: MuonDimensionNumbers | None
    reason: str
    doubt: str = ""


class Settings(NamedTuple):
    """What the user set.

    Attributes:
      outputs_first: Whether matrices are stored (outputs, inputs); None decides by evidence.
      scale_by_sides: Whether the scale of an update depends on which side is which.
      heads: Names of modules that project into heads, with the axes of their kernels if known.
    """

    outputs_first: bool | None = None
    scale_by_sides: bool = True
    heads: Mapping[str, tuple[str, ...]] = {}


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
    if len(leaf.core) > 1 and names.matches(names.MATRIX_NAMES, leaf.core[-1]):
        return leaf.core[:-2], leaf.core[-2]
    return leaf.core[:-1], leaf.core[-1]


def heads_name(leaf: Leaf, evidence: Evidence, settings: Settings = DEFAULTS) -> str | None:
    """Returns `in` or `out` if a parameter has the name of a projection into or out of heads."""
    module, name = module_and_name(leaf)
    if name in settings.heads or names.matches(names.INTO_HEADS, name):
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
        if not names.matches(pattern, child):
            continue
        paths = [(*module, child), *((*module, child, k) for k in ("kernel", "w", "weight"))]
        for path in paths:
            if leaf := evidence.by_core.get(path):
                found[child] = leaf
    return found


def is_expert(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a parameter named `wo` or the like stacks the matrices of experts."""
    if any(names.matches(names.EXPERTS, name) for name in leaf.core):
        return True
    module, _ = module_and_name(leaf)
    if partners(module, "in", evidence):
        return False
    _, shape = layer_of(leaf, evidence)
    if len(shape) < 3:
        return False
    return bool(evidence.experts(module).get((shape[:-3], shape[-3]), [])[1:])


# Biases


class _Fit(NamedTuple):
    """Axes of a kernel that a bias determines, as axes of one layer."""

    inputs: Shape
    outputs: Shape
    outputs_first: bool


def _fits(shape: Shape, bias: Shape, outputs_first: bool) -> list[_Fit]:
    """Lists the ways in which a bias is batch axes, then the outputs of a kernel."""
    found = []
    for batch in range(min(len(bias), len(shape) - 1)):
        outputs = bias[batch:]
        rest = len(shape) - batch - len(outputs)
        if bias[:batch] != shape[:batch] or rest < 1:
            continue
        start = batch if outputs_first else batch + rest
        if shape[start : start + len(outputs)] == outputs:
            own = tuple(range(start, start + len(outputs)))
            others = tuple(axis for axis in range(batch, len(shape)) if axis not in own)
            found.append(_Fit(others, own, outputs_first))
    return found


def bias_fit(leaf: Leaf, evidence: Evidence) -> tuple[_Fit | None, bool]:
    """Finds the axes that the bias beside a kernel shows, and whether both conventions fit."""
    bias = evidence.bias_of(leaf)
    if bias is None:
        return None, False
    stack, shape = layer_of(leaf, evidence)
    size = stack.without(bias.shape)
    convolution = len(size) > 1 and size[-1] == 1
    while len(size) > 1 and size[-1] == 1:
        size = size[:-1]
    first = [] if convolution else _fits(shape, size, outputs_first=False)
    last = _fits(shape, size, outputs_first=True)
    if not first:
        return (last[0], False) if last else (None, False)
    fit = first[0] if heads_name(leaf, evidence) else first[-1]
    both = any({*f.inputs, *f.outputs} == {*fit.inputs, *fit.outputs} for f in last)
    return fit, both


def has_fitting_bias(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a kernel has a bias that fits, as dense layers and convolutions have."""
    if len(leaf.shape) < 2 or not names.matches(names.MATRIX_NAMES, leaf.core[-1]):
        return False
    return len(layer_of(leaf, evidence)[1]) > 1 and bias_fit(leaf, evidence)[0] is not None


def is_matrix_of_adaptive_norm(leaf: Leaf, evidence: Evidence, norm: str) -> bool:
    """Returns whether a parameter below a norm is a matrix that computes gains from an input."""
    inside = leaf.core[leaf.core.index(norm) + 1 :]
    if not inside or not names.matches(names.MATRIX_NAMES, leaf.core[-1]):
        return False
    if has_fitting_bias(leaf, evidence) and leaf.shape != evidence.bias_of(leaf).shape:
        return True
    stack, shape = layer_of(leaf, evidence)
    return stack.known and len(inside) > 1 and len(shape) > 1


def by_bias(leaf: Leaf, evidence: Evidence, settings: Settings) -> Decision | None:
    stack, shape = layer_of(leaf, evidence)
    if len(shape) < 3:
        return None
    fit, both = bias_fit(leaf, evidence)
    if fit is None:
        return None
    is_stacked_heads = heads_name(leaf, evidence) is not None and len(fit.inputs) == 1
    if is_stacked_heads and fit.inputs[0] > 0 and len(fit.outputs) == 1 and stack.known:
        return None
    if len(fit.inputs) == len(fit.outputs) == 1:
        return None  # a stack of matrices: `last_two_axes` decides which side is which
    reason = "inputs x outputs, as its bias shows"
    if fit.outputs_first or (both and settings.outputs_first):
        reason += ", outputs first"
    return Decision(numbers_of(leaf, stack, fit.inputs, fit.outputs), reason)


# Two axes


def last_two_axes(leaf: Leaf, evidence: Evidence, settings: Settings) -> Decision:
    stack, shape = layer_of(leaf, evidence)
    last = len(shape) - 1
    outputs_first, reason, doubt = _orientation(leaf, evidence, settings)
    sides = ((last,), (last - 1,)) if outputs_first else ((last - 1,), (last,))
    return Decision(numbers_of(leaf, stack, *sides), reason, doubt)


def _orientation(leaf: Leaf, evidence: Evidence, settings: Settings) -> tuple[bool, str, str]:
    """Decides whether a matrix is stored (outputs, inputs), with the reason and a doubt."""
    by_bias, by_name = _orientation_by_bias(leaf, evidence), _orientation_by_name(leaf, evidence)
    if settings.outputs_first is not None:
        doubt = ""
        if by_bias not in (None, settings.outputs_first):
            doubt = f"outputs_first={settings.outputs_first}, but its bias fits the other axis"
        return settings.outputs_first, _reason(settings.outputs_first, "as set"), doubt
    if by_bias is not None:
        return by_bias, _reason(by_bias, "as its bias shows"), ""
    if by_name is not None:
        return by_name, _reason(by_name, "as its name and the widths show"), ""
    convention = evidence.convention.get(leaf.core[-1])
    if convention is not None:
        return convention, _reason(convention, "as others in this pytree"), ""
    shape = layer_of(leaf, evidence)[1]
    doubt = ""
    if leaf.core[-1] == "weight" and settings.scale_by_sides and shape[-1] != shape[-2]:
        doubt = "nothing shows whether it is stored (inputs, outputs); see outputs_first"
    return False, "last two axes", doubt


def _reason(outputs_first: bool, why: str) -> str:
    return f"last two axes, outputs first {why}" if outputs_first else "last two axes"


def _orientation_by_bias(leaf: Leaf, evidence: Evidence) -> bool | None:
    fit, both = bias_fit(leaf, evidence)
    if fit is None or both or len(fit.inputs) != 1 or len(fit.outputs) != 1:
        return None
    return fit.outputs_first


def _orientation_by_name(leaf: Leaf, evidence: Evidence) -> bool | None:
    """Compares the sides of projections from and to the residual stream with its width."""
    _, name = module_and_name(leaf)
    shape = layer_of(leaf, evidence)[1][-2:]
    widths = evidence.widths(leaf)
    inside = [n in widths for n in shape]
    if sum(inside) != 1:
        return None
    if names.matches(names.FROM_RESIDUAL, name) or names.matches(names.INTO_HEADS, name):
        return inside[1]
    if names.matches(names.TO_RESIDUAL, name) or names.matches(names.OUT_OF_HEADS, name):
        return inside[0]
    return None


def find_convention(evidence: Evidence) -> dict[str, bool]:
    """Finds, by the name of the parameter, whether all matrices that show it are outputs first."""
    found: dict[str, tuple[set[bool], set[bool]]] = {}
    for leaf in evidence.leaves:
        if leaf.role is None and len(layer_of(leaf, evidence)[1]) == 2:
            by_bias, by_name = found.setdefault(leaf.core[-1], (set(), set()))
            by_bias.add(_orientation_by_bias(leaf, evidence))
            by_name.add(_orientation_by_name(leaf, evidence))
    convention = {}
    for name, votes in found.items():
        for vote in votes:
            if len(shown := vote - {None}) == 1:
                convention[name] = shown.pop()
                break
            if shown:
                break
    return convention

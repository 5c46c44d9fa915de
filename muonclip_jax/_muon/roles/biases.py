"""The axes of a kernel that the bias beside it shows."""

from typing import NamedTuple

from muonclip_jax._muon.roles import gates, names
from muonclip_jax._muon.roles.decision import Decision, RoleSettings
from muonclip_jax._muon.roles.evidence import Evidence
from muonclip_jax._muon.roles.kernels import fused_axis, heads_name, numbers_of
from muonclip_jax._muon.roles.modules import Leaf, Shape

# The longest window of a transposed convolution: 16 in HiFi-GAN.
_LONGEST_WINDOW = 32


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
    stack, shape = evidence.layer_of(leaf)
    size = stack.without(bias.shape)
    convolution = len(size) > 1 and size[-1] == 1
    while len(size) > 1 and size[-1] == 1:
        size = size[:-1]
    first = [] if convolution else _fits(shape, size, outputs_first=False)
    last = _fits(shape, size, outputs_first=True)
    if not first:
        return (last[-1], False) if last else (None, False)
    fit = first[0] if heads_name(leaf, evidence) else first[-1]
    both = any({*f.inputs, *f.outputs} == {*fit.inputs, *fit.outputs} for f in last)
    return fit, both


def has_fitting_bias(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a kernel has a bias that fits, as dense layers and convolutions have."""
    if len(leaf.shape) < 2 or not names.matches(names.MATRIX_NAMES, leaf.core[-1]):
        return False
    return len(evidence.layer_of(leaf)[1]) > 1 and bias_fit(leaf, evidence)[0] is not None


def is_matrix_of_adaptive_norm(leaf: Leaf, evidence: Evidence, norm: str) -> bool:
    """Returns whether a parameter below a norm is a matrix that computes gains from an input."""
    inside = leaf.core[leaf.core.index(norm) + 1 :]
    if not inside or not names.matches(names.MATRIX_NAMES, leaf.core[-1]):
        return False
    bias = evidence.bias_of(leaf)
    if bias and has_fitting_bias(leaf, evidence) and leaf.shape != bias.shape:
        return True
    stack, shape = evidence.layer_of(leaf)
    return stack.known and len(inside) > 1 and len(shape) > 1


def by_bias(leaf: Leaf, evidence: Evidence, settings: RoleSettings) -> Decision | None:
    """A kernel of three axes or more beside a bias, whose axes are the outputs."""
    stack, shape = evidence.layer_of(leaf)
    if len(shape) < 3:
        return None
    fit, both = bias_fit(leaf, evidence)
    if fit is None:
        return _transposed_convolution(leaf, evidence)
    is_stacked_heads = heads_name(leaf, evidence) is not None and len(fit.inputs) == 1
    if is_stacked_heads and fit.inputs[0] > 0 and len(fit.outputs) == 1 and stack.known:
        return None
    if len(fit.inputs) == len(fit.outputs) == 1:
        return None  # a stack of matrices: `last_two_axes` decides which side is which
    fused = fused_axis(leaf.name, shape)
    doubt = ""
    if fused is None and len(fit.inputs) == 1 < len(fit.outputs):
        sizes = tuple(shape[axis] for axis in (*fit.inputs, *fit.outputs))
        is_each, doubt = gates.few_outputs(leaf, evidence, sizes)
        fused = fit.outputs[0] if is_each else None
    reason = "inputs x outputs, as its bias shows"
    if fused is not None and fused in fit.outputs:
        fit = fit._replace(outputs=tuple(axis for axis in fit.outputs if axis != fused))
        reason += f", {shape[fused]} in one"
    if fit.outputs_first or (both and settings.outputs_first):
        reason += ", outputs first"
    return Decision(numbers_of(leaf, stack, fit.inputs, fit.outputs), reason, doubt)


def _transposed_convolution(leaf: Leaf, evidence: Evidence) -> Decision | None:
    """(inputs, outputs, *window), as PyTorch stores transposed convolutions."""
    bias, (stack, shape) = evidence.bias_of(leaf), evidence.layer_of(leaf)
    is_named = leaf.core[-1].startswith("weight")
    if bias is None or not is_named or stack.without(bias.shape) != shape[1:2]:
        return None
    if max(shape[2:]) > _LONGEST_WINDOW or max(shape[2:]) >= max(shape[:2]):
        return None
    numbers = numbers_of(leaf, stack, (0,), tuple(range(1, len(shape))))
    return Decision(numbers, "transposed convolution, as its bias shows")

"""Convolutions: the window and the inputs are one side of a matrix; depthwise ones have none."""

from optax.contrib import MuonDimensionNumbers

from muonclip_jax._muon.roles import names
from muonclip_jax._muon.roles.decision import Decision, RoleSettings
from muonclip_jax._muon.roles.evidence import Evidence
from muonclip_jax._muon.roles.kernels import numbers_of
from muonclip_jax._muon.roles.modules import Leaf, Shape, Stack

# The longest window, and how many times more channels than taps a flat depthwise kernel has.
_LONGEST, _LONGEST_SQUARE, _MOST_TAPS, _MUCH_LARGER = 16, 11, 8, 8


def convolution(leaf: Leaf, evidence: Evidence, settings: RoleSettings) -> Decision | None:
    """(*window, inputs, outputs) is one matrix, (window x inputs) x outputs."""
    stack, shape = evidence.layer_of(leaf)
    named = is_named_convolution(leaf)
    if len(shape) < 3:
        return None
    has_layers = named and len(shape) > 3 and not _is_square_window(shape[:-2], shape[-2:])
    if has_layers and not stack.known and evidence.shared_axis(leaf):
        stack, shape = Stack((0,), True), shape[1:]
    doubt = ""
    if not named:
        if leaf.has(names.EXPERTS) or not is_convolution_shape(shape):
            return None
        doubt = "no name confirms it, only its shape"
    elif leaf.has(names.SPECTRAL):
        doubt = "it may be one matrix for each frequency"
    last = len(shape) - 1
    outputs_first = settings.outputs_first
    if outputs_first is None:
        front, back = _is_window(shape[:-2], shape[-2:]), _is_window(shape[2:], shape[:2])
        outputs_first = back and not front
        if front == back and not doubt and leaf.core[-1].startswith("weight"):
            outputs_first = evidence.convention.get(leaf.core[-1], False)
            doubt = f"nothing shows where the window of {shape} is; set outputs_first"
    if outputs_first:
        numbers = numbers_of(leaf, stack, tuple(range(1, last + 1)), (0,))
        return Decision(numbers, "convolution, outputs first", doubt)
    return Decision(numbers_of(leaf, stack, tuple(range(last)), (last,)), "convolution", doubt)


def depthwise(leaf: Leaf, evidence: Evidence) -> Decision | None:
    """A convolution with one input channel per group mixes no channels."""
    _, shape = evidence.layer_of(leaf)
    if not leaf.has(names.CONVOLUTION):
        return _unnamed_depthwise(shape)
    one_input = len(shape) > 2 and 1 in (shape[-2], leaf.shape[-2])
    if len(shape) > 2 and shape[1] == 1 < shape[0]:  # outputs first: (channels, 1, *window)
        one_input |= _is_window(shape[2:], shape[:1])
    small, large = min(shape), max(shape)
    taps = len(shape) == 2 and small <= _MOST_TAPS and large >= _MUCH_LARGER * small
    if one_input or (taps and is_named_convolution(leaf)):
        full = MuonDimensionNumbers(tuple(range(-len(shape), -1)), -1)
        doubt = _doubt_one_input(leaf, evidence, shape)
        return Decision(None, "depthwise convolution", doubt, full)
    return None


def _doubt_one_input(leaf: Leaf, evidence: Evidence, shape: Shape) -> str:
    """Doubts a depthwise convolution whose channels come from no other layer.

    The first convolution of gray images has one input channel too.
    """
    if len(shape) not in (3, 4) or shape[-2] != 1 or shape[-1] == 1:
        return ""
    if len(shape) == 4 and not evidence.has_output(leaf, shape[-1]):
        return f"no other parameter has {shape[-1]} outputs, so it may be the first convolution"
    if _is_first_of_series(leaf, evidence, shape[-1]):
        return f"the next one has {shape[-1]} inputs, so it may be the first convolution"
    return ""


def _is_first_of_series(leaf: Leaf, evidence: Evidence, channels: int) -> bool:
    """Returns whether the next convolution of its series, outside of other series, is dense."""
    for depth, name in enumerate(leaf.core[:-1]):
        module, inside = leaf.core[:depth], leaf.core[depth + 1 :]
        stem = names.without_number(name)
        children = sorted(evidence.children[module], key=names.number)
        series = [child for child in children if names.without_number(child) == stem]
        if len(series) > 1 and name == series[0]:
            after = evidence.by_core.get((*module, series[1], *inside))
            shape = after.shape if after else ()
            return len(shape) == len(leaf.shape) and shape[-2:-1] == (channels,)
        if len(series) > 1 and names.is_numbered(name):
            return False
    return False


def _unnamed_depthwise(shape: Shape) -> Decision | None:
    """Finds a window beside one input channel, on either end of the shape.

    A window of two axes must be square.
    """
    if len(shape) == 3 and shape[1] == 1:
        taps, channels = sorted(shape[::2])
        if 1 < taps <= _MOST_TAPS and channels >= _MUCH_LARGER * taps:
            return Decision(None, "depthwise convolution")
    if len(shape) != 4 or 1 not in shape[1:3]:
        return None
    for window, channels in ((shape[:2], shape[2:]), (shape[2:], shape[1::-1])):
        is_square = window[0] == window[1] > 1 and max(window) <= _LONGEST_SQUARE < channels[1]
        if channels[0] == 1 and is_square:
            return Decision(None, "depthwise convolution")
    return None


def is_named_convolution(leaf: Leaf) -> bool:
    """Returns whether a parameter, its module or the list around it is named a convolution."""
    depth = 3 if len(leaf.core) > 2 and leaf.core[-2].isdigit() else 2
    return any(names.matches(names.CONVOLUTION, name) for name in leaf.core[-depth:])


def is_convolution_shape(shape: Shape) -> bool:
    """Returns whether four axes begin or end with a square window, beside more channels."""
    return len(shape) == 4 and (
        _is_square_window(shape[:2], shape[2:]) or _is_square_window(shape[2:], shape[:2])
    )


def _is_window(window: Shape, channels: Shape) -> bool:
    return max(window) <= _LONGEST and max(window) < max(channels)


def _is_square_window(window: Shape, channels: Shape) -> bool:
    is_square = len({*window}) == 1 and 1 < window[0] <= min(_LONGEST_SQUARE, *channels)
    return is_square and _is_window(window, channels)

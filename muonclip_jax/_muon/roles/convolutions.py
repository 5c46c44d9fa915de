"""Convolutions: the window and the inputs are one side of a matrix; depthwise ones have none."""

import itertools
import math

from optax.contrib import MuonDimensionNumbers

from muonclip_jax._muon.roles import names
from muonclip_jax._muon.roles.decision import Decision, RoleSettings
from muonclip_jax._muon.roles.evidence import Evidence
from muonclip_jax._muon.roles.kernels import numbers_of
from muonclip_jax._muon.roles.modules import Leaf, Path, Shape, Stack

# The longest window, and how many times more channels than taps a flat depthwise kernel has.
_LONGEST, _LONGEST_SQUARE, _MOST_TAPS, _MUCH_LARGER = 16, 11, 8, 8
# Transposed convolutions, and names that mean them if the window is even, as in U-Net.
_TRANSPOSED = r"\w*conv\w*transpos\w*|\w*trans(pos\w*)?_?conv\w*|(\w*_)?de_?conv\w*|convtr?|tconv"
_UP = r"(\w*_)?up_?conv\w*"
# `ConvLocal` of Flax, whose kernel is (*positions, window x inputs, outputs).
_LOCAL = r"\w*conv_?local\w*"


def transposed(leaf: Leaf, evidence: Evidence, settings: RoleSettings) -> Decision | None:
    """A transposed convolution, (*window, inputs, outputs) or (*window, outputs, inputs).

    Flax stores the first, and with `transpose_kernel=True` the second, as Haiku does. Equinox
    stores (outputs, inputs, *window), PyTorch (inputs, outputs, *window). The bias shows the
    outputs if both sizes differ; else the other transposed convolutions may show them.
    """
    stack, shape = evidence.layer_of(leaf)
    front, back = _has_window(shape)
    if front == back:
        return None
    last = len(shape) - 1
    if front:
        when = "If it is stored (*window, outputs, inputs)"
        other = numbers_of(leaf, stack, (*range(last - 1), last), (last - 1,))
    else:
        when = "If it is stored (inputs, outputs, *window)"
        other = numbers_of(leaf, stack, (0,), tuple(range(1, last + 1)))
    is_other = _is_other_by_bias(leaf, evidence, front=front)
    if is_other:
        is_one = is_named_convolution(leaf) or is_convolution_shape(shape)
        if front and is_one and not leaf.has(names.EXPERTS):
            return Decision(other, "transposed convolution, as its bias shows")
        return None
    if is_other is False or not _is_named_transposed(leaf, evidence, front=front):
        return None
    is_set = settings.outputs_first is not None
    if is_set if front else not settings.scale_by_sides:  # both orders have the same update
        return None
    found = convolution(leaf, evidence, settings)
    is_other = _is_other_by_series(leaf, evidence, front=front)
    if is_other is None:
        text = "no bias shows which of its channels are outputs"
        return found and found._replace(doubt=text, other=(when, other))
    reason = "transposed convolution, in the order that others like it show"
    return Decision(other, reason) if is_other else found


def _sides(leaf: Leaf, evidence: Evidence, *, front: bool) -> Shape:
    """Returns the inputs and outputs of (*window, inputs, outputs) or (outputs, inputs, *window).

    Args:
      leaf: The kernel.
      evidence: The evidence from its pytree.
      front: Whether the window is in front.
    """
    shape = evidence.layer_of(leaf)[1]
    return shape[-2:] if front else shape[1::-1]


def _is_other_by_bias(leaf: Leaf, evidence: Evidence, *, front: bool) -> bool | None:
    """Returns whether a bias shows that inputs and outputs are in the other order of storage.

    The bias is (outputs,) or (outputs, 1, 1). None if it shows no order.
    """
    bias, (stack, _) = evidence.bias_of(leaf), evidence.layer_of(leaf)
    size, *others = (stack.without(bias.shape) if bias else ()) or (0,)
    n_in, n_out = _sides(leaf, evidence, front=front)
    if n_in == n_out or size not in (n_in, n_out) or any(n != 1 for n in others):
        return None
    return size == n_in


def _is_other(leaf: Leaf, evidence: Evidence, *, front: bool) -> bool | None:
    """Returns the same as its own bias shows it, or else the other transposed convolutions."""
    by_bias = _is_other_by_bias(leaf, evidence, front=front)
    if by_bias is not None or not _is_named_transposed(leaf, evidence, front=front):
        return by_bias
    return _is_other_by_series(leaf, evidence, front=front)


def _is_other_by_series(leaf: Leaf, evidence: Evidence, *, front: bool) -> bool | None:
    """Returns the same as other transposed convolutions show it, by their biases or their sizes.

    The biases of its series are the first evidence, the sizes of its series the second, and the
    biases of other series the last.
    """
    rank = len(evidence.layer_of(leaf)[1])
    series = _series(leaf, evidence) if leaf.is_inside else [leaf]
    own = [x for x in series if len(evidence.layer_of(x)[1]) == rank]
    by_bias = _shown_by_biases(own, evidence, front=front)
    if not by_bias and (chained := _chained(own, evidence, front=front)) is not None:
        return chained
    if not by_bias:
        like = [x for x in evidence.leaves if x.core[-1] == leaf.core[-1]]
        like = [x for x in like if _has_window(evidence.layer_of(x)[1]) == (front, not front)]
        named = [x for x in like if _is_named_transposed(x, evidence, front=front)]
        by_bias = _shown_by_biases(named, evidence, front=front)
    return by_bias.pop() if len(by_bias) == 1 else None


def _shown_by_biases(kernels: list[Leaf], evidence: Evidence, *, front: bool) -> set[bool]:
    """Lists whether biases show the other order of storage, where they show an order."""
    shown = (_is_other_by_bias(x, evidence, front=front) for x in kernels)
    return {other for other in shown if other is not None}


def _chained(series: list[Leaf], evidence: Evidence, *, front: bool) -> bool | None:
    """Returns in which order of storage the outputs of each are the inputs of the next.

    A series that is numbered from its end has the same sizes in the other order. There, the
    channels seem to grow, while transposed convolutions reduce them; so growth shows no order.
    """
    usual = [_sides(x, evidence, front=front) for x in series]
    orders = {False: usual, True: [pair[::-1] for pair in usual]}
    chains = [
        other
        for other, sides in orders.items()
        if all(before[1] == after[0] for before, after in itertools.pairwise(sides))
    ]
    if len(chains) != 1:
        return None
    first, *_, last = orders[chains[0]]
    return chains[0] if last[1] < first[0] else None


def _is_named_transposed(leaf: Leaf, evidence: Evidence, *, front: bool) -> bool:
    """Returns whether a parameter, its module or the list around it is named transposed."""
    shape = evidence.layer_of(leaf)[1]
    window = shape[:-2] if front else shape[2:]
    pattern = f"{_TRANSPOSED}|{_UP}" if all(n % 2 == 0 for n in window) else _TRANSPOSED
    return any(names.matches(pattern, name) for name in _own_names(leaf))


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
        front, back = _has_window(shape)
        outputs_first = back and not front
        if front == back and not doubt and leaf.core[-1].startswith("weight"):
            outputs_first = evidence.convention.get(leaf.core[-1], False)
            doubt = f"nothing shows where the window of {shape} is; set outputs_first"
    if outputs_first:
        numbers = numbers_of(leaf, stack, tuple(range(1, last + 1)), (0,))
        return Decision(numbers, "convolution, outputs first", doubt)
    numbers = numbers_of(leaf, stack, tuple(range(last)), (last,))
    other = numbers_of(leaf, stack, (*range(last - 1), last), (last - 1,))
    found = Decision(numbers, "convolution", doubt)
    if named or shape[-1] == shape[-2]:
        return found
    return found._replace(other=("If it is transposed, (*window, outputs, inputs)", other))


def local(leaf: Leaf, evidence: Evidence, settings: RoleSettings) -> Decision | None:
    """A convolution with weights of its own at each position, as its name or its bias shows."""
    del settings
    stack, shape = evidence.layer_of(leaf)
    if len(shape) < 3 or not _is_local(leaf, evidence):
        return None
    last = len(shape) - 1
    return Decision(numbers_of(leaf, stack, (last - 1,), (last,)), "convolution at each position")


def _is_local(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a convolution has a bias, or else a name, of one for each position."""
    if not is_named_convolution(leaf):
        return False
    stack, shape = evidence.layer_of(leaf)
    if bias := evidence.bias_of(leaf):
        size = stack.without(bias.shape)
        return len(size) > 1 and size == (*shape[:-2], shape[-1])
    return any(names.matches(_LOCAL, name) for name in _own_names(leaf))


def depthwise(leaf: Leaf, evidence: Evidence) -> Decision | None:
    """A convolution with one input channel per group mixes no channels."""
    _, shape = evidence.layer_of(leaf)
    if not leaf.has(names.CONVOLUTION):
        return _unnamed_depthwise(shape)
    one_input = len(shape) > 2 and 1 in (shape[-2], leaf.shape[-2])
    one_input &= not _is_pointwise(leaf, shape)
    if len(shape) > 2 and shape[1] == 1 < shape[0]:  # outputs first: (channels, 1, *window)
        one_input |= _is_window(shape[2:], shape[:1])
    small, large = min(shape), max(shape)
    taps = len(shape) == 2 and small <= _MOST_TAPS and large >= _MUCH_LARGER * small
    if one_input or (taps and is_named_convolution(leaf)):
        full = MuonDimensionNumbers(tuple(range(-len(shape), -1)), -1)
        doubt = _doubt_one_input(leaf, evidence, shape)
        return Decision(None, "depthwise convolution", doubt, full)
    return None


def _is_pointwise(leaf: Leaf, shape: Shape) -> bool:
    """Returns whether a kernel is (outputs, inputs, 1, 1), and no window of one channel."""
    if len(shape) < 3 or shape[1] == 1 or {*shape[2:]} != {1}:
        return False
    return max(shape) > _LONGEST or leaf.core[-1].startswith("weight")


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


def _series(leaf: Leaf, evidence: Evidence) -> list[Leaf]:
    """Lists the parameters like this one in modules that differ in their number, in order."""
    stem, depth = names.without_number(leaf.core[-2]), len(leaf.module)
    children = sorted(evidence.children[leaf.module], key=names.number)
    paths = [
        (*leaf.core[:depth], child, leaf.core[-1])
        for child in children
        if names.without_number(child) == stem
    ]
    return [evidence.by_core[path] for path in paths if path in evidence.by_core]


def doubt_groups(leaf: Leaf, evidence: Evidence) -> str:
    """Doubts a convolution whose inputs are a fraction of the outputs of the one before it."""
    shape = evidence.layer_of(leaf)[1]
    front, back = _has_window(shape)
    window = shape[:-2] if front else shape[2:]
    if front == back or math.prod(window) == 1 or not leaf.is_inside or _is_local(leaf, evidence):
        return ""
    series = _series(leaf, evidence)
    at = series.index(leaf)
    ranks = {len(evidence.layer_of(x)[1]) for x in series}
    if at == 0 or not is_named_convolution(leaf) or min(ranks) < 3:
        return ""
    sides = [_sides(x, evidence, front=front) for x in series]
    others = [_is_other(x, evidence, front=front) for x in series]
    sides = [pair[::-1] if other else pair for pair, other in zip(sides, others, strict=True)]
    (first, _), (_, before), (n_in, n_out) = sides[0], sides[at - 1], sides[at]
    is_known = n_in in {first, *(n for _, n in sides)} or evidence.has_output(leaf, n_in)
    groups, rest = divmod(before, max(n_in, 1))
    if is_known or rest or groups < 2 or n_out % groups:
        return ""
    return (
        f"the convolution before it has {before} outputs, so it may have {groups} groups; "
        "an analysis (mc.analyze) as muon_weight_dimension_numbers makes each group a matrix"
    )


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
    return any(names.matches(names.CONVOLUTION, name) for name in _own_names(leaf))


def _own_names(leaf: Leaf) -> Path:
    """Returns the names of a parameter, its module and the list around it."""
    depth = 3 if len(leaf.core) > 2 and leaf.core[-2].isdigit() else 2
    return leaf.core[-depth:]


def is_convolution_shape(shape: Shape) -> bool:
    """Returns whether four axes begin or end with a square window, beside more channels."""
    return len(shape) == 4 and (
        _is_square_window(shape[:2], shape[2:]) or _is_square_window(shape[2:], shape[:2])
    )


def _has_window(shape: Shape) -> tuple[bool, bool]:
    """Returns whether the first axes, and whether the last axes, may be a window."""
    if len(shape) < 3:
        return False, False
    return _is_window(shape[:-2], shape[-2:]), _is_window(shape[2:], shape[:2])


def _is_window(window: Shape, channels: Shape) -> bool:
    return max(window) <= _LONGEST and max(window) < max(channels)


def _is_square_window(window: Shape, channels: Shape) -> bool:
    is_square = len({*window}) == 1 and 1 < window[0] <= min(_LONGEST_SQUARE, *channels)
    return is_square and _is_window(window, channels)

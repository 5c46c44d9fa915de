"""Kernels with axes beside inputs and outputs: windows of convolutions, gates beside values."""

from muonclip_jax._muon import role_names as names
from muonclip_jax._muon.evidence import Evidence, Leaf, Stack
from muonclip_jax._muon.kernels import (
    Decision,
    Settings,
    is_convolution,
    is_convolution_shape,
    is_window,
    layer_of,
    module_and_name,
    numbers_of,
)


def convolution(leaf: Leaf, evidence: Evidence, settings: Settings) -> Decision | None:
    """(*window, inputs, outputs) is one matrix, (window x inputs) x outputs."""
    stack, shape = layer_of(leaf, evidence)
    named = is_convolution(leaf)
    if len(shape) < 3:
        return None
    is_square = is_window(shape[:-2], shape[-2:], square=True)
    if (
        not stack.known
        and named
        and len(shape) > 3
        and not is_square
        and evidence.shared_axis(leaf)
    ):
        stack, shape = Stack((0,), True), shape[1:]
    doubt = ""
    if not named:
        by_name = any(names.matches(names.EXPERTS, name) for name in leaf.core)
        if by_name or not is_convolution_shape(shape):
            return None
        doubt = "its shape is that of a convolution, its name is not"
    last = len(shape) - 1
    outputs_first = settings.outputs_first
    if outputs_first is None:
        front, back = (
            is_window(shape[:-2], shape[-2:]),
            is_window(shape[2:], shape[:2]),
        )
        outputs_first = back and not front
        if front == back and not doubt and leaf.core[-1] == "weight":
            outputs_first = evidence.convention.get("weight", False)
            doubt = f"nothing shows where the window of {shape} is; see outputs_first"
    if outputs_first:
        numbers = numbers_of(leaf, stack, tuple(range(1, last + 1)), (0,))
        return Decision(numbers, "convolution, outputs first", doubt)
    return Decision(numbers_of(leaf, stack, tuple(range(last)), (last,)), "convolution", doubt)


def gated_pair(leaf: Leaf, evidence: Evidence, settings: Settings) -> Decision | None:
    """(inputs, 2, outputs): gate and up in one parameter."""
    del settings
    _, name = module_and_name(leaf)
    stack, shape = layer_of(leaf, evidence)
    is_pair = len(shape) == 3 and shape[1] == 2 and names.matches(names.GATED_PAIR, name)
    if not is_pair or (not stack.known and shape[0] < 8):
        return None
    return Decision(numbers_of(leaf, stack, (0,), (2,)), f"gate and up '{name}'")

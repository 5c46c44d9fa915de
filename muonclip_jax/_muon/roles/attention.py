"""Kernels of attention that have an axis of heads."""

import math

from muonclip_jax._muon.roles import names
from muonclip_jax._muon.roles.convolutions import is_convolution_shape
from muonclip_jax._muon.roles.decision import Decision, RoleSettings
from muonclip_jax._muon.roles.evidence import Evidence
from muonclip_jax._muon.roles.kernels import (
    fused_axis,
    heads_name,
    inputs_near,
    is_expert,
    numbers_of,
    partners,
)
from muonclip_jax._muon.roles.modules import Leaf, Shape, Stack
from muonclip_jax._muon.roles.orientation import last_two_axes


def by_layout(leaf: Leaf, evidence: Evidence, settings: RoleSettings) -> Decision | None:
    """Follows the pattern of a head layout in a module that has all children of that layout."""
    name = leaf.name
    if not names.matches(names.MATRIX_NAMES, leaf.core[-1]) and leaf.core != (*leaf.module, name):
        return None
    children = evidence.children.get(leaf.module, set())
    heads = next((h for h in settings.heads if name in h and children >= h.keys()), None)
    if heads is None or "lora" in leaf.core[-1].lower():
        return None
    axes, stack_axis = heads[name]
    stack, shape = evidence.layer_of(leaf)
    if len(shape) > len(axes):
        start = stack_axis % len(leaf.shape) if stack_axis >= 0 else 0
        stack = Stack(tuple(range(start, start + len(leaf.shape) - len(axes))), True)
        shape = stack.without(leaf.shape)
    if len(shape) != len(axes):
        return None
    outputs = tuple(i for i, n in enumerate(axes) if n != ("inputs",) and not n[0].isdigit())
    numbers = numbers_of(leaf, stack, (axes.index(("inputs",)),), outputs)
    return Decision(numbers, f"attention '{name}' of the head layout")


def in_pair(leaf: Leaf, evidence: Evidence, settings: RoleSettings) -> Decision | None:
    """(inputs, *heads) beside (*heads, outputs) of the same sizes, under any names.

    Source: einsums of jax-llm-examples (Mamba-2 in Nemotron 3), Penzai's Llama.
    """
    del settings
    stack, shape = evidence.layer_of(leaf)
    if len(shape) == 4 and not stack.known and evidence.shared_axis(leaf):
        stack, shape = Stack((0,), True), shape[1:]
    if len(shape) < 3 or shape[0] == shape[-1] or leaf.is_lora or is_convolution_shape(shape):
        return None
    ndim = len(leaf.shape)
    is_unnamed = heads_name(leaf, evidence) is None
    if not is_unnamed and len(shape) == 3:
        return None  # `with_heads` has more evidence
    beside = [x for x in evidence.beside(leaf) if len(x.shape) == ndim]
    beside = [x for x in beside if is_unnamed or heads_name(x, evidence) is not None]
    others = {stack.without(x.shape) for x in beside}
    widths = evidence.widths(leaf) or {shape[0], shape[-1]}
    if shape[0] in widths and (*shape[1:], shape[0]) in others:
        sides = (0,), tuple(range(1, len(shape)))
    elif shape[-1] in widths and (shape[-1], *shape[:-1]) in others:
        sides = tuple(range(len(shape) - 1)), (len(shape) - 1,)
    else:
        return None
    return Decision(numbers_of(leaf, stack, *sides), "heads, as the kernels beside it show")


def with_heads(leaf: Leaf, evidence: Evidence, settings: RoleSettings) -> Decision | None:
    """A kernel with an axis of heads, by its name and by the shapes beside it."""
    side = heads_name(leaf, evidence)
    if side is None or len(leaf.shape) < 3 or is_expert(leaf, evidence):
        return None
    if leaf.is_lora and names.matches(names.HEADS_FIRST, leaf.name):
        return None  # an adapter of each head
    name = leaf.name
    stack, shape = evidence.layer_of(leaf)
    fused = fused_axis(name, shape)
    axes = [axis for axis in range(len(shape)) if axis != fused]
    sub = tuple(shape[axis] for axis in axes)
    if len(sub) == 4 and not stack.axes and (sub[:2] == (1, 1) or is_convolution_shape(sub)):
        return None
    doubt = ""
    if not stack.known and len(sub) > 2:
        depth, doubt = _stack_by_attention(leaf, sub, side, evidence)
        axes, sub = axes[depth:], sub[depth:]
    if len(sub) < 2 or (len(sub) == 2 and fused is None):
        # Flat projections; a doubt stays with them.
        return last_two_axes(leaf, evidence, settings)._replace(doubt=doubt) if doubt else None
    inner, why = _residual_axis(leaf, sub, side, evidence, settings)
    if not why and _is_block_diagonal(sub) and not leaf.is_lora:
        why = "its heads are tiny, so that it may be the blocks of a diagonal"
    others = tuple(axis for i, axis in enumerate(axes) if i != inner)
    sides = ((axes[inner],), others) if side == "in" else (others, (axes[inner],))
    reason = f"attention '{name}'" + (f", {shape[fused]} in one" if fused is not None else "")
    return Decision(numbers_of(leaf, stack, *sides), reason, doubt or why)


def _is_block_diagonal(shape: Shape) -> bool:
    """Returns whether a kernel may be many small square blocks, as the ones of xLSTM."""
    return len(shape) == 3 and shape[1] == shape[2] <= 16 and shape[0] >= _FEW * shape[1]


def _residual_axis(
    leaf: Leaf, shape: Shape, side: str, evidence: Evidence, settings: RoleSettings
) -> tuple[int, str]:
    """Finds the axis that is as wide as the activations outside of the heads, and a doubt."""
    last = len(shape) - 1
    usual = 0 if side == "in" else last
    if settings.outputs_first:
        usual = last - usual
    elif side == "in" and names.matches(names.HEADS_FIRST, leaf.name):
        usual = last - 1
    widths = _low_rank(leaf, evidence) or evidence.widths(leaf)
    hits = [axis for axis, n in enumerate(shape) if n in widths]
    if usual in hits:
        return usual, ""
    if middle := [axis for axis in hits if 0 < axis < last]:
        return middle[0], ""
    beside = inputs_near(leaf.module, evidence)
    if side == "out" and hits == [0] and any(p.shape[-3:] == shape for p in beside):
        return 0, ""  # stored as the queries are
    if side == "in" and hits == [last] and math.prod(shape[:-1]) % shape[last] == 0:
        return last, ""  # stored outputs first, as AlphaFold 3 does
    convention = evidence.convention.get(leaf.core[-1], settings.outputs_first)
    if convention and last - usual in hits:
        return last - usual, ""
    if side == "out" and hits == [0]:
        return 0, "nothing but its first axis shows that it is stored as queries are"
    confirmed = settings.outputs_first is not None or _fits_beside(leaf, shape, side, evidence)
    no_width = widths and not hits and _FEW * math.prod(shape) <= shape[usual] ** 2
    doubtful = not confirmed and (shape[usual] < max(shape) or no_width) and not leaf.is_lora
    return usual, "nothing shows which of its axes are heads" if doubtful else ""


def _low_rank(leaf: Leaf, evidence: Evidence) -> set[int]:
    """Returns the outputs of `q_a` for `q_b`, of `kv_a` for `k_b`, of `lora_a` for `lora_b`."""
    module, name = leaf.module, leaf.name
    if (own := leaf.core[-1]).lower().endswith("lora_b"):
        down = evidence.by_core.get((*leaf.core[:-1], own[:-1] + ("a" if own[-1] == "b" else "A")))
        return {down.shape[-1]} if down and 1 < len(down.shape) < len(leaf.shape) else set()
    if not names.matches(names.FROM_LOW_RANK, name):
        return set()
    inside = leaf.core[len(module) + 1 :]
    pairs = [name.replace("_b", "_a"), "wkv_a" if name.startswith("w") else "kv_a"]
    found = (evidence.by_core.get((*module, pair, *inside)) for pair in pairs)
    return {down.shape[-1] for down in found if down and len(down.shape) > 1}


def _stack_by_attention(leaf: Leaf, shape: Shape, side: str, evidence: Evidence) -> tuple[int, str]:
    """Decides how many leading axes stack layers where no vector shows it, and a doubt."""
    if len(shape) == 3:
        return _stack_of_three(leaf, shape, side, evidence)
    if evidence.shared_axis(leaf):
        return 1, "" if len(shape) == 4 else "nothing shows which of its axes are heads"
    inner = shape[len(shape) - 3 :]
    if _fits_beside(leaf, inner, side, evidence) or inner[0 if side == "in" else 2] in (
        evidence.widths(leaf)
    ):
        return len(shape) - 3, ""
    return len(shape) - 3, f"nothing shows which axes of {shape} are heads and which are stacks"


def _stack_of_three(leaf: Leaf, shape: Shape, side: str, evidence: Evidence) -> tuple[int, str]:
    """Decides whether three axes are heads or a stack of flat matrices."""
    module, name = leaf.module, leaf.name
    if _fits_beside(leaf, shape, side, evidence) or shape[0] in _low_rank(leaf, evidence):
        return 0, ""
    width, heads = (shape[0], shape[1:]) if side == "in" else (shape[-1], shape[:-1])
    if names.matches(names.HEADS_FIRST, name) or width == math.prod(heads):
        return 0, ""
    others = [p.shape for p in partners(module, _OTHER[side], evidence).values()]
    if evidence.shared_axis(leaf) or any(len(p) == 3 and p[0] == shape[0] for p in others):
        return 1, ""
    widths = evidence.widths(leaf)
    is_width = width in widths and not widths & {*heads}
    residual = {p[-1 if side == "in" else 0] for p in others if p}
    if is_width and (_is_in_list(leaf) or residual == {width}):
        return 0, ""
    if others:
        return 1, f"its shape fits neither heads nor the shapes {others} beside it"
    why = f"nothing shows whether it is heads or a stack of {shape[0]} matrices"
    if _is_in_list(leaf) and _in_attention(leaf):
        return 0, ""
    return (0, why) if side == "in" else (1, why if _in_attention(leaf) else "")


# How many times smaller than an unknown width heads x head_dim is, if its axes are doubted.
_FEW = 8
_OTHER = {"in": "out", "out": "in"}


def _fits_beside(leaf: Leaf, shape: Shape, side: str, evidence: Evidence) -> bool:
    """Returns whether the shapes of the other projections confirm (inputs, heads, head_dim)."""
    if len(shape) != 3:
        return False
    module, name = leaf.module, leaf.name
    is_heads_first = names.matches(names.HEADS_FIRST, name)
    for other, partner in partners(module, _OTHER[side], evidence).items():
        q, o = (shape, partner.shape[-3:]) if side == "in" else (partner.shape[-3:], shape)
        first = is_heads_first or names.matches(names.HEADS_FIRST, other)
        if len(q) == len(o) == 3 and _consistent(q, o, first):
            return True
    same = [p.shape[-3:] for n, p in partners(module, side, evidence).items() if n != name]
    return any(len(p) == 3 and _differ_in_heads(shape, p, is_heads_first) for p in same)


def _is_in_list(leaf: Leaf) -> bool:
    """Returns whether the parameter is in a list, so that its layers are hardly stacked."""
    return any(name.isdigit() for name in leaf.core[:-1])


def _in_attention(leaf: Leaf) -> bool:
    return any("att" in name.lower() for name in leaf.core[:-1])


def _consistent(q: Shape, o: Shape, heads_first: bool) -> bool:
    """Returns whether an output projection begins with the heads with which queries end."""
    if heads_first:
        return q == (o[0], o[2], o[1])
    width, heads, head_dim = q
    grouped = head_dim == o[1] and min(heads, o[0]) > 0 and max(heads, o[0]) % min(heads, o[0]) == 0
    return width == o[2] and (q[1:] == o[:2] or (grouped and heads < width))


def _differ_in_heads(a: Shape, b: Shape, heads_first: bool) -> bool:
    """Returns whether two projections differ in their number of heads alone."""
    differ = [axis for axis in range(3) if a[axis] != b[axis]]
    return differ == ([0] if heads_first else [1])

"""Kernels of attention that have an axis of heads."""

import math

from muonclip_jax import _role_names as names
from muonclip_jax._evidence import Evidence, Leaf, Shape
from muonclip_jax._kernels import (
    Decision,
    Settings,
    heads_name,
    is_expert,
    last_two_axes,
    layer_of,
    module_and_name,
    numbers_of,
    partners,
)


def _fused_axis(name: str, shape: Shape) -> int | None:
    """Finds the axis that numbers queries, keys and values in one kernel."""
    count = next((n for fused, n in names.FUSED.items() if fused in name.lower()), None)
    if count is None or len(shape) < 3 or names.matches(r"w?kv_b(_proj)?", name):
        return None
    return next((axis for axis, n in enumerate(shape[:-1]) if n == count), None)


def attention(leaf: Leaf, evidence: Evidence, settings: Settings) -> Decision | None:
    side = heads_name(leaf, evidence, settings)
    if side is None or len(leaf.shape) < 3 or is_expert(leaf, evidence):
        return None
    _, name = module_and_name(leaf)
    stack, shape = layer_of(leaf, evidence)
    fused = _fused_axis(name, shape)
    axes = [axis for axis in range(len(shape)) if axis != fused]
    sub = tuple(shape[axis] for axis in axes)
    doubt = ""
    if not stack.known and len(sub) > 2:
        depth, doubt = _stack_by_attention(leaf, sub, side, evidence, settings)
        axes, sub = axes[depth:], sub[depth:]
    if len(sub) < 2 or (len(sub) == 2 and fused is None):
        # Flat projections; a doubt stays with them.
        return last_two_axes(leaf, evidence, settings)._replace(doubt=doubt) if doubt else None
    inner = _residual_axis(leaf, sub, side, evidence, settings)
    others = tuple(axis for i, axis in enumerate(axes) if i != inner)
    sides = ((axes[inner],), others) if side == "in" else (others, (axes[inner],))
    reason = f"attention '{name}'" + (f", {shape[fused]} in one" if fused is not None else "")
    return Decision(numbers_of(leaf, stack, *sides), reason, doubt)


def _residual_axis(
    leaf: Leaf, shape: Shape, side: str, evidence: Evidence, settings: Settings
) -> int:
    """Finds the axis of a projection that is as wide as the activations outside of the heads."""
    _, name = module_and_name(leaf)
    last = len(shape) - 1
    pattern = settings.heads.get(name, ())
    if "inputs" in pattern and len(pattern) == len(shape):
        return pattern.index("inputs")
    usual = 0 if side == "in" else last
    if settings.outputs_first:
        usual = last - usual
    elif side == "in" and names.matches(names.HEADS_FIRST, name):
        usual = last - 1
    widths = evidence.widths(leaf)
    hits = [axis for axis, n in enumerate(shape) if n in widths]
    if hits and usual not in hits:
        return hits[-1] if usual else hits[0]
    return usual


def _stack_by_attention(
    leaf: Leaf, shape: Shape, side: str, evidence: Evidence, settings: Settings
) -> tuple[int, str]:
    """Decides how many leading axes stack layers where no vector shows it, and a doubt."""
    depth = len(shape) - 3
    shape = shape[depth:]
    module, name = module_and_name(leaf)
    if name in settings.heads and len(settings.heads[name]) == 3:
        return depth, ""
    other = "out" if side == "in" else "in"
    others = [p.shape[depth:] for p in partners(module, other, evidence).values()]
    same = [p.shape[depth:] for n, p in partners(module, side, evidence).items() if n != name]
    heads_first = names.matches(names.HEADS_FIRST, name)
    for partner in others:
        q, o = (shape, partner) if side == "in" else (partner, shape)
        if len(partner) == 3 and _consistent(q, o, heads_first):
            return depth, ""
    if any(len(p) == 3 and _differ_in_heads(shape, p, heads_first) for p in same):
        return depth, ""
    width, heads = (shape[0], shape[1:]) if side == "in" else (shape[-1], shape[:-1])
    if heads_first or width == math.prod(heads):
        return depth, ""
    if evidence.shared_axis(leaf) or any(len(p) == 3 and p[0] == shape[0] for p in others):
        return depth + 1, ""
    widths = evidence.widths(leaf)
    if width in widths and not widths & {*heads}:
        return depth, ""
    why = f"nothing shows whether {shape} is heads or a stack of {shape[0]} matrices"
    if others:
        why = f"its shape {shape} fits neither heads nor the shapes {others} beside it"
        return depth + 1, why
    if evidence.is_numbered(leaf) and _in_attention(leaf):
        return depth, ""
    return (depth, why) if side == "in" else (depth + 1, why if _in_attention(leaf) else "")


def _in_attention(leaf: Leaf) -> bool:
    return any("att" in name.lower() for name in leaf.core[:-1])


def _consistent(q: Shape, o: Shape, heads_first: bool) -> bool:
    """Returns whether an output projection begins with the heads with which queries end."""
    if heads_first:
        return q == (o[0], o[2], o[1])
    width, heads, head_dim = q
    grouped = head_dim == o[1] and max(heads, o[0]) % min(heads, o[0]) == 0
    return width == o[2] and (q[1:] == o[:2] or (grouped and heads < width))


def _differ_in_heads(a: Shape, b: Shape, heads_first: bool) -> bool:
    """Returns whether two projections differ in their number of heads alone."""
    differ = [axis for axis in range(3) if a[axis] != b[axis]]
    return differ == ([0] if heads_first else [1])

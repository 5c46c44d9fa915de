"""The input side of a matrix: by names and widths, by other parameters, by its bias."""

import re

from muonclip_jax._muon.roles import names
from muonclip_jax._muon.roles.biases import bias_fit
from muonclip_jax._muon.roles.decision import Decision, RoleSettings
from muonclip_jax._muon.roles.evidence import Evidence
from muonclip_jax._muon.roles.kernels import (
    has_transposed,
    is_expert,
    numbers_of,
    partners,
)
from muonclip_jax._muon.roles.modules import Leaf, Shape

# A first axis of three that is no longer than this may number layers without further evidence.
_SHORT_STACK = 16
# The fewest channels of a convolution that no name shows.
_CHANNELS = 32
# `w1` and `w2` of sides that differ this much are the two factors of a low rank.
_LOW_RANK = 8
_LORA = re.compile(r"(\w+_)?lora_[abAB]")


def beside_heads(leaf: Leaf, evidence: Evidence, settings: RoleSettings) -> Decision | None:
    """(inputs, *outputs) with the inputs of a kernel beside it that has the heads as outputs.

    Source: `wb_in` beside `wx_in` and `w_out` in Nemotron 3 of jax-llm-examples.
    """
    del settings
    stack, shape = evidence.layer_of(leaf)
    widths = evidence.widths(leaf)
    if len(shape) != 3 or shape[0] not in widths or widths & {*shape[1:]} or leaf.is_lora:
        return None
    layers = [evidence.layer_of(x)[1] for x in evidence.beside(leaf)]
    pairs = [s for s in layers if len(s) == 3 and s[0] == shape[0] and (*s[1:], s[0]) in layers]
    if not pairs:
        return None
    return Decision(numbers_of(leaf, stack, (0,), (1, 2)), "inputs of the kernels beside it")


def last_two_axes(leaf: Leaf, evidence: Evidence, settings: RoleSettings) -> Decision:
    """The last two axes are a matrix, and the axes before them number matrices."""
    stack, shape = evidence.layer_of(leaf)
    last = len(shape) - 1
    outputs_first, reason, doubt = _orientation(leaf, evidence, settings)
    is_unknown = stack.known or _is_beside_heads(leaf, evidence) or _is_lone(leaf, evidence)
    is_unknown &= not _is_named_stack(leaf)
    is_set = settings.outputs_first is not None
    if last == 2 and not (doubt or is_set) and _may_be_window(leaf, evidence):
        doubt = f"its first axis of {shape[0]} may be the window of a convolution"
    if is_unknown and last > 1 and not doubt and not _is_batch(leaf, evidence):
        doubt = f"nothing shows whether the axes {shape} are matrices or heads"
    sides = ((last,), (last - 1,)) if outputs_first else ((last - 1,), (last,))
    return Decision(numbers_of(leaf, stack, *sides), reason, doubt)


def doubt_raw(leaf: Leaf, evidence: Evidence) -> str:
    """Doubts an array beside kernels, if neither a name nor others show that it is a matrix."""
    own = leaf.core[-1]
    known = rf"{names.MATRIX_NAMES}|{names.MATRIX_ENDS}|{names.MATRIX_STARTS}|{names.STACKS}|stack"
    if not evidence.has_kernels or leaf.is_known or names.matches(known, own):
        return ""
    if has_transposed(leaf, evidence) or bias_fit(leaf, evidence)[0] is not None:
        return ""
    *batch, n_in, n_out = evidence.layer_of(leaf)[1]
    if batch and is_expert(leaf, evidence):
        return ""
    is_from_width = n_in < n_out and n_in in evidence.widths(leaf)  # a table ends in the width
    if is_from_width or _has_low_rank(leaf, evidence):
        return ""
    return "it is no kernel, as other matrices are, and may be a table or vectors"


def _has_low_rank(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether the short side is the one of an array beside it: `q_down` and `q_up`."""
    own = evidence.layer_of(leaf)[1][-2:]
    layers = (evidence.layer_of(x)[1][-2:] for x in evidence.leaves_in(leaf.core[:-1]))
    beside = [layer for layer in layers if len(layer) == 2]
    pairs = [(own, x) for x in beside] + [(x, own) for x in beside]
    return any(down[1] == up[0] < min(down[0], up[1]) for down, up in pairs)


def _may_be_window(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether an odd first axis numbers no layers: nothing else in the pytree has it."""
    length, *channels = evidence.layer_of(leaf)[1]
    known = (*names.PROJECTIONS, names.EXPERTS, names.STACKS, "stack")
    is_window = length % 2 == 1 and 3 <= length < _SHORT_STACK and max(channels) >= _CHANNELS
    if not is_window or leaf.is_lora:
        return False
    if leaf.core[-1].isdigit():
        return not leaf.has(names.EXPERTS)  # a list of layers has no stacks of layers
    if any(names.matches(pattern, name) for name in leaf.core for pattern in known):
        return False
    return all(x.shape[:1] != leaf.shape[:1] for x in evidence.beside(leaf))


def _is_named_stack(leaf: Leaf) -> bool:
    """Returns whether names show that a third axis numbers layers or experts, and no heads."""
    is_mlp = names.matches(f"{names.FROM_RESIDUAL}|{names.TO_RESIDUAL}", leaf.name)
    return is_mlp or any(names.matches(names.STACKS, part) for part in leaf.core[:-1])


def _is_lone(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether nothing else in its module begins with the same long axis."""
    if leaf.is_lora or len(leaf.shape) < 3 or leaf.shape[0] <= _SHORT_STACK:
        return False
    return all(x.shape[:1] != leaf.shape[:1] for x in evidence.beside(leaf))


def _is_beside_heads(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a parameter is beside projections into heads that begin with another size."""
    beside = partners(leaf.module, "in", evidence).values()
    return any(len(p.shape) > 2 and p.shape[0] != leaf.shape[0] for p in beside)


def _is_batch(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether something shows that the first axes of one layer number matrices."""
    if is_expert(leaf, evidence) or bias_fit(leaf, evidence)[0] is not None:
        return True
    module, name = leaf.module, leaf.name
    shape = evidence.layer_of(leaf)[1]
    beside = evidence.experts(module).get((shape[:-3], shape[-3]), [])
    return len(beside) > 1 or shape[-3] <= 4 or "lora" in name.lower()


def _orientation(leaf: Leaf, evidence: Evidence, settings: RoleSettings) -> tuple[bool, str, str]:
    """Decides whether a matrix is stored (outputs, inputs), with the reason and a doubt."""
    by_bias, by_name = _orientation_by_bias(leaf, evidence), _orientation_by_name(leaf, evidence)
    if settings.outputs_first is not None:
        doubt = ""
        if by_bias not in (None, settings.outputs_first):
            doubt = f"outputs_first={settings.outputs_first}, but its bias fits the other axis"
        return settings.outputs_first, _reason(settings.outputs_first, "as set"), doubt
    if by_bias is not None:
        return by_bias, _reason(by_bias, f"as its {'rank' if leaf.is_lora else 'bias'} shows"), ""
    convention = evidence.convention.get(leaf.core[-1])
    if _is_inputs_first_by_custom(leaf):
        by_name = None
    elif convention is not None and names.matches(names.FROM_OTHERS, leaf.name):
        # In cross-attention the inputs have another width.
        by_name = by_name if by_name == convention else None
    if by_name is not None:
        is_shown = leaf.is_inside and by_name == convention
        doubt = "" if is_shown else _doubt_narrow(leaf, evidence)
        return by_name, _reason(by_name, "as its name and the widths show"), doubt
    if convention is not None:
        return convention, _reason(convention, "as others in this pytree"), ""
    return False, "last two axes", _doubt_storage(leaf, evidence) if settings.scale_by_sides else ""


def _doubt_storage(leaf: Leaf, evidence: Evidence) -> str:
    """Doubts that a matrix is stored (inputs, outputs) where nothing but custom shows it."""
    shape = evidence.layer_of(leaf)[1]
    if shape[-1] == shape[-2]:
        return ""
    if re.fullmatch(r"weight(_\w+)?|\w*weight", leaf.core[-1]):  # not AlphaFold's `weights`
        return "nothing shows whether it is stored (inputs, outputs); set outputs_first"
    if leaf.core[-1] == "gating_einsum":
        return "Gemma's code stores it (inputs, outputs) or (outputs, inputs)"
    return _gate_like_down(leaf, shape, evidence) or _narrow_up(leaf, shape, evidence)


def _narrow_up(leaf: Leaf, shape: Shape, evidence: Evidence) -> str:
    """Doubts raw arrays `w1` (few outputs) and `w2` (few inputs): MLPs are wider inside."""
    own = leaf.core[-1]
    is_up, is_down = (names.matches(p, own) for p in (names.FROM_RESIDUAL, names.TO_RESIDUAL))
    *_, n_in, n_out = shape
    is_low_rank = _LOW_RANK * min(n_in, n_out) <= max(n_in, n_out)
    if is_up == is_down or len(shape) > 2 or is_low_rank or not has_transposed(leaf, evidence):
        return ""
    if is_up == (n_in < n_out):
        return ""
    return f"as (inputs, outputs) '{own}' has {n_in} and {n_out}; set outputs_first"


def _gate_like_down(leaf: Leaf, shape: Shape, evidence: Evidence) -> str:
    """Doubts a projection from the residual stream with the shape of the projection back to it."""
    module, name = leaf.module, leaf.name
    if not names.matches(names.FROM_RESIDUAL, name):
        return ""
    for child in evidence.children.get(module, ()):
        is_other = child != leaf.core[len(module)]  # `linear1` is a `linear` too
        if is_other and names.matches(f"{names.TO_RESIDUAL}|linear", child):
            for path in ((*module, child), *((*module, child, k) for k in ("kernel", "w"))):
                back = evidence.by_core.get(path)
                if back and evidence.layer_of(back)[1][-2:] == shape[-2:]:
                    return f"it has the shape of '{child}', which projects in the other direction"
    return ""


def _reason(outputs_first: bool, why: str) -> str:
    return f"last two axes, outputs first {why}" if outputs_first else "last two axes"


def _orientation_by_bias(leaf: Leaf, evidence: Evidence) -> bool | None:
    """Compares a matrix with its bias, and an adapter with the rank of its partner."""
    if (by_rank := _orientation_by_rank(leaf, evidence)) is not None:
        return by_rank
    fit, both = bias_fit(leaf, evidence)
    if fit is None or both or len(fit.inputs) != 1 or len(fit.outputs) != 1:
        return None
    return fit.outputs_first


def _orientation_by_rank(leaf: Leaf, evidence: Evidence) -> bool | None:
    """Compares the sides of `lora_A` and `lora_B`, which share the rank; else the rank is short."""
    depth = next((d for d, n in enumerate(leaf.core) if _LORA.fullmatch(n)), None)
    shape = evidence.layer_of(leaf)[1]
    if depth is None or len(shape) != 2:
        return None
    name = leaf.core[depth]
    pair = "ab" if name[-1] in "ab" else "AB"
    paths = ((*leaf.core[:depth], name[:-1] + end, *leaf.core[depth + 1 :]) for end in pair)
    down, up = map(evidence.by_core.get, paths)
    if down and up and len(down.shape) == len(up.shape) == len(leaf.shape):
        inputs_first = down.shape[-1] == up.shape[-2]
        outputs_first = down.shape[-2] == up.shape[-1]
        if inputs_first != outputs_first:
            return outputs_first
    if 2 * min(shape) > max(shape):
        return None
    rank_is_last = shape[1] < shape[0]
    return rank_is_last == (name[-1] in "bB")


def _is_inputs_first_by_custom(leaf: Leaf) -> bool:
    """Returns whether a parameter has the name that Flax or Haiku store as (inputs, outputs)."""
    return leaf.core[-1] in ("kernel", "w") and not leaf.name.endswith("einsum")


def _orientation_by_name(leaf: Leaf, evidence: Evidence) -> bool | None:
    """Compares the sides of projections from and to the residual stream with its width."""
    name = leaf.name
    if names.matches(names.OF_CELL, leaf.core[-1]):
        return True
    shape = evidence.layer_of(leaf)[1][-2:]
    widths = evidence.widths(leaf) & {evidence.embedded, evidence.usual_width}
    inside = [n in widths for n in shape]
    is_other = _is_numbered_letter(leaf, evidence) or evidence.is_lone_letter(leaf)
    if sum(inside) != 1 or is_other:
        return None
    if name == "value" and any(names.matches(names.FEED_FORWARD, n) for n in leaf.module[-1:]):
        return inside[0]  # RWKV: `key` is the projection up, `value` the one down
    if _is_bottleneck(leaf, evidence):
        return inside["down" in name.lower()]
    if names.matches(names.FROM_RESIDUAL, name) or names.matches(names.INTO_HEADS, name):
        return inside[1]
    if names.matches(names.TO_RESIDUAL, name) or names.matches(names.OUT_OF_HEADS, name):
        return inside[0]
    return None


def _is_narrow(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether `up` or `down` has a side that is shorter than the width."""
    shape = evidence.layer_of(leaf)[1][-2:]
    return names.matches(names.UP_OR_DOWN, leaf.name) and max(shape) in evidence.widths(leaf)


def _is_bottleneck(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether `down` projects from the width to a shorter side, and `up` back to it.

    An MLP has a wider inside, unless it is an expert or has a gate.
    """
    if not _is_narrow(leaf, evidence) or evidence.has_child(leaf.module, names.BESIDE_UP):
        return False
    is_mlp = any(names.matches(names.FEED_FORWARD, name) for name in leaf.module[-1:])
    return leaf.has(names.BOTTLENECK) or not (is_mlp or is_expert(leaf, evidence))


def _doubt_narrow(leaf: Leaf, evidence: Evidence) -> str:
    """Doubts `up` and `down` of an MLP with a shorter side inside, which may be a bottleneck."""
    if not _is_narrow(leaf, evidence) or evidence.has_child(leaf.module, names.BESIDE_UP):
        return ""
    if _is_bottleneck(leaf, evidence) or leaf.has(names.EXPERTS) or len(leaf.shape) > 2:
        return ""
    return "its inside is narrower than the width, as in a bottleneck; set outputs_first"


def _is_numbered_letter(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether `v2` is one of several parameters `v1`, `v2`, and hence no values."""
    name = leaf.core[-1]
    others = (f"{name[:1]}{n}" for n in "0123" if n != name[1:])
    is_letter = len(name) == 2 and name[0] in "qkv" and name[1].isdigit()
    return is_letter and any((*leaf.core[:-1], other) in evidence.by_core for other in others)


def find_convention(evidence: Evidence) -> dict[str, bool]:
    """Finds, by the name of the parameter, whether all matrices that show it are outputs first."""
    found: dict[str, tuple[set[bool | None], set[bool | None]]] = {}
    for leaf in evidence.leaves:
        if leaf.role is None and len(evidence.layer_of(leaf)[1]) == 2:
            by_bias, by_name = found.setdefault(leaf.core[-1], (set(), set()))
            by_bias.add(_orientation_by_bias(leaf, evidence))
            if not _is_inputs_first_by_custom(leaf):
                by_name.add(_orientation_by_name(leaf, evidence))
    convention = {}
    for name, votes in found.items():
        for vote in votes:
            shown = {first for first in vote if first is not None}
            if len(shown) == 1:
                convention[name] = shown.pop()
                break
            if shown:
                break
    return convention


def find_kernels(evidence: Evidence) -> bool:
    """Finds whether matrices are the kernels of modules, as in Flax, and few are raw arrays."""
    large = [x for x in evidence.leaves if x.role is None and len(evidence.layer_of(x)[1]) > 1]
    raw = [leaf.is_known for leaf in large if not leaf.is_inside and not leaf.is_lora]
    kernels = sum(leaf.is_inside for leaf in large)
    return kernels > raw.count(True) and kernels >= raw.count(False)

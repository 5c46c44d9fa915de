"""Which parameter goes to Muon, along which axes, and which to AdamW: one small function per rule.

The rules are tried in order; the first that applies decides. Each gives its reason, which the table
prints, and a doubt where it rests on a weak guess, which becomes a warning.
"""

from collections.abc import Sequence

from muonclip_jax._muon import (
    head_kernels as _head_kernels,
    kernels as _kernels,
    orientation as _orientation,
    role_names as names,
    window_kernels as _window_kernels,
)
from muonclip_jax._muon.evidence import Evidence, Leaf, Path, Shape
from muonclip_jax._muon.kernels import DEFAULTS, Decision, Settings

_SMALL_SIDE, _MUCH_LARGER = 4, 8


def decide(
    paths: Sequence[Path], shapes: Sequence[Shape], settings: Settings = DEFAULTS
) -> list[Decision]:
    """Decides for each parameter of a pytree.

    Args:
      paths: Components of the path of each parameter.
      shapes: Its shape.
      settings: What the user set.

    Returns:
      One decision for each parameter.

    Example:
      >>> [d.reason for d in decide([("up", "kernel"), ("up", "bias")], [(4, 16), (16,)])]
      ['last two axes', "bias 'bias'"]
    """
    evidence = Evidence(paths, shapes)
    evidence.convention = _orientation.find_convention(evidence)
    return [_decide(leaf, evidence, settings) for leaf in evidence.leaves]


def _decide(leaf: Leaf, evidence: Evidence, settings: Settings) -> Decision:
    for rule in _ADAMW_RULES:
        if decision := rule(leaf, evidence):
            return decision
    found = (rule(leaf, evidence, settings) for rule in _MUON_RULES)
    return _checked(leaf, evidence, next(filter(None, found)))


def _by_name(leaf: Leaf, evidence: Evidence) -> Decision | None:
    if leaf.role is None:
        return None
    role, name = leaf.role
    if role.name == "norm" and _orientation.is_matrix_of_adaptive_norm(leaf, evidence, name):
        return None
    doubt = _orientation.doubt_below_norm(leaf, name) if role.name == "norm" else ""
    is_dense = len(leaf.shape) < 4 and _orientation.has_fitting_bias(leaf, evidence)
    if role.name == "embedding" and is_dense:
        if not any(names.matches(names.PATCHES, n) for n in leaf.core):
            doubt = f"'{name}' names an embedding, but the bias beside it is that of a dense layer"
    if role.where == "top" and _has_siblings(leaf, evidence, names.INTO_HEADS):
        return None
    return Decision(None, f"{role.name} '{name}'", doubt)


def _short_bias(leaf: Leaf, evidence: Evidence) -> Decision | None:
    """`b` beside `w` or `kernel` is a bias, as in Haiku; LoRA has matrices `a` and `b`."""
    name, beside = leaf.core[-1], evidence.children[leaf.core[:-1]]
    if name.endswith("_b") and any(name[:-2] + end in beside for end in names.MATRIX_SUFFIXES):
        return Decision(None, f"bias '{name}'")
    is_low_rank = names.matches(names.FROM_LOW_RANK, name) or f"{name[:-1]}a" in beside
    is_bias = name.endswith("_b") and not is_low_rank and not _is_lora(leaf)
    if not (names.matches("b", name) and name[0] == "b") and not is_bias:
        return None
    if any(matrix in beside for matrix in ("w", "kernel", "weight", f"w{name[1:]}")):
        return Decision(None, f"bias '{name}'")
    if len(leaf.shape) < 2 or {"a", "A"} & beside or _is_lora(leaf):
        return None
    return Decision(None, f"bias '{name}'", "nothing beside it shows that it is a bias")


def _router(leaf: Leaf, evidence: Evidence) -> Decision | None:
    """A matrix of (inputs, experts) beside stacks or series of that number of experts."""
    for depth, name in enumerate(leaf.core):
        if names.matches(names.GATE, name) and _has_child(
            leaf.core[:depth], names.EXPERTS, evidence
        ):
            return Decision(None, f"router '{name}' beside experts")
    shape = evidence.stack_of(leaf).without(leaf.shape)
    if len(shape) < 2:
        return None
    is_inside = names.matches(names.MATRIX_NAMES, leaf.core[-1]) and len(leaf.core) > 1
    depth = len(leaf.core) - (2 if is_inside else 1)
    module, name = leaf.core[:depth], leaf.core[depth]
    is_gate = names.matches(names.GATE, name)
    if names.matches(names.INTO_HEADS, name):
        return None
    stacks = evidence.experts(module)
    orders = [(shape[-1], shape[-2])]
    if is_gate or is_inside:
        orders.append((shape[-2], shape[-1]))  # outputs first
    for count, inputs in orders:
        sides = stacks.get((shape[:-2], count), [])
        fitting = [pair for pair in sides if inputs in pair]
        if count > 1 and ((is_gate and sides) or len(fitting) > 1):
            return Decision(None, f"router '{name}' beside {len(sides)} stacks of {count} experts")
        if count > 1 and _has_series(module, count, evidence, any_name=is_gate):
            return Decision(None, f"router '{name}' beside {count} numbered modules")
    is_alone = is_gate and not _has_child(module, names.BESIDE_GATE, evidence)
    if is_alone and module and names.matches(names.MIXTURES, module[-1]):
        return Decision(None, f"router '{name}' of '{module[-1]}'")
    return None


def _is_gate_alone(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a gate is in a module that has no other projection that could be gated."""
    module, name = _kernels.module_and_name(leaf)
    is_gate = name.lower() in ("gate", "wg", "gating")
    return is_gate and not _has_child(module, names.BESIDE_GATE, evidence)


def _has_child(module: Path, pattern: str, evidence: Evidence) -> bool:
    return any(names.matches(pattern, child) for child in evidence.children[module])


def _has_series(module: Path, count: int, evidence: Evidence, *, any_name: bool) -> bool:
    """Returns whether a module has a list of `count` modules, or as many numbered ones.

    Unless any name will do, these are named as experts.
    """
    children = [c for c in evidence.children[module] if any_name or names.matches(names.EXPERTS, c)]
    series = [[c for c in children if names.is_numbered(c)]]
    series += [[*evidence.children.get((*module, child), ())] for child in children]
    return any(len(s) == count and all(map(names.is_numbered, s)) for s in series)


def _has_siblings(leaf: Leaf, evidence: Evidence, pattern: str) -> bool:
    depth = len(leaf.core) - len(names.near(leaf.core))
    return _has_child(leaf.core[:depth], pattern, evidence)


def _few_axes(leaf: Leaf, evidence: Evidence) -> Decision | None:
    """Vectors and scalars, also where a stack of layers adds an axis."""
    if len(leaf.shape) < 2:
        return Decision(None, "fewer than two axes")
    stack = evidence.stack_of(leaf)
    if len(stack.without(leaf.shape)) < 2:
        return Decision(None, "fewer than two axes in each layer of a stack")
    if not stack.known and len(leaf.shape) == 2 and (shared := evidence.shared_axis(leaf)):
        module, count = shared
        reason = f"stacked vector: {count} parameters of '{'/'.join(module)}' share the first axis"
        is_kernel = names.matches(names.MATRIX_NAMES, leaf.core[-1])
        doubt = f"all begin with {leaf.shape[0]}, but the name is a matrix's" if is_kernel else ""
        return Decision(None, reason, doubt)
    return None


def _depthwise(leaf: Leaf, evidence: Evidence) -> Decision | None:
    """A convolution with one input channel per group mixes no channels."""
    shape = evidence.stack_of(leaf).without(leaf.shape)
    if not any(names.matches(names.CONVOLUTION, name) for name in leaf.core):
        return _unnamed_depthwise(shape)
    one_input = len(shape) > 2 and 1 in (shape[-2], leaf.shape[-2])
    if len(shape) > 2 and shape[1] == 1 < shape[0]:  # outputs first: (channels, 1, *window)
        one_input |= _window_kernels.is_window(shape[2:], shape[:1])
    small, large = min(shape), max(shape)
    taps = len(shape) == 2 and small <= 8 and large >= _MUCH_LARGER * small
    if one_input or (taps and _kernels.is_convolution(leaf)):
        return Decision(None, "depthwise convolution", _doubt_one_input(leaf, evidence, shape))
    return None


def _doubt_one_input(leaf: Leaf, evidence: Evidence, shape: Shape) -> str:
    """A depthwise convolution has its channels from another layer, the first of gray images not."""
    is_image = len(shape) == 4 and shape[2] == 1
    if not is_image or evidence.puts_out(leaf, shape[-1]):
        return ""
    return f"no other parameter puts out {shape[-1]} channels: it may be the first convolution"


def _unnamed_depthwise(shape: Shape) -> Decision | None:
    """Finds a square window beside one input channel, on either end of the shape."""
    if len(shape) != 4 or 1 not in shape[1:3]:
        return None
    for window, channels in ((shape[:2], shape[2:]), (shape[2:], shape[1::-1])):
        if channels[0] == 1 and window[0] == window[1] > 1 and max(window) <= 11 < channels[1]:
            return Decision(None, "depthwise convolution")
    return None


_ADAMW_RULES = (_by_name, _short_bias, _router, _few_axes, _depthwise)
_MUON_RULES = (
    _head_kernels.by_layout,
    _orientation.by_bias,
    _head_kernels.attention,
    _window_kernels.convolution,
    _window_kernels.gated_pair,
    _orientation.last_two_axes,
)


def _checked(leaf: Leaf, evidence: Evidence, decision: Decision) -> Decision:
    """Turns matrices that are none to AdamW, and adds doubts about shapes."""
    if decision.numbers is None:
        return decision
    n_in, n_out, batch = _kernels.sizes(leaf.shape, decision.numbers)
    small, large = sorted((n_in, n_out))
    if small == 1:
        stacked = len(leaf.shape) > 2 and not evidence.stack_of(leaf).known
        several = sorted(leaf.shape)[-2] > 1 and names.matches(names.MATRIX_NAMES, leaf.core[-1])
        doubt = "its axis of size 1 may be a stack of one layer" if stacked and several else ""
        return Decision(None, "a side of 1", doubt)
    if _is_broadcast(leaf, evidence):
        return Decision(None, "a first axis of 1, as tables that are added have")
    if _may_be_a_head(leaf, evidence, n_in, n_out):
        doubt = "its outputs are as many as the embedding has rows"
        return Decision(None, f"output head: the vocabulary size {evidence.vocabulary}", doubt)
    if _is_dead_end(leaf, evidence, n_in, n_out):
        doubt = "its name does not show that it is the last layer"
        return Decision(None, f"output head: nothing has {n_out} inputs", doubt)
    if _is_long(leaf, small, large):
        return Decision(None, "output head", f"a side of {large} may be a vocabulary")
    if decision.doubt:
        return decision
    if 0 < small <= _SMALL_SIDE and large >= _MUCH_LARGER * small and not _is_lora(leaf):
        return decision._replace(doubt=f"its matrices have a side of {small}")
    known = evidence.stack_of(leaf).axes
    if _is_gate_alone(leaf, evidence):
        doubt = "nothing beside it shows whether it gates an MLP or routes to experts"
        return decision._replace(doubt=doubt)
    if _may_be_a_vector(leaf, evidence):
        return decision._replace(doubt=f"it may be a vector of each of {leaf.shape[0]} layers")
    repeated = max((n for axis, n in batch if axis not in known), default=0)
    tiny = repeated > large and small <= 64 and repeated >= 8
    if tiny or (repeated >= 64 and repeated > 4 * small):
        return decision._replace(doubt=f"these are {repeated} matrices of only {n_in} x {n_out}")
    return decision


def _may_be_a_head(leaf: Leaf, evidence: Evidence, n_in: int, n_out: int) -> bool:
    """Returns whether a matrix outside of the blocks has the vocabulary of the embedding as side.

    The width of the embedding may differ from that of the last layer, as in many RNNs.
    """
    width, vocabulary = evidence.embedded, evidence.vocabulary
    if len(leaf.shape) != 2 or width >= vocabulary:
        return False
    if any(names.matches(names.INTO_HEADS, name) for name in leaf.core):  # queries, keys or values
        return False
    if _is_top(leaf):
        return n_out == vocabulary or (n_in, n_out) == (vocabulary, width)
    # A head inside of a numbered layer, as in multi-token prediction.
    is_named = any(names.matches(r"(\w+_)?head", name) for name in leaf.core)
    return is_named and {n_in, n_out} == {width, vocabulary}


def _is_long(leaf: Leaf, small: int, large: int) -> bool:
    """Returns whether a matrix outside of the blocks has a side as long as a vocabulary."""
    is_long = large >= 16384 and large > 16 * small
    return len(leaf.shape) == 2 and is_long and _is_top(leaf)


def _is_top(leaf: Leaf) -> bool:
    """Returns whether a parameter is outside of the blocks, whatever the name of its module."""
    module, _ = _kernels.module_and_name(leaf)
    return not names.is_in_block(module)


def _is_dead_end(leaf: Leaf, evidence: Evidence, n_in: int, n_out: int) -> bool:
    """Returns whether a dense layer without a name of its own has outputs that nothing takes."""
    module, name = _kernels.module_and_name(leaf)
    if len(leaf.shape) != 2 or not names.matches(names.GENERIC, name):
        return False
    in_layer = any(map(names.is_numbered, module)) and not all(n.isdigit() for n in leaf.core)
    if in_layer or n_in == 0 or n_out % n_in == 0:
        return False
    if name == leaf.core[-1] and not _is_in_pair(leaf, evidence, n_out):
        return False
    return evidence.matrix_sizes[n_out] == 1 and evidence.sizes[n_in] > 1


def _is_in_pair(leaf: Leaf, evidence: Evidence, n_out: int) -> bool:
    """Returns whether a matrix without a name has its bias beside it, as in a list of layers."""
    *module, name = leaf.core
    beside = (evidence.by_core.get((*module, child)) for child in evidence.children[(*module,)])
    shapes = [x.shape for x in beside if x is not None]
    return bool(module) and name.isdigit() and (n_out,) in shapes


def _may_be_a_vector(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a parameter of two axes and no known name may be one of stacked layers."""
    if len(leaf.shape) != 2 or evidence.stack_of(leaf).known:
        return False
    if any(map(names.is_numbered, leaf.core)):
        return False
    name = names.stem(leaf.core[-1])
    known = f"{names.MATRIX_NAMES}|{names.FROM_RESIDUAL}|{names.TO_RESIDUAL}"
    heads = f"{names.INTO_HEADS}|{names.OUT_OF_HEADS}|{names.PERHAPS_OUT}"
    is_known = names.matches(known, name) or names.matches(heads, name) or _is_lora(leaf)
    return not is_known and any(names.matches(names.STACKS, n) for n in leaf.core[:-1])


def _is_broadcast(leaf: Leaf, evidence: Evidence) -> bool:
    is_kernel = names.matches(names.MATRIX_NAMES, leaf.core[-1])
    leads = len(leaf.shape) == 3 and leaf.shape[0] == 1 and not evidence.stack_of(leaf).axes
    if not leads or is_kernel or _kernels.is_convolution(leaf) or _is_lora(leaf):
        return False
    # A stack of one layer or one expert.
    heads = f"{names.INTO_HEADS}|{names.OUT_OF_HEADS}|{names.EXPERTS}|{names.STACKS}"
    known = f"{names.FROM_RESIDUAL}|{names.TO_RESIDUAL}|{heads}"
    return not any(names.matches(known, names.stem(name)) for name in leaf.core)


def _is_lora(leaf: Leaf) -> bool:
    return any("lora" in name.lower() for name in leaf.core)

"""Which parameter goes to Muon, along which axes, and which to AdamW: one small function per rule.

The rules are tried in order; the first that applies decides. Each gives its reason, which the table
prints, and a doubt where it rests on a weak guess, which becomes a warning.
"""

from collections.abc import Sequence

from muonclip_jax import _head_kernels, _kernels, _role_names as names, _window_kernels
from muonclip_jax._evidence import Evidence, Leaf, Path, Shape
from muonclip_jax._kernels import DEFAULTS, Decision, Settings

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
    evidence.convention = _kernels.find_convention(evidence)
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
    if role.name == "norm" and _kernels.is_matrix_of_adaptive_norm(leaf, evidence, name):
        return None
    doubt = ""
    if role.name == "embedding" and _kernels.has_fitting_bias(leaf, evidence):
        if not any(names.matches(names.PATCHES, n) for n in leaf.core):
            doubt = f"'{name}' names an embedding, but the bias beside it is that of a dense layer"
    if role.where == "top" and _has_siblings(leaf, evidence, names.INTO_HEADS):
        return None
    return Decision(None, f"{role.name} '{name}'", doubt)


def _short_bias(leaf: Leaf, evidence: Evidence) -> Decision | None:
    """`b` beside `w` or `kernel` is a bias, as in Haiku; LoRA has matrices `a` and `b`."""
    if not names.matches("b", leaf.core[-1]) or leaf.core[-1][0] != "b":
        return None
    beside = evidence.children[leaf.core[:-1]]
    if not any(name in beside for name in ("w", "kernel", "weight", f"w{leaf.core[-1][1:]}")):
        return None
    return Decision(None, f"bias '{leaf.core[-1]}'")


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
    module, name = (leaf.core[:-2], leaf.core[-2]) if is_inside else (leaf.core[:-1], leaf.core[-1])
    is_gate = names.matches(names.GATE, name)
    if names.matches(names.INTO_HEADS, name):
        return None
    stacks = evidence.experts(module)
    for count, inputs in ((shape[-1], shape[-2]), (shape[-2], shape[-1])):
        sides = stacks.get((shape[:-2], count), [])
        fitting = [pair for pair in sides if inputs in pair]
        if count > 1 and ((is_gate and sides) or len(fitting) > 1):
            return Decision(None, f"router '{name}' beside {len(sides)} stacks of {count} experts")
        if count > 1 and is_gate and _has_series(module, count, evidence):
            return Decision(None, f"router '{name}' beside {count} numbered modules")
    return None


def _has_child(module: Path, pattern: str, evidence: Evidence) -> bool:
    return any(names.matches(pattern, child) for child in evidence.children[module])


def _has_series(module: Path, count: int, evidence: Evidence) -> bool:
    """Returns whether a module has a list of `count` modules, or as many numbered ones."""
    children = evidence.children[module]
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
    if not any(names.matches(names.CONVOLUTION, name) for name in leaf.core):
        return None
    shape = evidence.stack_of(leaf).without(leaf.shape)
    one_input = len(shape) > 2 and 1 in (shape[-2], leaf.shape[-2], shape[1])
    small, large = min(shape), max(shape)
    taps = len(shape) == 2 and small <= 8 and large >= _MUCH_LARGER * small
    if one_input or (taps and _is_convolution(leaf)):
        return Decision(None, "depthwise convolution")
    return None


def _is_convolution(leaf: Leaf) -> bool:
    return any(names.matches(names.CONVOLUTION, name) for name in leaf.core[-2:])


_ADAMW_RULES = (_by_name, _short_bias, _router, _few_axes, _depthwise)
_MUON_RULES = (
    _kernels.by_bias,
    _head_kernels.attention,
    _window_kernels.convolution,
    _window_kernels.gated_pair,
    _kernels.last_two_axes,
)


def _checked(leaf: Leaf, evidence: Evidence, decision: Decision) -> Decision:
    """Turns matrices that are none to AdamW, and adds doubts about shapes."""
    if decision.numbers is None:
        return decision
    n_in, n_out, batch = _kernels.sizes(leaf.shape, decision.numbers)
    small, large = sorted((n_in, n_out))
    if small == 1:
        return Decision(None, "a side of 1")
    if _may_be_a_head(leaf, evidence, (small, large)):
        doubt = "its sides are the width and the vocabulary size of the embedding"
        return Decision(None, f"output head: an axis of the vocabulary size {large}", doubt)
    if decision.doubt:
        return decision
    if 0 < small <= _SMALL_SIDE and large >= _MUCH_LARGER * small and not _is_lora(leaf):
        return decision._replace(doubt=f"its matrices have a side of {small}")
    known = evidence.stack_of(leaf).axes
    repeated = [n for axis, n in batch if axis not in known]
    if repeated and max(repeated) > large and small <= 64 and max(repeated) >= 8:
        doubt = f"{max(repeated)} matrices of only {n_in} x {n_out}"
        return decision._replace(doubt=doubt)
    return decision


def _may_be_a_head(leaf: Leaf, evidence: Evidence, sides: tuple[int, int]) -> bool:
    sizes = (evidence.embedded, evidence.vocabulary)
    is_top = not names.is_in_block(leaf.core[:-1])
    return len(leaf.shape) == 2 and sides == sizes and sizes[0] < sizes[1] and is_top


def _is_lora(leaf: Leaf) -> bool:
    return any("lora" in name.lower() for name in leaf.core)

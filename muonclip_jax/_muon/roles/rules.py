"""The order of the rules, and the doubts about what they decide.

The first rule that applies decides. Its decision has a reason, which the table prints, and a doubt
if names and shapes leave it open. A doubt becomes a warning.
"""

from collections.abc import Sequence

from muonclip_jax._muon.roles import (
    adamw_rules,
    attention,
    biases,
    convolutions,
    gates,
    heads,
    names,
    orientation,
)
from muonclip_jax._muon.roles.decision import DEFAULTS, Decision, RoleSettings
from muonclip_jax._muon.roles.evidence import Evidence
from muonclip_jax._muon.roles.kernels import has_transposed, sizes
from muonclip_jax._muon.roles.modules import Leaf, Path, Shape, is_tiny

_ADAMW_RULES = (
    adamw_rules.by_name,
    adamw_rules.short_bias,
    adamw_rules.state_space,
    adamw_rules.noise,
    adamw_rules.per_head,
    adamw_rules.router,
    adamw_rules.few_axes,
    convolutions.depthwise,
)
_MUON_RULES = (
    attention.by_layout,
    convolutions.transposed,
    biases.by_bias,
    attention.in_pair,
    attention.with_heads,
    convolutions.local,
    convolutions.convolution,
    gates.gates_of_a_cell,
    gates.gated_pair,
    orientation.beside_heads,
    gates.few_between,
    orientation.last_two_axes,
)


def decide(
    paths: Sequence[Path], shapes: Sequence[Shape], settings: RoleSettings = DEFAULTS
) -> list[Decision]:
    """Decides for each parameter of a pytree.

    Args:
      paths: Components of the path of each parameter.
      shapes: Its shape.
      settings: The settings of the user.

    Returns:
      One decision for each parameter.

    Example:
      >>> [d.reason for d in decide([("up", "kernel"), ("up", "bias")], [(4, 16), (16,)])]
      ['last two axes', "bias 'bias'"]
    """
    evidence = Evidence(paths, shapes)
    evidence.convention = orientation.find_convention(evidence)
    evidence.has_kernels = orientation.find_kernels(evidence)
    return [_decide(leaf, evidence, settings) for leaf in evidence.leaves]


def _decide(leaf: Leaf, evidence: Evidence, settings: RoleSettings) -> Decision:
    for rule in _ADAMW_RULES:
        if decision := rule(leaf, evidence):
            return decision
    found = ((rule, rule(leaf, evidence, settings)) for rule in _MUON_RULES)
    rule, decision = next((rule, decision) for rule, decision in found if decision)
    if decision.numbers is None:
        return decision
    n_in, n_out, batch = sizes(leaf.shape, decision.numbers)
    if other := _table_or_head(leaf, evidence, n_in, n_out):
        return other
    if decision.doubt:
        return decision
    doubt = _doubt_sizes(leaf, evidence, n_in, n_out, batch)
    if not doubt and rule is orientation.last_two_axes:
        doubt = orientation.doubt_raw(leaf, evidence)
    return decision._replace(doubt=doubt)


def _table_or_head(leaf: Leaf, evidence: Evidence, n_in: int, n_out: int) -> Decision | None:
    """Assigns to AdamW what has two axes or more and is no matrix, or an output head."""
    if min(n_in, n_out) == 1:
        stacked = len(evidence.layer_of(leaf)[1]) > 2
        several = sorted(leaf.shape)[-2] > 1 and names.matches(names.MATRIX_NAMES, leaf.core[-1])
        doubt = "its axis of size 1 may number heads or layers" if stacked and several else ""
        return Decision(None, "a side of 1", doubt)
    if _is_broadcast(leaf, evidence) and not _is_stack_of_one(leaf, evidence):
        doubt = "it has the sides of a matrix beside it" if has_transposed(leaf, evidence) else ""
        return Decision(None, "a first axis of 1, as tables that are added have", doubt)
    return heads.output_head(leaf, evidence, n_in, n_out)


def _doubt_sizes(
    leaf: Leaf, evidence: Evidence, n_in: int, n_out: int, batch: Sequence[tuple[int, int]]
) -> str:
    """Doubts matrices that are tiny, or that may be gates or vectors."""
    small, large = sorted((n_in, n_out))
    if is_tiny(n_in, n_out) and not leaf.is_lora:
        return f"its matrices have a side of {small}"
    if leaf.is_inside and names.matches(names.NOISE, leaf.name):
        return f"'{leaf.name}' may scale noise, element by element"
    if leaf.core[-1] == "A" and "B" not in evidence.children[leaf.core[:-1]]:
        return "in a state-space layer, 'A' acts on each channel alone"
    is_u = leaf.core[-1].lower() == "u" and len(evidence.layer_of(leaf)[1]) == 2
    if is_u and not has_transposed(leaf, evidence):
        return "in RWKV, 'u' is a vector for each head"
    if leaf.name.lower() in ("gate", "wg", "gating") and not has_transposed(leaf, evidence):
        if not evidence.has_child(leaf.module, names.BESIDE_GATE):
            return "nothing beside it shows whether it gates an MLP or routes to experts"
    if doubt := convolutions.doubt_groups(leaf, evidence):
        return doubt
    if doubt := heads.doubt(leaf, evidence, n_in, n_out):
        return doubt
    is_batch = any((n, len(leaf.shape) - axis) == (1, 3) for axis, n in batch)
    if is_batch and _is_doubtful_stack_of_one(leaf, evidence):
        return "its first axis of 1 may be for broadcasting, as of tables that are added"
    if _may_be_a_vector(leaf, evidence):
        return f"it may be one vector for each of {leaf.shape[0]} layers"
    known = evidence.stack_of(leaf).axes
    repeated = max((n for axis, n in batch if axis not in known), default=0)
    tiny = repeated > large and small <= 64 and repeated >= 8
    if tiny or (repeated >= 64 and repeated > 4 * small):
        return f"these are {repeated} matrices of only {n_in} x {n_out}"
    return ""


def _may_be_a_vector(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a parameter of two axes and no known name may be one of stacked layers."""
    if len(leaf.shape) != 2 or evidence.stack_of(leaf).known:
        return False
    if any(map(names.is_numbered, leaf.core)):
        return False
    name = names.stem(leaf.core[-1])
    known = (names.MATRIX_NAMES, *names.PROJECTIONS, names.PERHAPS_OUT)
    is_known = any(names.matches(pattern, name) for pattern in known) or leaf.is_lora
    in_stack = any(names.matches(names.STACKS, n) for n in leaf.core[:-1])
    return not is_known and (in_stack or evidence.same_first_axis(leaf) is not None)


def _is_broadcast(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a first axis of 1 in each layer may be for broadcasting."""
    shape = evidence.layer_of(leaf)[1]
    if len(shape) != 3 or shape[0] != 1 or leaf.is_lora:
        return False
    is_kernel = names.matches(names.MATRIX_NAMES, leaf.core[-1])
    return not is_kernel and not convolutions.is_named_convolution(leaf)


def _is_stack_of_one(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a first axis of 1 in each layer may number layers or experts.

    `layers` may be a stack of layers; `layers_0` and `layers/0` are one layer.
    """
    if _has_name_of_matrix(leaf) or names.matches(names.STACKS, leaf.name):
        return True
    return not evidence.stack_of(leaf).axes and names.is_stacked(leaf.core)


def _has_name_of_matrix(leaf: Leaf) -> bool:
    known = (*names.PROJECTIONS, names.EXPERTS)
    parts = [names.stem(name) for name in leaf.core]
    return any(names.matches(pattern, part) for part in parts for pattern in known)


def _is_doubtful_stack_of_one(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether only its own name shows that a first axis of 1 is not for broadcasting."""
    if not _is_broadcast(leaf, evidence) or leaf.has(names.EXPERTS):
        return False
    if not evidence.stack_of(leaf).axes and names.is_stacked(leaf.core):
        return False
    beside = (evidence.layer_of(x)[1] for x in evidence.beside(leaf) if _has_name_of_matrix(x))
    return not any(len(shape) == 3 and shape[0] == 1 for shape in beside)

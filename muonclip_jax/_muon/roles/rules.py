"""The order of the rules, and the doubts about what they decide.

The first rule that applies decides. Its decision has a reason, which the table prints, and a doubt
if names and shapes leave it open. A doubt becomes a warning.
"""

from collections.abc import Sequence

from muonclip_jax._muon.roles import adamw_rules, attention, convolutions, names, orientation
from muonclip_jax._muon.roles.decision import DEFAULTS, Decision, RoleSettings
from muonclip_jax._muon.roles.evidence import Evidence
from muonclip_jax._muon.roles.kernels import sizes
from muonclip_jax._muon.roles.modules import Leaf, Path, Shape

_ADAMW_RULES = (
    adamw_rules.by_name,
    adamw_rules.short_bias,
    adamw_rules.state_space,
    adamw_rules.router,
    adamw_rules.few_axes,
    convolutions.depthwise,
)
_MUON_RULES = (
    attention.by_layout,
    orientation.by_bias,
    attention.in_pair,
    attention.with_heads,
    convolutions.convolution,
    orientation.gated_pair,
    orientation.last_two_axes,
)
# A side this short is doubted if the other one is `_MUCH_LARGER` times as long.
_SMALL_SIDE, _MUCH_LARGER = 4, 8
# A side this long, and this many times longer than the other one, may be a vocabulary.
_VOCABULARY, _VOCABULARY_RATIO = 16384, 16


def decide(
    paths: Sequence[Path], shapes: Sequence[Shape], settings: RoleSettings = DEFAULTS
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
    evidence.convention = orientation.find_convention(evidence)
    return [_decide(leaf, evidence, settings) for leaf in evidence.leaves]


def _decide(leaf: Leaf, evidence: Evidence, settings: RoleSettings) -> Decision:
    for rule in _ADAMW_RULES:
        if decision := rule(leaf, evidence):
            return decision
    found = (rule(leaf, evidence, settings) for rule in _MUON_RULES)
    decision = next(filter(None, found))
    if decision.numbers is None:
        return decision
    n_in, n_out, batch = sizes(leaf.shape, decision.numbers)
    if other := _table_or_head(leaf, evidence, n_in, n_out):
        return other
    if decision.doubt:
        return decision
    return decision._replace(doubt=_doubt_sizes(leaf, evidence, n_in, n_out, batch))


def _table_or_head(leaf: Leaf, evidence: Evidence, n_in: int, n_out: int) -> Decision | None:
    """Assigns to AdamW what has two axes or more and is no matrix, or an output head."""
    small, large = sorted((n_in, n_out))
    if small == 1:
        stacked = len(evidence.layer_of(leaf)[1]) > 2
        several = sorted(leaf.shape)[-2] > 1 and names.matches(names.MATRIX_NAMES, leaf.core[-1])
        doubt = "its axis of size 1 may number heads or layers" if stacked and several else ""
        return Decision(None, "a side of 1", doubt)
    if _is_broadcast(leaf, evidence):
        return Decision(None, "a first axis of 1, as tables that are added have")
    if _may_be_a_head(leaf, evidence, n_in, n_out):
        is_head = n_out == evidence.vocabulary and _is_last(leaf, evidence)
        doubt = "" if is_head or leaf.has(names.HEAD) else "no name confirms it"
        return Decision(None, f"output head: the vocabulary size {evidence.vocabulary}", doubt)
    if _is_dead_end(leaf, evidence, n_in, n_out):
        is_named = leaf.has(names.HEAD) or leaf.has(names.PREDICTOR)
        is_head = (evidence.is_root(leaf.module) or is_named) and _is_last(leaf, evidence)
        is_head &= not _is_left_alone(leaf, evidence) and not _is_widening(n_in, n_out)
        doubt = "" if is_head else "no name confirms it"
        return Decision(None, f"output head: nothing has {n_out} inputs", doubt)
    if _is_in_last_layer(leaf, evidence) and n_in != n_out:
        return Decision(None, f"output head '{leaf.module[-1]}'")
    is_long = large >= _VOCABULARY and large > _VOCABULARY_RATIO * small
    if is_long and len(leaf.shape) == 2 and _is_outside_blocks(leaf):
        return Decision(None, "output head", f"a side of {large} may be a vocabulary")
    return None


def _doubt_sizes(
    leaf: Leaf, evidence: Evidence, n_in: int, n_out: int, batch: Sequence[tuple[int, int]]
) -> str:
    """Doubts matrices that are tiny, or that may be gates or vectors."""
    small, large = sorted((n_in, n_out))
    if 0 < small <= _SMALL_SIDE and large >= _MUCH_LARGER * small and not leaf.is_lora:
        return f"its matrices have a side of {small}"
    if leaf.name.lower() in ("gate", "wg", "gating"):
        if not evidence.has_child(leaf.module, names.BESIDE_GATE):
            return "nothing beside it shows whether it gates an MLP or routes to experts"
    if _may_be_a_vector(leaf, evidence):
        return f"it may be one vector for each of {leaf.shape[0]} layers"
    known = evidence.stack_of(leaf).axes
    repeated = max((n for axis, n in batch if axis not in known), default=0)
    tiny = repeated > large and small <= 64 and repeated >= 8
    if tiny or (repeated >= 64 and repeated > 4 * small):
        return f"these are {repeated} matrices of only {n_in} x {n_out}"
    return ""


def _may_be_a_head(leaf: Leaf, evidence: Evidence, n_in: int, n_out: int) -> bool:
    """Returns whether a matrix outside of the blocks has the vocabulary of the embedding as side.

    The width of the embedding may differ from the width of the last layer, as in many RNNs.
    """
    width, vocabulary = evidence.embedded, evidence.vocabulary
    if len(leaf.shape) > 3 or len(evidence.stack_of(leaf).without(leaf.shape)) < len(leaf.shape):
        return False
    if leaf.has(names.INTO_HEADS):  # queries, keys or values
        return False
    is_reversed = (n_in, n_out) == (width, vocabulary)
    is_like = is_reversed or ((n_in, n_out) == (vocabulary, width) and width < vocabulary)
    if len(leaf.shape) == 3:  # one for each device
        return is_reversed and width < vocabulary and _is_outside_blocks(leaf)
    if _is_outside_blocks(leaf):
        return is_like or (n_out == vocabulary and width < vocabulary)
    # A head inside of a numbered layer, as in multi-token prediction.
    is_last = names.matches(rf"{names.GENERIC}|readout", leaf.name)
    return is_like and (leaf.has(names.HEAD) or is_last)


def _is_outside_blocks(leaf: Leaf) -> bool:
    """Returns whether a parameter is outside of the blocks, for any name of its own module."""
    return not names.is_in_block(leaf.module)


def _is_dead_end(leaf: Leaf, evidence: Evidence, n_in: int, n_out: int) -> bool:
    """Returns whether a dense layer without a name of its own has outputs that nothing reads."""
    if len(leaf.shape) != 2 or not names.matches(names.GENERIC, leaf.name):
        return False
    in_layer = any(map(names.is_numbered, leaf.module)) and not all(n.isdigit() for n in leaf.core)
    in_layer &= not names.matches(names.PREDICTOR, leaf.module[-1] if leaf.module else "")
    if in_layer or n_in == 0 or evidence.matrix_sizes[n_out] > 1:
        return False
    if _is_widening(n_in, n_out) and not (leaf.is_inside and _is_last_of_all(leaf, evidence)):
        return False
    if leaf.name == leaf.core[-1] and not _is_beside_bias(leaf, evidence, n_out):
        return False
    return evidence.sizes[n_in] > 1 or _is_left_alone(leaf, evidence)


def _is_widening(n_in: int, n_out: int) -> bool:
    """Returns whether the outputs are a few times the inputs, as in hidden layers."""
    return n_out % n_in == 0 and n_out <= _VOCABULARY_RATIO * n_in


def _is_last_of_all(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a generic layer is the last outside of all modules with several matrices."""
    others = [x for x in evidence.leaves if len(x.shape) > 1 and x.module != leaf.module]
    return evidence.is_root(leaf.module) and len(others) > 1 and _is_last(leaf, evidence)


def _is_in_last_layer(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a matrix is the last one of a module `final_layer` of the full model."""
    if not leaf.module or not names.matches(names.LAST_LAYER, leaf.module[-1]):
        return False
    is_root = evidence.is_root(leaf.module[:-1])
    return is_root and len(leaf.shape) == 2 and leaf.is_inside and _is_last(leaf, evidence)


def _is_left_alone(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether the layers before a dense layer seem to be hidden from the optimizer.

    Either its series has gaps, as `Dense_1` without `Dense_0`, or nothing else has two axes.
    """
    has_gap = False
    if not leaf.name.isdigit():  # lists have gaps at activations
        numbers = {names.number(child) for child in _series(leaf, evidence)}
        has_gap = not {*range(1, max(numbers))} <= numbers or numbers == {1}
    matrices = [x for x in evidence.leaves if len(x.shape) > 1]
    return has_gap or (len(matrices) == 1 and evidence.bias_of(leaf) is not None)


def _series(leaf: Leaf, evidence: Evidence) -> list[str]:
    """Lists the modules beside a parameter whose names differ from its own in the number alone."""
    stem = names.without_number(leaf.core[len(leaf.module)])
    children = evidence.children[leaf.module]
    return [child for child in children if names.without_number(child) == stem]


def _is_last(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a layer with a generic name, such as `Dense_2`, is the last of its series."""
    if not names.matches(names.GENERIC, leaf.name):
        return False
    return max(_series(leaf, evidence), key=names.number) == leaf.core[len(leaf.module)]


def _is_beside_bias(leaf: Leaf, evidence: Evidence, n_out: int) -> bool:
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
    known = (names.MATRIX_NAMES, *names.PROJECTIONS, names.PERHAPS_OUT)
    is_known = any(names.matches(pattern, name) for pattern in known) or leaf.is_lora
    return not is_known and any(names.matches(names.STACKS, n) for n in leaf.core[:-1])


def _is_broadcast(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a first axis of 1 is for broadcasting, not a stack of one layer or expert."""
    is_kernel = names.matches(names.MATRIX_NAMES, leaf.core[-1])
    leads = len(leaf.shape) == 3 and leaf.shape[0] == 1 and not evidence.stack_of(leaf).axes
    if not leads or is_kernel or convolutions.is_named_convolution(leaf) or leaf.is_lora:
        return False
    known = (*names.PROJECTIONS, names.EXPERTS, names.STACKS)
    return not any(
        names.matches(pattern, names.stem(name)) for name in leaf.core for pattern in known
    )

"""Output heads: by the vocabulary, by outputs that nothing reads, by their place in the pytree."""

from muonclip_jax._muon.roles import names
from muonclip_jax._muon.roles.decision import Decision
from muonclip_jax._muon.roles.evidence import Evidence
from muonclip_jax._muon.roles.modules import Leaf

# A side this long, and this many times longer than the other one, may be a vocabulary.
_VOCABULARY, _VOCABULARY_RATIO = 16384, 16
# How many times longer than wide a table is, at least, if a head beside it is its transpose.
_TABLE_RATIO = 4
# More matrices of one shape than this are hidden.
_MOST_HEADS = 3
# The width of the narrowest model in which single matrices are doubted by their place alone.
_NARROWEST = 32


def output_head(leaf: Leaf, evidence: Evidence, n_in: int, n_out: int) -> Decision | None:
    """Assigns output heads without a name of their own to AdamW; doubts what no name confirms."""
    small, large = sorted((n_in, n_out))
    if _has_vocabulary(leaf, evidence, n_in, n_out):
        is_head = n_out == evidence.vocabulary and _is_last(leaf, evidence)
        is_head &= not _is_head_named(evidence)
        doubt = "" if is_head or leaf.has(names.HEAD) else _UNNAMED
        return Decision(None, f"output head: the vocabulary size {evidence.vocabulary}", doubt)
    is_last_of_head = _is_last_of_head(leaf, evidence) and small < large
    if is_last_of_head and not _is_before_table(leaf, evidence, n_out):
        is_doubtful = _is_widening(n_in, n_out) or n_out == evidence.embedded
        doubt = _UNNAMED if is_doubtful else ""
        return Decision(None, "output head: the last layer of a head", doubt)
    if _is_dead_end(leaf, evidence, n_in, n_out):
        is_named = leaf.has(names.HEAD) or leaf.has(names.PREDICTOR)
        is_head = is_named and _is_last(leaf, evidence)
        is_head &= not _is_left_alone(leaf, evidence) and not _is_widening(n_in, n_out)
        doubt = "" if is_head else _UNNAMED
        return Decision(None, f"output head: nothing has {n_out} inputs", doubt)
    if _is_in_last_layer(leaf, evidence) and n_in != n_out:
        return Decision(None, f"output head '{leaf.module[-1]}'")
    if names.matches(names.READOUT, leaf.name) and len(leaf.shape) == 2:
        return Decision(None, f"output head '{leaf.name}'", _UNNAMED)
    is_long = large >= _VOCABULARY and large > _VOCABULARY_RATIO * small
    if is_long and len(leaf.shape) == 2 and _is_outside_blocks(leaf):
        return Decision(None, "output head", f"a side of {large} may be a vocabulary")
    return None


_UNNAMED = "no name confirms it"


def doubt(leaf: Leaf, evidence: Evidence, n_in: int, n_out: int) -> str:
    """Doubts that a matrix is hidden, if its place in the pytree suggests an output head."""
    if len(leaf.shape) != 2:
        return ""
    if evidence.has_child(leaf.module, names.INTO_HEADS):
        return _doubt_ends(leaf, evidence, n_in, n_out)
    last = f"'{leaf.core[len(leaf.module)]}' is the last of its series"
    if _is_unread_in_layer(leaf, evidence, n_in, n_out):
        return f"{last} and nothing has {n_out} inputs, so that it may be an output head"
    if _is_last_of_network(leaf, evidence):
        return f"{last} and no name shows an output head, so that it may be one"
    is_inside = any(names.matches(names.ENDS, name) for name in leaf.module)
    if is_inside and n_in != n_out and _is_last_of_many(leaf, evidence) and _is_outside(leaf):
        return f"{last} in '{'/'.join(leaf.module)}', so that it may be an output head"
    if names.matches(names.OUTPUT, leaf.name) and n_in != n_out and _is_outside_blocks(leaf):
        return f"'{leaf.name}' is outside of all blocks, so that it may be an output head"
    return _doubt_ends(leaf, evidence, n_in, n_out)


def _doubt_ends(leaf: Leaf, evidence: Evidence, n_in: int, n_out: int) -> str:
    """Doubts a matrix beside all blocks that may be a table of embeddings or an output head.

    No other matrix has one of its sides, except for the transposed one, as a table and a head are.
    """
    if n_in == n_out or leaf.is_lora or not _is_at_root(leaf, evidence):
        return ""
    pair = leaf.shape[::-1] if max(n_in, n_out) >= _TABLE_RATIO * min(n_in, n_out) else None
    matrices = [x.shape for x in evidence.leaves if len(x.shape) > 1 and x.shape != leaf.shape]
    others = {n for shape in matrices if shape != pair for n in shape}
    read = others | ({min(n_in, n_out)} if pair in matrices else set())
    is_several = sum(x.shape == leaf.shape for x in evidence.leaves) > _MOST_HEADS
    if is_several or max(leaf.shape) < _NARROWEST:
        return ""
    is_dense = evidence.bias_of(leaf) is not None or leaf.core[-1].endswith(names.MATRIX_SUFFIXES)
    is_dense |= leaf.core[-1] in ("kernel", "kernel_mu", "w", "weights")
    is_hidden = _is_widening(n_in, n_out) and (is_dense or leaf.is_inside or pair not in matrices)
    is_hidden |= _is_known(leaf, names.INTO_HEADS, names.COMPUTED)
    is_hidden |= n_in < n_out and _is_known(leaf, names.FROM_RESIDUAL)
    if n_out not in read and others and (n_in in others or n_out < n_in) and not is_hidden:
        return f"nothing else has {n_out} inputs, so that it may be an output head"
    is_known = _is_known(leaf, *names.PROJECTIONS, names.COMPUTED, names.PATCHES)
    is_dense |= is_known and n_in < _VOCABULARY_RATIO * n_out
    if n_in not in read and n_out in others and not is_dense:
        return f"nothing else has {n_in} outputs, so that it may be a table of embeddings"
    return ""


def _is_at_root(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a matrix, or a module that has no other, is beside the blocks of a model."""
    module = leaf.module
    if evidence.is_root(module):
        return True
    group = (evidence.leaves[i].shape for i in evidence.groups[module].leaves)
    is_only = sum(len(shape) > 1 for shape in group) == 1
    return is_only and not names.is_in_block(module) and evidence.is_root(module[:-1])


def _is_known(leaf: Leaf, *patterns: str) -> bool:
    own = (leaf.name, leaf.core[-1])
    return any(names.matches(pattern, name) for pattern in patterns for name in own)


def _has_vocabulary(leaf: Leaf, evidence: Evidence, n_in: int, n_out: int) -> bool:
    """Returns whether a matrix outside of the blocks has the vocabulary of the embedding as side.

    The width of the embedding may differ from the width of the last layer, as in many RNNs.
    """
    width, vocabulary = evidence.embedded, evidence.vocabulary
    if len(leaf.shape) > 3 or len(evidence.stack_of(leaf).without(leaf.shape)) < len(leaf.shape):
        return False
    if leaf.has(names.INTO_HEADS) or _is_in_attention_or_mlp(leaf, evidence):
        return False
    is_reversed = (n_in, n_out) == (width, vocabulary)
    is_like = is_reversed or ((n_in, n_out) == (vocabulary, width) and width < vocabulary)
    if len(leaf.shape) == 3:  # one for each device
        return is_reversed and width < vocabulary and _is_outside_blocks(leaf)
    if _is_outside_blocks(leaf):
        return is_like or (n_out == vocabulary and width < vocabulary)
    # A head inside of a numbered layer, as in multi-token prediction.
    is_last = names.matches(rf"{names.GENERIC}|{names.READOUT}", leaf.name)
    return is_like and (leaf.has(names.HEAD) or (is_last and not _is_head_named(evidence)))


def _is_in_attention_or_mlp(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether names beside a matrix show that it ends attention or is a half of an MLP.

    With bytes as tokens, the width or the hidden width often equals the vocabulary.
    """
    module, name = leaf.module, leaf.name
    if names.matches(f"{names.PERHAPS_OUT}|{names.OUT_OF_HEADS}", name):
        if evidence.has_child(module, names.INTO_HEADS):
            return True
    halves = (names.FROM_RESIDUAL, names.TO_RESIDUAL)
    return any(
        names.matches(one, name) and evidence.has_child(module, other)
        for one, other in (halves, halves[::-1])
    )


def _is_head_named(evidence: Evidence) -> bool:
    """Returns whether a parameter with the vocabulary as a side is an output head by its name."""
    return any(
        leaf.role is not None
        and leaf.role[0].name == "output head"
        and evidence.vocabulary in leaf.shape[-2:]
        for leaf in evidence.leaves
    )


def _is_outside_blocks(leaf: Leaf) -> bool:
    """Returns whether a parameter is outside of the blocks, for any name of its own module."""
    return not names.is_in_block(leaf.module)


def _is_outside(leaf: Leaf) -> bool:
    """Returns whether a parameter is outside of numbered modules."""
    return not any(map(names.is_numbered, leaf.module))


def _is_last_of_head(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a matrix is the last layer below a head, as in `medusa_heads/0/out`."""
    if len(leaf.shape) != 2 or not _is_last(leaf, evidence):
        return False
    depths = [d for d, name in enumerate(leaf.module) if names.matches(names.HEAD, name)]
    if not depths or names.is_in_block(leaf.module[: depths[-1]]):
        return False
    below = leaf.module[depths[-1] + 1 :]
    return not below or (len(below) == 1 and below[0].isdigit())


def _is_before_table(leaf: Leaf, evidence: Evidence, n_out: int) -> bool:
    """Returns whether the head ends in the table of embeddings, as in BERT and ALBERT.

    The table has no parameter in the head, but its bias, or a norm before it.
    """
    group = evidence.groups[leaf.module]
    vectors = {evidence.leaves[i].shape for i in group.leaves}
    return n_out == evidence.embedded and ((evidence.vocabulary,) in vectors or bool(group.gains))


def _is_dead_end(leaf: Leaf, evidence: Evidence, n_in: int, n_out: int) -> bool:
    """Returns whether a dense layer without a name of its own has outputs that nothing reads."""
    if len(leaf.shape) != 2 or not names.matches(names.GENERIC, leaf.name):
        return False
    if _is_in_layer(leaf, evidence) or n_in == 0 or not _is_unread(leaf, evidence, n_in, n_out):
        return False
    if _is_widening(n_in, n_out) and not (leaf.is_inside and _is_last_of_all(leaf, evidence)):
        return False
    if leaf.name == leaf.core[-1] and not _is_beside_bias(leaf, evidence, n_out):
        return False
    return evidence.sizes[n_in] > 1 or _is_left_alone(leaf, evidence)


def _is_unread(leaf: Leaf, evidence: Evidence, n_in: int, n_out: int) -> bool:
    """Returns whether no matrix but layers beside it of the same sizes has its outputs as side."""
    parallel = 0
    if n_in != n_out and leaf.is_inside:
        named = (x for x in evidence.beside(leaf) if names.matches(names.GENERIC, x.name))
        parallel = sum(x.shape == leaf.shape for x in named)
    return evidence.matrix_sizes[n_out] <= 1 + parallel


def _is_in_layer(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a parameter is in a numbered layer that is no predictor.

    A module of all parameters, such as `QNetwork_0`, is the network, and no layer.
    """
    depth = 0
    while depth < len(leaf.module) and evidence.is_root(leaf.module[: depth + 1]):
        depth += 1
    is_numbered = any(map(names.is_numbered, leaf.module[depth:]))
    is_numbered &= not all(name.isdigit() for name in leaf.core)
    return is_numbered and not names.matches(
        names.PREDICTOR, leaf.module[-1] if leaf.module else ""
    )


def _is_unread_in_layer(leaf: Leaf, evidence: Evidence, n_in: int, n_out: int) -> bool:
    """Returns whether the last of a series in a numbered layer has outputs that nothing reads."""
    if not _is_in_layer(leaf, evidence) or not leaf.is_inside:
        return False
    if not _is_unread(leaf, evidence, n_in, n_out):
        return False
    return n_out < n_in and _is_last_of_many(leaf, evidence) and not leaf.is_lora


def _is_last_of_network(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether the full model is a series of layers, none of them a head, and this is last.

    Beside the series there may be convolutions and tables.
    """
    if not leaf.is_inside or not evidence.is_root(leaf.module):
        return False
    if not _is_last_of_many(leaf, evidence):
        return False
    series = _series(leaf, evidence)
    others = (x for x in evidence.leaves if len(x.shape) > 1 and x is not leaf)
    return all(
        (x.module == leaf.module and x.core[len(x.module)] in series)
        or x.has(names.CONVOLUTION)
        or (x.role is not None and x.role[0].name != "output head")
        for x in others
    )


def _is_last_of_many(leaf: Leaf, evidence: Evidence) -> bool:
    return _is_last(leaf, evidence) and len(_series(leaf, evidence)) > 1


def _is_widening(n_in: int, n_out: int) -> bool:
    """Returns whether the outputs are a few times the inputs, as in hidden layers."""
    return n_in > 0 and n_out % n_in == 0 and n_out <= _VOCABULARY_RATIO * n_in


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

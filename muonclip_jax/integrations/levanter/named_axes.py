"""Dimension numbers of Muon from the named axes of haliax, whatever the modules are called.

A layer of haliax holds its axes: `Linear`, `MoELinear` and `Conv` have `In` and `Out`, `Embedding`
has `Vocab`, a norm has `axis`. All other axes of a weight, such as layers and experts, stack
matrices. Layers are recognized by these attributes, so haliax is not imported.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax

import muonclip_jax as mc

_BY_ROLE = object()  # a parameter without a layer of haliax: its name and shape decide
_HEAD = "head_size"  # haliax has no name for the columns of a head; this is the one of Levanter


def dimension_numbers(params: Any, *, per_head: bool = False) -> Any:
    """Finds the matrices of a haliax model by its axis names.

    AdamW gets embeddings, norms, biases, layers with an axis of an embedding's `Vocab` (output
    heads), routers (`Out` is the axis of the experts of the model) and depthwise convolutions.
    Names and shapes decide for parameters that belong to no layer of haliax, with one warning that
    lists the ones with two axes or more.

    Args:
      params: Parameters, gradients, or their shapes: a haliax model.
      per_head: Whether each head of a projection with the output axis `head_size` is a matrix of
        its own: queries, keys and values.

    Returns:
      `MuonDimensionNumbers` for each matrix and None for AdamW, in the structure of `params`:
      `muon_weight_dimension_numbers` of `muon` and `muonclip`, which accept the function too.

    Raises:
      ValueError: if `per_head` is set and no layer has an output axis `head_size`.
    """
    layers = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_layer)
    nodes = [node for _, node in layers]
    vocab = {name for node in nodes for name in _names(getattr(node, "Vocab", ()))}
    experts = {name for node in nodes for name in _names(getattr(node, "Experts", ()))}
    stacks = {*_stacks(params)}
    if per_head and nodes and not any(_is_projection(node) for node in nodes):
        raise ValueError(
            f"per_head: no layer has the output axes of several heads and {_HEAD!r}. Set it to "
            "False."
        )
    found = []
    for node in nodes:
        numbers = _of_layer(node, vocab, experts, per_head=per_head)
        rest = _of_rest(node, stacks)
        found += [numbers if is_weight else rest for is_weight in _are_weights(node)]
    if _BY_ROLE in found:
        found = _by_role(params, found)
    return jax.tree.structure(params).unflatten(found)


def _is_layer(node: Any) -> bool:
    """Returns whether a node is a layer of haliax, or a named array on its own."""
    has_weight = hasattr(node, "weight")
    is_norm = has_weight and hasattr(node, "axis")
    return is_norm or _is_matrix(node) or (has_weight and hasattr(node, "Vocab")) or _is_named(node)


def _is_matrix(node: Any) -> bool:
    return all(hasattr(node, name) for name in ("weight", "In", "Out"))


def _is_named(node: Any) -> bool:
    return hasattr(node, "axes") and hasattr(node, "array")


def _is_projection(node: Any) -> bool:
    """Returns whether a layer projects into the heads of queries, keys or values."""
    out = _names(node.Out) if _is_matrix(node) else ()
    return _HEAD in out and len(out) > 1


def _names(axes: Any) -> tuple[str, ...]:
    """Lists the names of an axis, a name, or several of them: a tuple, or a dict by name."""
    axes = axes if isinstance(axes, tuple | list | dict) else (axes,)
    return tuple(axis if isinstance(axis, str) else axis.name for axis in axes)


def _stacks(tree: Any) -> Iterator[str]:
    """Yields the names of the axes that stack layers: `Block` of `Stacked`."""
    yield from _names(getattr(tree, "Block", ()))

    def is_stack(node: Any) -> bool:
        return node is not tree and hasattr(node, "Block")

    for node in filter(is_stack, jax.tree.leaves(tree, is_leaf=is_stack)):
        yield from _stacks(node)


def _are_weights(node: Any) -> Iterator[bool]:
    """Yields for each leaf of a node whether it is the weight of a layer with `In` and `Out`."""
    for path, _ in jax.tree_util.tree_leaves_with_path(node):
        yield _is_matrix(node) and getattr(path[0], "name", None) == "weight"


def _of_layer(node: Any, vocab: set[str], experts: set[str], *, per_head: bool) -> Any:
    """Finds the dimension numbers of the weight of a layer."""
    if not _is_matrix(node) or not _is_named(node.weight):
        return _BY_ROLE
    names = _names(tuple(node.weight.axes))
    inputs, outputs = _names(node.In), _names(node.Out)
    if {*inputs, *outputs} & vocab or (outputs and {*outputs} <= experts):
        return None
    if hasattr(node, "Spatial"):
        groups = getattr(node, "groups", 1)
        if groups > 1:
            return None if groups == node.In.size else _BY_ROLE
        inputs = (*inputs, *_names(node.Spatial))
    if per_head and _is_projection(node):
        outputs = (_HEAD,)
    if not inputs or not outputs:
        return None
    return mc.MuonDimensionNumbers(_positions(names, inputs), _positions(names, outputs))


def _positions(names: Sequence[str], wanted: Sequence[str]) -> tuple[int, ...]:
    """Counts from the end, so that the numbers hold with and without an axis of layers."""
    return tuple(names.index(name) - len(names) for name in wanted)


def _of_rest(node: Any, stacks: set[str]) -> Any:
    """Decides for leaves other than the weights of layers: biases, norms, embeddings, others."""
    if _is_named(node):
        is_vector = len({*_names(tuple(node.axes))} - stacks) < 2
    else:
        is_vector = _is_layer(node) or len(node.shape) < 2
    return None if is_vector else _BY_ROLE


def _by_role(params: Any, found: list[Any]) -> list[Any]:
    """Lets names and shapes decide where no layer of haliax does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = mc.routing_table(params).rows
    guessed = [row for row, numbers in zip(rows, found, strict=True) if numbers is _BY_ROLE]
    lines = (f"  {row.path} {row.shape}: {row.optimizer} ({row.reason})" for row in guessed)
    warnings.warn(
        "muonclip: these parameters belong to no layer of haliax, so names and shapes decide:\n"
        + "\n".join(lines),
        UserWarning,
        stacklevel=3,
    )
    pairs = zip(rows, found, strict=True)
    return [row.dimension_numbers if numbers is _BY_ROLE else numbers for row, numbers in pairs]

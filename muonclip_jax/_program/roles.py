"""The role of each parameter, from how it is combined with activations."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from optax.contrib import MuonDimensionNumbers

from muonclip_jax._program.axes import identity
from muonclip_jax._program.experts import expert_axes
from muonclip_jax._program.graph import DATA, Graph, Node, reached_back
from muonclip_jax._program.rules import CHOICES
from muonclip_jax._program.uses import (
    Use,
    Uses,
    is_float,
    outputs_at,
    products_behind,
    scored_by_a_table,
)

_SLICES = frozenset("slice split unstack dynamic_slice".split())


class Role(NamedTuple):
    """The role of a parameter.

    Attributes:
      optimizer: `"muon"`, `"adamw"`, or `"unknown"` where the program does not decide.
      dimension_numbers: The inputs and outputs of its matrices; its other axes are a stack. None
        if it has no matrices.
      heads: Number of heads of a query or key kernel; 0 for others.
      reason: Its use in the program.
      groups: The axis of the outputs that the groups of a convolution divide, negative, and the
        number of groups; None without groups. Each group is a matrix.
    """

    optimizer: str
    dimension_numbers: MuonDimensionNumbers | None
    heads: int
    reason: str
    groups: tuple[int, int] | None = None


def roles(graph: Graph, uses: Uses) -> list[Role]:
    """Decides the role of each parameter.

    Args:
      graph: The program.
      uses: How its parameters meet data.

    Returns:
      One role for each parameter; its heads are 0.
    """
    facts = _Facts(graph, uses)
    return [
        _role(number, node.shape, uses.of.get(number, []), facts)
        for number, node in enumerate(graph.parameters)
    ]


class _Facts:
    """The uses of the results of products, by the number of the parameter.

    Attributes:
      heads: Parameters whose product no other product with a parameter follows.
      routers: Parameters whose product is sorted along its outputs, and how many these are.
      stacks: Axes of parameters that are a stack, though products contract or put them out.
    """

    def __init__(self, graph: Graph, uses: Uses):
        self.heads = _heads(graph, uses)
        self.routers: dict[int, int] = {}
        self.stacks: dict[int, set[int]] = defaultdict(set)
        taken: dict[tuple[int, int], set[int]] = defaultdict(set)
        for node in graph.nodes:
            if node not in graph.live or not node.inputs or not is_float(node.inputs[0]):
                continue
            if node.op in CHOICES:
                self.routers |= uses.chosen_from(node)
            elif _takes_one(node):
                for number, axis, offset in _slots(node, uses):
                    taken[number, axis].add(offset)
        for (number, axis), offsets in taken.items():
            if len(offsets) == graph.parameters[number].shape[axis]:
                self.stacks[number].add(axis)
        for number, axis in expert_axes(graph, uses, self.routers, self.heads):
            self.stacks[number].add(axis)


def _heads(graph: Graph, uses: Uses) -> set[int]:
    """Finds output heads: the last products with parameters before the results."""
    operands = [v for node in uses.products for v in node.inputs if v.kind == DATA]
    operands += scored_by_a_table(graph)
    before = reached_back(operands, stop=lambda node: not is_float(node))
    last = reached_back(graph.outputs, stop=lambda node: node in uses.products)
    followed = {n for node, numbers in uses.products.items() if node in before for n in numbers}
    found = {n for node, numbers in uses.products.items() if node in last for n in numbers}
    return found - followed


def _takes_one(node: Node) -> bool:
    """Returns whether a node takes one of the slices of activations along an axis."""
    if node.kind != DATA or node.op not in _SLICES:
        return False
    sizes = zip(node.shape, node.inputs[0].shape, strict=False)
    return node.op == "unstack" or any(n == 1 < m for n, m in sizes)


def _slots(node: Node, uses: Uses) -> Iterator[tuple[int, int, int]]:
    """Yields a parameter, an axis, and the one index along it that a slice of outputs takes."""
    view = identity(node.shape, [("axis", d) for d in range(len(node.shape))])
    for product, at in products_behind(node, view, uses.products):
        for reached in outputs_at(product, at):
            for d, axis in enumerate(reached.view.axes):
                if axis.is_exact and not axis.terms and reached.node.shape[d] > 1:
                    yield reached.node.number, d, axis.offset


def _role(number: int, shape: Sequence[int], uses: Sequence[Use], facts: _Facts) -> Role:
    """Decides from the uses of one parameter; of several, the safest."""
    found: dict[str, list[Use]] = defaultdict(list)
    for use in uses:
        found[use.what].append(use)
    products = found["product"] + found["chosen"]
    if found["lookup"] and not found["chosen"]:
        return _adamw("looked up by integers" + (", tied to a product" if products else ""))
    if found["elementwise"]:
        return _adamw("elementwise with activations")
    if found["depthwise"]:
        return _adamw("depthwise convolution")
    if found["reduced"]:
        return _adamw("reduced before it meets activations")
    if not uses:
        return _unknown("not used")
    if found["mixed"]:
        return _unknown("its axes are not clearly inputs or outputs")
    if opaque := next((what for what in found if what.startswith("opaque")), None):
        return _unknown(f"used by {opaque.removeprefix('opaque ')}, which has no rule")
    if products:
        return _matrix(number, len(shape), products + found["chain"], facts)
    if found["vector"] and not found["single"]:
        return _adamw("contracted to a number")
    if found["single"] and number in facts.heads:
        return _adamw("output head: no product with a parameter follows")
    if found["single"]:
        return _unknown("one of its axes has size 1")
    return _unknown("multiplied with parameters alone")


def _matrix(number: int, ndim: int, products: Sequence[Use], facts: _Facts) -> Role:
    sides = {(use.inputs, use.outputs) for use in products}
    if len(sides) > 1:
        return _unknown("its inputs in one place are outputs in another")
    all_groups = {use.groups for use in products}
    if len(all_groups) > 1:
        return _unknown("its outputs are divided into several numbers of groups")
    (sides,), (groups,) = sides, all_groups
    stack = facts.stacks.get(number, set())
    inputs, outputs = (tuple(d for d in side if d not in stack) or side for side in sides)
    numbers = MuonDimensionNumbers(_axes(inputs, ndim), _axes(outputs, ndim))
    if number in facts.heads:
        return Role("adamw", numbers, 0, "output head: no product with a parameter follows")
    if number in facts.routers:
        return Role("adamw", numbers, 0, "router: its outputs are sorted")
    if groups:
        axis, count = groups
        reason = f"contracted with activations in {count} groups"
        return Role("muon", numbers, 0, reason, (axis - ndim, count))
    return Role("muon", numbers, 0, "contracted with activations")


def _axes(axes: Sequence[int], ndim: int) -> int | tuple[int, ...]:
    """Writes axes as optax does: negative, one of them alone."""
    found = tuple(d - ndim for d in axes)
    return found[0] if len(found) == 1 else found


def _adamw(reason: str) -> Role:
    return Role("adamw", None, 0, reason)


def _unknown(reason: str) -> Role:
    return Role("unknown", None, 0, reason)

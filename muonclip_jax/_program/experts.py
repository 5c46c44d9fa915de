"""Axes of experts that products have among their outputs, because every expert sees every token."""

from collections.abc import Collection, Iterator
from typing import Any

from muonclip_jax._program.axes import Axis, Digit, View, identity
from muonclip_jax._program.graph import DATA, PARAMETER, PRODUCTS, Graph, Node, reached_back
from muonclip_jax._program.rules import CHOICES, has_rule
from muonclip_jax._program.uses import Uses, outputs_at, products_behind
from muonclip_jax._program.walk import names_of_product, parameters_of, walk


def expert_axes(graph: Graph, uses: Uses, routers: Collection[int]) -> Iterator[tuple[int, int]]:
    """Finds axes of experts among the outputs of parameters.

    Such an axis meets, in a product or elementwise, an axis of what the router put out or of a
    comparison with what was chosen; or a batch axis of the next product with experts.

    Args:
      graph: The program.
      uses: How its parameters meet data.
      routers: The parameters whose outputs are chosen from.

    Yields:
      The number of a parameter and an axis.
    """
    counts = {n for number in routers for n in graph.parameters[number].shape}
    if not routers:
        return
    for node in graph.nodes:
        if node not in graph.live or node.kind != DATA or len(node.inputs) < 2:
            continue
        if node.op == "mul" or node.op == "dot_general":
            views = [_names(node, i) for i in (0, 1)]
            for i in (0, 1):
                yield from _meeting(node, i, views, counts, uses, routers)


def _names(node: Node, i: int) -> View:
    """Names the axes of an operand; those that meet have one name in both operands."""
    operand = node.inputs[i]
    if node.op == "mul":
        return identity(operand.shape, [("axis", d) for d in range(len(operand.shape))])
    view = names_of_product(node, i)
    pairs = [tuple(side) for side in zip(*node.params["dimension_numbers"][0], strict=True)]
    pairs += [tuple(side) for side in zip(*node.params["dimension_numbers"][1], strict=True)]
    met = {pair[i]: ("axis", k) for k, pair in enumerate(pairs)}
    names = [met.get(d, ("free", i, d)) for d in range(len(view.axes))]
    return identity(operand.shape, names)


def _meeting(
    node: Node,
    i: int,
    views: list[View],
    counts: Collection[int],
    uses: Uses,
    routers: Collection[int],
) -> Iterator[tuple[int, int]]:
    operand, other = node.inputs[i], node.inputs[1 - i]
    if operand.kind != DATA or not any(n in counts for n in operand.shape):
        return
    names = {name for name in views[i].names if name[0] == "axis"}  # pyright: ignore
    chosen: frozenset[Any] | None = None
    for product, view in products_behind(operand, views[i], uses.products):
        for reached in outputs_at(product, view):
            number, shape = reached.node.number, reached.node.shape
            for d, axis in enumerate(reached.view.axes):
                (name,) = axis.names if len(axis.names) == 1 else (None,)
                whole = axis == Axis(0, ((1, Digit(name, 1, shape[d])),))
                if number in routers or not whole or name not in names or shape[d] not in counts:
                    continue
                if chosen is None:
                    chosen = _chosen_names(other, views[1 - i], uses, routers, node)
                if name in chosen:
                    yield number, d


def _chosen_names(
    node: Node, view: View, uses: Uses, routers: Collection[int], at: Node
) -> frozenset[Any]:
    """Returns the names along which a value differs by expert."""
    if node.kind == PARAMETER:
        reached = parameters_of(node, view) if at.op == "dot_general" else []
        batch = (
            {("axis", k) for k in range(len(at.params["dimension_numbers"][0][0]), 99)}
            if (at.op == "dot_general")
            else set()
        )
        return frozenset().union(*(r.view.names for r in reached)) & frozenset(batch)
    found: set[Any] = set()

    def follow(node: Node, view: View, state: Any) -> Iterator[tuple[int, Any]]:
        if node.op in PRODUCTS or not has_rule(node.op):
            return
        yield from ((i, state) for i in range(len(node.inputs)))

    for reached, pulled, _ in walk(node, view, follow):
        if reached in uses.products and not {*uses.products[reached]}.isdisjoint(routers):
            for parameter in outputs_at(reached, pulled):
                if parameter.node.number in routers:
                    found |= parameter.view.names
        elif reached.op == "eq" or reached.op.startswith("scatter"):
            if any(v.op in CHOICES for v in reached_back([reached], lambda n: n.op in PRODUCTS)):
                found |= pulled.names
    return frozenset(found)

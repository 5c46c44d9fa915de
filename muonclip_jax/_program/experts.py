"""Axes of experts and ensembles among the inputs or outputs of products."""

from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from muonclip_jax._program.axes import Axis, Digit, View, identity
from muonclip_jax._program.graph import DATA, PARAMETER, PRODUCTS, Graph, Node, reached_back
from muonclip_jax._program.rules import CHOICES, has_rule
from muonclip_jax._program.uses import STACKS, Uses, outputs_at, products_behind
from muonclip_jax._program.walk import Reached, names_of_product, parameters_of, walk


def expert_axes(graph: Graph, uses: Uses, routers: Collection[int]) -> set[tuple[int, int]]:
    """Finds axes of experts among the inputs and outputs of parameters.

    Such an axis meets, in a product or elementwise, an axis of what the router put out or of a
    comparison with what was chosen; or a batch axis of the next product with experts. The router
    of experts that are all used is a softmax.

    Args:
      graph: The program.
      uses: How its parameters meet data.
      routers: The parameters whose outputs are chosen from.

    Returns:
      Pairs of the number of a parameter and an axis.
    """
    live = [n for n in graph.nodes if n in graph.live and n.kind == DATA and not n.is_backward]
    tops = (node for node in live if node.op == "reduce_max")
    gates = {number for node in tops for number in uses.chosen_from(node)}
    found = _members(live, uses)
    if routers or gates:
        finder = _Finder(graph, uses, frozenset({*routers, *gates}))
        for node in live:
            if node.op in ("mul", "dot_general"):
                found |= {pair for i in (0, 1) for pair in finder.meeting(node, i)}
    return found


def _members(live: Sequence[Node], uses: Uses) -> set[tuple[int, int]]:
    """Finds axes of ensembles: the first layer puts out what the next one has as a batch axis.

    Heads are none: the next product but one, of activations, has them as a batch axis. Only the
    first axis that is no stack is considered, as `vmap` has it.
    """
    found: set[tuple[int, int]] = set()
    for node in live:
        if node.op != "dot_general" or not node.params["dimension_numbers"][1][0]:
            continue
        for i in (0, 1):
            if node.inputs[i].kind == DATA and node.inputs[1 - i].kind == PARAMETER:
                for product, at in products_behind(node.inputs[i], _names(node, i), uses.products):
                    found |= {
                        (reached.node.number, d)
                        for reached in outputs_at(product, at)
                        if (d := _first_axis(reached)) is not None
                    }
    return found - _head_axes(live, uses) if found else found


def _first_axis(reached: Reached) -> int | None:
    """Returns the first axis that is no stack, if it is a batch axis of a product."""
    for d, (axis, n) in enumerate(zip(reached.view.axes, reached.node.shape, strict=True)):
        if not axis.names or any(name[0] in STACKS for name in axis.names):  # pyright: ignore
            continue
        name = _whole(axis, n)
        return d if name is not None and name[:2] == ("met", "batch") else None
    return None


def _head_axes(live: Sequence[Node], uses: Uses) -> set[tuple[int, int]]:
    """Finds the axes of parameters along which products of activations have batches."""

    def follow(node: Node, view: View, state: Any) -> Iterator[tuple[int, Any]]:
        if has_rule(node.op) and any(name[:2] == ("met", "batch") for name in view.names):  # pyright: ignore
            yield from ((i, state) for i, v in enumerate(node.inputs) if v.kind == DATA)

    found = set()
    for node in live:
        if node.op == "dot_general" and all(v.kind == DATA for v in node.inputs):
            for i in (0, 1):
                for product, at, _ in walk(node.inputs[i], _names(node, i), follow):
                    for reached in outputs_at(product, at) if product in uses.products else ():
                        found |= {
                            (reached.node.number, d)
                            for d, axis in enumerate(reached.view.axes)
                            if any(name[:2] == ("met", "batch") for name in axis.names)  # pyright: ignore
                        }
    return found


class _Finder(NamedTuple):
    graph: Graph
    uses: Uses
    routers: frozenset[int]

    def meeting(self, node: Node, i: int) -> Iterator[tuple[int, int]]:
        """Yields axes of parameters that meet a choice of experts in the other operand."""
        counts = {n for number in self.routers for n in self.graph.parameters[number].shape}
        if not any(n in counts for n in node.inputs[i].shape):
            return
        chosen: frozenset[Hashable] | None = None
        for reached in self._parameters(node, i):
            shape = reached.node.shape
            for d, axis in enumerate(reached.view.axes):
                name = _whole(axis, shape[d])
                if name is None or name[0] != "met" or shape[d] not in counts:
                    continue
                chosen = self._chosen(node, 1 - i) if chosen is None else chosen
                if name in chosen and reached.node.number not in self.routers:
                    yield reached.node.number, d

    def _parameters(self, node: Node, i: int) -> Iterator[Reached]:
        """Yields the parameters that an operand is, or is a product with."""
        operand, view = node.inputs[i], _names(node, i)
        if operand.kind == PARAMETER and node.op == "dot_general":
            yield from parameters_of(operand, view)
        elif operand.kind == DATA:
            for product, at in products_behind(operand, view, self.uses.products):
                yield from outputs_at(product, at)

    def _chosen(self, node: Node, i: int) -> frozenset[Hashable]:
        """Returns the names along which an operand differs by expert."""
        operand, view = node.inputs[i], _names(node, i)
        if operand.kind == PARAMETER:  # the next product with experts
            found = parameters_of(operand, view) if node.op == "dot_general" else []
            names = frozenset().union(*(reached.view.names for reached in found))
            return frozenset(n for n in names if n[0] == "met" and n[1] == "batch")  # pyright: ignore
        found = set()
        for reached, at, _ in walk(operand, view, _follow):
            if not self.routers.isdisjoint(self.uses.products.get(reached, ())):
                for parameter in outputs_at(reached, at):
                    if parameter.node.number in self.routers:
                        found |= parameter.view.names
            elif reached.op == "eq" or reached.op.startswith("scatter"):
                before = reached_back([reached], lambda one: one.op in PRODUCTS)
                if any(one.op in CHOICES for one in before):
                    found |= at.names
        return frozenset(found)


def _follow(node: Node, view: View, state: Any) -> Iterator[tuple[int, Any]]:
    is_scaling = node.op == "dot_general" and not node.params["dimension_numbers"][0][0]
    if is_scaling or (node.op not in PRODUCTS and has_rule(node.op)):
        yield from ((i, state) for i in range(len(node.inputs)))


def _whole(axis: Axis, size: int) -> Any:
    """Returns the named index that an axis is, all of it; None if it is none."""
    (name,) = axis.names if len(axis.names) == 1 else (None,)
    return name if axis == Axis(0, ((1, Digit(name, 1, size)),)) else None


def _names(node: Node, i: int) -> View:
    """Names the axes of an operand; those that meet have one name in both operands."""
    operand = node.inputs[i]
    if node.op == "mul":
        return identity(operand.shape, [("met", "batch", d) for d in range(len(operand.shape))])
    view = names_of_product(node, i)
    contract, batch = node.params["dimension_numbers"]
    names: list[Any] = [("free", i, d) for d in range(len(view.axes))]
    for kind, pairs in (("sum", contract), ("batch", batch)):
        for k, d in enumerate(pairs[i]):
            names[d] = ("met", kind, k)
    return identity(operand.shape, names)

"""Axes of experts and ensembles among the inputs or outputs of products."""

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from muonclip_jax._program.axes import Axis, Digit, View, identity
from muonclip_jax._program.graph import DATA, PARAMETER, PRODUCTS, Graph, Node, reached_back
from muonclip_jax._program.rules import CHOICES, has_rule, pull
from muonclip_jax._program.uses import STACKS, Uses, outputs_at, products_behind
from muonclip_jax._program.walk import Reached, names_of_product, parameters_of, walk


def expert_axes(
    graph: Graph, uses: Uses, routers: Mapping[int, int], heads: Collection[int]
) -> set[tuple[int, int]]:
    """Finds axes of experts among the inputs and outputs of parameters.

    Such an axis meets, in a product or elementwise, an axis of what the router returned or of a
    comparison with what was chosen; or it is a batch axis of the next product. The router of
    experts that are all used is a softmax.

    Args:
      graph: The program.
      uses: How its parameters meet data.
      routers: The parameters whose outputs are chosen from, and the number of these outputs.
      heads: The output heads.

    Returns:
      Pairs of the number of a parameter and an axis.
    """
    live = [n for n in graph.nodes if n in graph.live and n.kind == DATA and not n.is_backward]
    tops = (node for node in live if node.op == "reduce_max")
    gates = {number: n for node in tops for number, n in uses.chosen_from(node)}
    gates = {**routers, **{number: n for number, n in gates.items() if number not in heads}}
    found = _members(live, uses, {*gates.values()})
    if gates:
        finder = _Finder(uses, gates)
        for node in live:
            if node.op in ("mul", "dot_general"):
                found |= {pair for i in (0, 1) for pair in finder.meeting(node, i)}
    return found


def _members(live: Sequence[Node], uses: Uses, counts: Collection[int]) -> set[tuple[int, int]]:
    """Finds output axes of products that are batch axes of the next product.

    Heads are none: a product of activations keeps them too. An axis is the first that is no stack,
    as `vmap` has it, or has the size of the experts.
    """
    found: set[tuple[int, int]] = set()
    for node in live:
        if node.op != "dot_general" or not node.params["dimension_numbers"][1][0]:
            continue
        for i in (0, 1):
            if node.inputs[i].kind == DATA and node.inputs[1 - i].kind == PARAMETER:
                for product, at in products_behind(node.inputs[i], _names(node, i), uses.products):
                    for reached in outputs_at(product, at):
                        found |= {
                            (reached.node.number, d)
                            for d, is_first in _batch_axes(reached)
                            if is_first or reached.node.shape[d] in counts
                        }
    return found - _head_axes(live, uses) if found else found


def _batch_axes(reached: Reached) -> Iterator[tuple[int, bool]]:
    """Yields the batch axes of a product, and whether they are the first after the stacks."""
    is_first = True
    for d, (axis, n) in enumerate(zip(reached.view.axes, reached.node.shape, strict=True)):
        name = _whole(axis, n)
        if name is not None and name[:2] == ("met", "batch"):
            yield d, is_first
        is_first &= not axis.names or any(name[0] in STACKS for name in axis.names)  # pyright: ignore


def _head_axes(live: Sequence[Node], uses: Uses) -> set[tuple[int, int]]:
    """Finds the axes of parameters that products of activations keep, as queries times keys do.

    Products of each head with a kernel of its own may be in between, as for absorbed keys.
    """
    found: set[tuple[int, int]] = set()
    for node in live:
        if node.op != "dot_general" or any(v.kind != DATA for v in node.inputs):
            continue
        if node.params["dimension_numbers"][0][0]:  # otherwise a scale
            todo = [(node.inputs[i], _names(node, i)) for i in (0, 1)]
            while todo:
                for product, at in products_behind(*todo.pop(), uses.products):
                    met = set()
                    for reached in outputs_at(product, at):
                        for d, axis in enumerate(reached.view.axes):
                            kept = {name for name in axis.names if _is_kept(name)}
                            found |= {(reached.node.number, d)} if kept else set()
                            met |= kept
                    todo += _of_heads(product, at, met)
    return found


def _is_kept(name: Any) -> bool:
    return name[0] == "free" or name[:2] == ("met", "batch")


def _of_heads(product: Node, view: View, names: set[Hashable]) -> Iterator[tuple[Node, View]]:
    """Yields the activations of a product with parameters that have an axis of these names too."""
    for i, v in enumerate(product.inputs[:2]):
        pulled = pull(product, i, view) if v.kind == DATA else None
        if pulled is not None and not names.isdisjoint(pulled.names):
            yield v, pulled


class _Finder(NamedTuple):
    uses: Uses
    routers: Mapping[int, int]

    def meeting(self, node: Node, i: int) -> Iterator[tuple[int, int]]:
        """Yields axes of parameters that meet a choice of experts in the other operand."""
        counts = {*self.routers.values()}
        if counts.isdisjoint(node.inputs[i].shape) or node.inputs[1 - i].kind != DATA:
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
        found = set()
        for reached, at, _ in walk(operand, view, _follow):
            if any(number in self.routers for number in self.uses.products.get(reached, ())):
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

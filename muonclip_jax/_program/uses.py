"""How each parameter is used first: contracted, looked up, or joined element by element."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from muonclip_jax._program.axes import Digit, View, identity
from muonclip_jax._program.graph import DATA, PARAMETER, PRODUCTS, Graph, Node
from muonclip_jax._program.rules import ELEMENTWISE, REDUCTIONS, choice_axis, has_rule, pull
from muonclip_jax._program.walk import (
    Reached,
    is_lookup,
    is_tiled,
    names_of_product,
    parameters_of,
    walk,
)

_JOINS = ELEMENTWISE | frozenset(
    "concatenate pad stack carry join dynamic_update_slice scatter scatter_add scatter_mul "
    "scatter-add".split()
)
STACKS = frozenset({"stack", "layer", "loop", "pick", "shard", "slot"})


class Use(NamedTuple):
    """One meeting of a parameter with data.

    Attributes:
      what: One of `product`, `chosen` (a product with weights that data choose), `chain` (a product
        with parameters alone), `vector`, `lookup`, `elementwise`, `depthwise`, `opaque`, `mixed`,
        `reduced` (only norms or sums of it meet data).
      inputs: Axes that are contracted.
      outputs: Axes that are free.
      node: The node that uses it.
      groups: The axis of the outputs that the groups of a convolution divide, with their number.
    """

    what: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    node: Node
    groups: tuple[int, int] | None = None


class Uses:
    """All meetings of parameters with data.

    Attributes:
      of: The uses of each parameter, by its number.
      products: The products of data and parameters, with the numbers of the parameters.
    """

    def __init__(self, graph: Graph):
        self.of: dict[int, list[Use]] = defaultdict(list)
        self.products: dict[Node, list[int]] = defaultdict(list)
        for node in graph.nodes:
            if node in graph.live and node.kind == DATA:
                self._meet(node)
        for node in graph.parameters:
            if node in graph.live and not self.of[node.number]:
                self._add(node, Use("reduced", (), (), node))

    def chosen_from(self, node: Node) -> Iterator[tuple[int, int]]:
        """Yields the parameters among whose outputs a node chooses, and how many outputs.

        Experts that choose their tokens do so along the axis of the tokens.
        """
        operand, chosen = node.inputs[0], ("axis", choice_axis(node))
        view = identity(operand.shape, [("axis", d) for d in range(len(operand.shape))])
        for product, at in products_behind(operand, view, self.products):
            for reached in outputs_at(product, at):
                by_experts = node.op == "top_k" and chosen not in reached.view.names
                for axis, n in zip(reached.view.axes, reached.node.shape, strict=True):
                    named = any(name[0] == "axis" for name in axis.names)  # pyright: ignore
                    if chosen in axis.names or (by_experts and named):
                        yield reached.node.number, n

    def _meet(self, node: Node) -> None:
        operands = [i for i, v in enumerate(node.inputs) if v.kind == PARAMETER]
        for i in operands:
            if node.op == "dot_general" and len(operands) == 2 and is_tiled(node, i):
                self._other(node, i)  # a learned token
            elif node.op in PRODUCTS and i < 2:
                self._product(node, i, names_of_product(node, i))
            else:
                self._other(node, i)
        if node.op == "dot_general" and not operands:
            for i in (0, 1):
                self._chosen(node, i)

    def _other(self, node: Node, i: int) -> None:
        operand = node.inputs[i]
        if is_lookup(node):
            what = "lookup" if i == 0 else "elementwise"
        else:
            joins = node.op in _JOINS or node.op == "dot_general"
            name = node.params["name"] if node.op in ("opaque", "kernel") else node.op
            what = "elementwise" if joins else f"opaque {name}"
        for reached in parameters_of(operand, identity(operand.shape, range(len(operand.shape)))):
            chained = reached.is_chained and what == "elementwise"
            closed = next((f"opaque {mark}" for mark in reached.marks if not has_rule(mark)), what)
            self._add(reached.node, Use("chain" if chained else closed, (), (), node))

    def _product(self, node: Node, i: int, view: View) -> None:
        if is_one_hot(node.inputs[1 - i]):
            for reached in parameters_of(node.inputs[i], view):
                self._add(reached.node, Use("lookup", (), (), node))
            return
        if node.op == "conv_general_dilated" and _is_depthwise(node):
            for reached in parameters_of(node.inputs[i], view):
                self._add(reached.node, Use("depthwise", (), (), node))
            return
        found = parameters_of(node.inputs[i], view)
        is_alone = all(reached.is_chained for reached in found)
        for reached in found:
            use = _use(reached, node)
            if use.what == "product" and node.op == "conv_general_dilated" and i == 1:
                use = _in_groups(use, reached, node)
            if use.what == "product" and is_alone:
                use = use._replace(what="chain")
            self._add(reached.node, use)
            if use.what in ("product", "vector", "single", "chain"):
                self.products[node].append(reached.node.number)

    def _chosen(self, node: Node, i: int) -> None:
        """Adds a product with weights that data chose, as in a mixture of experts."""
        for at, view in _looked_up(node.inputs[i], names_of_product(node, i)):
            for reached in parameters_of(at, view):
                use = _use(reached, node)
                if use.what == "product":
                    self._add(reached.node, use._replace(what="chosen"))
                    self.products[node].append(reached.node.number)

    def _add(self, parameter: Node, use: Use) -> None:
        self.of[parameter.number].append(use)


def products_behind(
    node: Node, view: View, products: Iterable[Node]
) -> Iterator[tuple[Node, View]]:
    """Walks back from a value to the products with parameters that it is made from.

    Args:
      node: The value.
      view: A view of it.
      products: All products with parameters.

    Yields:
      Each product that no other product and no reduction is after, with its view.
    """

    def follow(node: Node, view: View, state: Any) -> Iterator[tuple[int, Any]]:
        is_end = node.op in PRODUCTS or node.op in REDUCTIONS or not has_rule(node.op)
        for i, operand in enumerate(node.inputs):
            if not is_end and operand.kind == DATA and is_float(operand):
                yield i, state

    for reached, at, _ in walk(node, view, follow):
        if reached in products:
            yield reached, at


def outputs_at(product: Node, view: View) -> Iterator[Reached]:
    """Yields the parameters of a product, with the view that a view of the result is."""
    if product.op in PRODUCTS:
        for i, operand in enumerate(product.inputs[:2]):
            pulled = pull(product, i, view)
            if operand.kind == PARAMETER and pulled is not None:
                yield from parameters_of(operand, pulled)


def is_one_hot(node: Node) -> bool:
    """Returns whether a value compares a counter with integers."""
    while node.op in ("convert_element_type", "reshape", "transpose", "squeeze", "copy"):
        (node,) = node.inputs
    if node.op != "eq":
        return False
    sides = [_source(operand) for operand in node.inputs]
    return any(side.op == "iota" or _is_counter(side) for side in sides)


def _is_counter(node: Node) -> bool:
    """Returns whether a constant counts from 0."""
    if node.op != "constant" or node.kind == DATA or is_float(node) or len(node.shape) != 1:
        return False
    return bool((np.asarray(node.value) == np.arange(node.shape[0])).all())


def _source(node: Node) -> Node:
    """Looks through what only moves or repeats elements."""
    while node.op in ("convert_element_type", "broadcast_in_dim", "reshape", "transpose"):
        (node,) = node.inputs[:1]
    return node


def is_float(node: Node) -> bool:
    """Returns whether a value is neither integer nor boolean."""
    return getattr(node.dtype, "kind", "f") not in "iub"


def scored_by_a_table(graph: Graph) -> Iterator[Node]:
    """Yields the activations whose products with looked up rows are summed, such as scores."""
    for node in graph.nodes:
        if node not in graph.live or node.kind != DATA or node.op not in ("mul", "dot_general"):
            continue
        summed = node.op == "dot_general" or any(user.op == "reduce_sum" for user in node.users)
        for one, other in (node.inputs[:2], node.inputs[1::-1]):
            if summed and one.kind == DATA and is_lookup(_source(other)):
                yield one


def _is_depthwise(node: Node) -> bool:
    in_axis = node.params["dimension_numbers"].rhs_spec[1]
    return node.params["feature_group_count"] > 1 and node.inputs[1].shape[in_axis] == 1


def _in_groups(use: Use, reached: Reached, node: Node) -> Use:
    """Finds the groups of a convolution among the outputs of its kernel.

    Output o is in group o // each. Under `vmap`, each member is a group.
    """
    groups = node.params["feature_group_count"] * node.params["batch_group_count"]
    out = node.params["dimension_numbers"].rhs_spec[0]
    each = node.inputs[1].shape[out] // groups
    outputs, divided = [], None
    for d in use.outputs:
        axis, n = reached.view.axes[d], reached.node.shape[d]
        digits = [digit for _, digit in axis.terms]
        if groups > 1 and axis.is_exact and all(digit.div >= each for digit in digits):
            continue  # an axis that numbers groups
        outputs.append(d)
        if groups == 1 or (axis.is_exact and all(x.div * x.size <= each for x in digits)):
            continue
        first = digits[0] if len(digits) == 1 else Digit(None, 1, 0)
        if divided or first.size != n or each % first.div or n * first.div % each:
            return use._replace(what="mixed")
        divided = d, n * first.div // each
    if len(outputs) > 1:
        return use._replace(what="mixed")  # `vmap` over kernels alone joins members and outputs
    return use._replace(
        what=use.what if outputs else "vector", outputs=tuple(outputs), groups=divided
    )


def _looked_up(node: Node, view: View) -> Iterator[tuple[Node, View]]:
    """Yields the parameters, rows of which a value is, with the view before the lookup."""

    def follow(node: Node, view: View, after: bool) -> Iterator[tuple[int, bool]]:
        if after or not has_rule(node.op):
            return
        if is_lookup(node):
            yield 0, True
        elif node.op == "dot_general":
            for i in (0, 1):
                if node.inputs[i].kind == PARAMETER and is_one_hot(node.inputs[1 - i]):
                    yield i, True
        elif len(node.inputs) == 1:
            yield 0, False

    for reached, at, after in walk(node, view, follow, False):
        if after:
            yield reached, at


def _use(reached: Reached, node: Node) -> Use:
    """Sorts the axes of a parameter by what a product does with them."""
    sides: dict[str, list[int]] = defaultdict(list)
    for d, (axis, n) in enumerate(zip(reached.view.axes, reached.node.shape, strict=True)):
        kinds = {name[0] for name in axis.names} - {"shard"}  # pyright: ignore[reportIndexIssue]
        side = "stack" if kinds <= STACKS else kinds.pop() if len(kinds) == 1 else "mixed"
        sides["single" if n == 1 else side].append(d)
    inputs, outputs, chain = sides["in"], sides["out"], sides["sum"]
    if chain and bool(inputs) != bool(outputs):
        inputs, outputs = inputs or chain, outputs or chain
        chain = []
    axes = tuple(inputs), tuple(outputs)
    if sides["mixed"] or chain:
        return Use("mixed", *axes, node)
    if inputs and outputs:
        return Use("product", *axes, node)
    if sides["single"] and (inputs or outputs):
        return Use("single", *axes, node)
    return Use("vector" if inputs else "elementwise", *axes, node)

"""Walks back from a value to the parameters that it is made of."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from muonclip_jax._program.axes import View, identity, lost, named
from muonclip_jax._program.graph import CONSTANT, DATA, PARAMETER, PRODUCTS, Graph, Node
from muonclip_jax._program.rules import ELEMENTWISE, LINEAR, MOVES, REDUCTIONS, has_rule, pull

_RANDOM = frozenset({"random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform"})
# A walk that meets the same value in this number of ways goes on with lost axes only.
_MANY = 64


class Reached(NamedTuple):
    """A parameter that a value is made of.

    Attributes:
      node: The parameter.
      view: Its elements, by the names of the walk.
      is_chained: Whether a product with another parameter is on the way.
      marks: Nonlinear operations on the way: a primitive, or `mul` of two parameters.
    """

    node: Node
    view: View
    is_chained: bool
    marks: frozenset[str]


def walk(
    start: Node,
    view: View,
    follow: Callable[[Node, View, Any], Iterator[tuple[int, Any]]],
    state: Any = None,
) -> Iterator[tuple[Node, View, Any]]:
    """Walks back through a program, each value once for each view of it.

    Args:
      start: The first node.
      view: A view of it.
      follow: Given a node, its view and a state, the operands to go on with and the state there.
      state: The state at the start; hashable.

    Yields:
      Each node with its view and state.
    """
    todo, seen, count = [(start, view, state)], set(), {}
    while todo:
        node, view, state = todo.pop()
        times = count[node] = count.get(node, 0) + 1
        if times > (2 if node.op == "carry" else _MANY):
            names = view.names
            sizes = node.shape
            view = View(tuple(lost(names=names if n > 1 else ()) for n in sizes), (), True)
        if (node, view, state) in seen:
            continue
        seen.add((node, view, state))
        yield node, view, state
        for i, after in follow(node, view, state):
            if (pulled := pull(node, i, view)) is not None:
                todo.append((node.inputs[i], pulled, after))


def parameters_of(node: Node, view: View) -> list[Reached]:
    """Lists the parameters that a value of parameters is a view of.

    Norms and other reductions of parameters are left out: their elements are no elements of the
    parameter. What is added to one is marked.

    Args:
      node: A value of kind `PARAMETER`.
      view: A view of it.

    Returns:
      Each parameter, once for each way to it.
    """

    def follow(node: Node, view: View, state: Any) -> Iterator[tuple[int, Any]]:
        chained, marks = state
        if node.op in REDUCTIONS:
            return
        chained = chained or node.op in PRODUCTS
        active = [i for i, operand in enumerate(node.inputs) if operand.kind == PARAMETER]
        is_factor = (node.op == "mul" and len(active) > 1) or (node.op == "div" and 1 in active)
        is_scaled = any(operand.kind == DATA for operand in node.inputs)
        is_unknown = not has_rule(node.op)
        is_nonlinear = node.op in ELEMENTWISE and node.op not in LINEAR
        if is_factor or is_scaled or is_unknown or is_nonlinear:
            marks |= {node.op}
        if node.op in ("add", "sub") and any(map(_is_reduced, node.inputs)):
            marks |= {"a mean"}
        for i in active:
            yield i, (chained, marks)

    found = walk(node, view, follow, (False, frozenset()))
    return [Reached(at, view, *state) for at, view, state in found if at.op == "parameter"]


def _is_reduced(node: Node) -> bool:
    """Returns whether a value is a reduction of a parameter, perhaps scaled or repeated."""
    while node.kind == PARAMETER and (node.op in LINEAR or node.op in MOVES):
        node = next(v for v in node.inputs if v.kind == PARAMETER)
    return node.kind == PARAMETER and node.op in REDUCTIONS


def set_kinds(graph: Graph) -> None:
    """Sets what each value is made of; again while what loops carry still changes."""
    changed = True
    while changed:
        changed = False
        for node in graph.nodes:
            kind = _kind(node)
            changed |= kind != node.kind and any(user.op == "carry" for user in node.users)
            node.kind = kind


def _kind(node: Node) -> int:
    if node.op in ("parameter", "input"):
        return PARAMETER if node.op == "parameter" else DATA
    if node.op == "constant":
        return node.kind
    if node.op == "carry":
        return max(node.kind, *(operand.kind for operand in node.inputs))
    if node.op in _RANDOM:
        return CONSTANT
    kind = max((operand.kind for operand in node.inputs), default=CONSTANT)
    if kind != PARAMETER:
        return PARAMETER if kind == DATA and _is_scaled(node) else kind
    if node.op in PRODUCTS and any(operand.kind == CONSTANT for operand in node.inputs[:2]):
        return DATA  # activations that do not depend on the batch, such as positions
    if node.op == "dot_general" and any(is_tiled(node, i) for i in (0, 1)):
        return DATA
    return DATA if is_lookup(node) else PARAMETER


def _is_scaled(node: Node) -> bool:
    """Returns whether a parameter is multiplied with, or divided by, a scalar of data."""
    if node.op not in ("mul", "div"):
        return False
    one, other = node.inputs
    if node.op == "mul" and one.kind == DATA:
        one, other = other, one
    while other.op in ("broadcast_in_dim", "reshape", "convert_element_type"):
        other = other.inputs[0]
    return one.kind == PARAMETER and math.prod(one.shape) > 1 == math.prod(other.shape)


def is_lookup(node: Node) -> bool:
    """Returns whether rows of a parameter are taken by data, or by several constant indices."""
    if node.op == "gather":
        operand, index = node.inputs
        several = any(n > 1 for n in index.shape[:-1])
        return operand.kind == PARAMETER and (index.kind == DATA or several)
    if node.op == "dynamic_slice":
        operand, *indices = node.inputs
        return operand.kind == PARAMETER and any(i.kind == DATA for i in indices)
    return False


def is_scaling(node: Node) -> bool:
    """Returns whether a product sums and repeats nothing, as that with a gain or a mask."""
    if node.op != "dot_general" or node.params["dimension_numbers"][0][0]:
        return False
    batch = node.params["dimension_numbers"][1]
    return any(len(sides) == len(v.shape) for sides, v in zip(batch, node.inputs, strict=True))


def is_tiled(node: Node, i: int) -> bool:
    """Returns whether an operand of a product of parameters is repeated along a free axis.

    A learned token that is repeated for each row of a batch is an activation.
    """
    contract, batch = (sides[i] for sides in node.params["dimension_numbers"])
    operand = node.inputs[i]
    free = [d for d, n in enumerate(operand.shape) if n > 1 and d not in (*contract, *batch)]
    if not free or operand.op == "parameter":
        return False
    reached = parameters_of(operand, identity(operand.shape, range(len(operand.shape))))
    return bool({*free} - frozenset().union(*(r.view.names for r in reached)))


def names_of_product(node: Node, i: int) -> View:
    """Names the axes of an operand of a product: what is contracted, free, or shared.

    Args:
      node: A product.
      i: Which operand.

    Returns:
      The view of the operand by names that begin with `in`, `out` or `stack`.
    """
    operand = node.inputs[i]
    roles = dict.fromkeys(range(len(operand.shape)), "out")
    if node.op == "conv_general_dilated":
        numbers = node.params["dimension_numbers"]
        out_axis, *rest = (numbers.rhs_spec, numbers.lhs_spec)[1 - i]
        roles |= dict.fromkeys(rest, "in")
        roles[out_axis] = "out"
    else:
        contract, batch = sides_of(node, i)
        roles |= dict.fromkeys(contract, "in") | dict.fromkeys(batch, "stack")
    pairs = zip(roles.items(), operand.shape, strict=True)
    return View(tuple(named(item, n) for item, n in ((item[::-1], n) for item, n in pairs)))


def sides_of(node: Node, i: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the contracted axes and the batch axes of an operand of a product."""
    if node.op == "ragged_dot_general":
        numbers = node.params["ragged_dot_dimension_numbers"]
        contract, batch = (sides[i] for sides in numbers.dot_dimension_numbers)
        groups = tuple(numbers.rhs_group_dimensions) if i == 1 else ()
        return tuple(contract), (*batch, *groups)
    contract, batch = (sides[i] for sides in node.params["dimension_numbers"])
    return tuple(contract), tuple(batch)

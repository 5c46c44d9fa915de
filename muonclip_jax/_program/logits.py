"""Walks back from the logits of a softmax to the products of queries and keys."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from muonclip_jax._program.axes import Shape, View, identity, reshape
from muonclip_jax._program.graph import DATA, PARAMETER, Node
from muonclip_jax._program.rules import ELEMENTWISE, LINEAR, MOVES, REDUCTIONS, has_rule, pull
from muonclip_jax._program.walk import is_scaling, names_of_product, parameters_of, walk

# Primitives that change logits less than a nonlinear function: casts, masks, scales, and sums.
SAME = frozenset(
    "convert_element_type copy stop_gradient sharding_constraint optimization_barrier name "
    "reduce_precision mul div add sub neg select_n max min clamp carry join".split()
)
COPIES = frozenset(
    "convert_element_type copy stop_gradient sharding_constraint optimization_barrier name".split()
)
# Operations that may be applied to logits between queries times keys and the softmax.
LOGIT_CHAIN = SAME | MOVES | {"tanh", "reduce_max"}


class Product(NamedTuple):
    """A product of queries and keys.

    Attributes:
      node: The product.
      query: The operand with the queries.
      view: A view of the product by the axes of the logits, `("row", axis)`.
    """

    node: Node
    query: int
    view: View


class Softmax(NamedTuple):
    """A softmax over a product of activations.

    Attributes:
      top: The row maximum.
      shape: Sizes of the axes of the logits; an axis of heads and others counts as several.
      axis: The axis of the keys.
      products: The products that are added to logits.
      caps: The tanh or clamp that bounds the logits, by path, and the operand that it bounds.
      sinks: For each concatenation with columns that are no logits, by path, which operands are
        logits.
      mixes: Whether logits of several heads are mixed.
      factors: The data-dependent factors and divisors of the logits.
      bends: Primitives on the way of logits that are neither linear nor a bound.
      base: The base of the exponentials: 2, or 0 for e.
    """

    top: Node
    shape: tuple[int, ...]
    axis: int
    products: tuple[Product, ...]
    caps: dict[tuple[int, ...], tuple[int, ...]]
    sinks: dict[tuple[int, ...], tuple[int, ...]]
    mixes: bool
    factors: tuple[Node, ...]
    bends: tuple[str, ...]
    base: int


def divided(softmax: Softmax, sizes: Sequence[Sequence[int]]) -> Softmax:
    """Counts axes of the logits as several.

    Args:
      softmax: The softmax, no axis of which is divided yet.
      sizes: For each axis, the sizes of the axes that it is.

    Returns:
      The same softmax.
    """
    shape = tuple(n for parts in sizes for n in parts)
    axis = sum(map(len, sizes[: softmax.axis]))
    found = softmax_of(softmax.top, shape, axis, softmax.base)
    return softmax if found is None else found


def softmax_of(top: Node, shape: Shape, axis: int, base: int) -> Softmax | None:
    """Walks back from the logits to the products of activations."""
    logits = top.inputs[0]
    view = identity(shape, [("row", d) for d in range(len(shape))])
    view = reshape(view, shape, logits.shape)
    found = list(products(logits, view, ("row", axis)))
    if not found:
        return None
    sides = defaultdict(set)
    for _, markers in found:
        for kind, path, i in markers:
            sides[kind, path].add(i)
    sinks = {}
    for (kind, path), found_in in sides.items():
        if kind == "join":
            operands, (count, *_) = zip(*sorted(found_in), strict=True)
            sinks |= {path: operands} if len(operands) < count else {}
    return Softmax(
        top,
        shape,
        axis,
        tuple(dict.fromkeys(product for product, _ in found)),
        {path: tuple(found_in) for (kind, path), found_in in sides.items() if kind == "cap"},
        sinks,
        any(kind == "mix" for kind, _ in sides),
        tuple(node for kind, node in sides if kind == "factor"),
        tuple(sorted({op for kind, op in sides if kind == "bend"})),
        base,
    )


def products(logits: Node, view: View, key: Any) -> Iterator[tuple[Product, Any]]:
    """Yields the products of activations that logits are made of, and what is on the way."""

    def follow(node: Node, view: View, markers: Any) -> Iterator[tuple[int, Any]]:
        mixed = any(kind == "mix" for kind, _, _ in markers)
        if key not in view.names or node.kind != DATA:
            return
        if is_scaling(node):
            yield from ((i, markers) for i in (0, 1) if node.inputs[i].kind == DATA)
        elif node.op == "dot_general":
            if not mixed and (i := _mixed_operand(node, view, key)) is not None:
                yield i, markers | {("mix", node.path, 0)}
        elif node.op in REDUCTIONS or not has_rule(node.op) or (mixed and _is_nonlinear(node)):
            return
        else:
            first = 1 if node.op == "select_n" else 0  # without the mask
            for i in range(first, len(node.inputs)):
                yield i, markers | _marker(node, i, view, key)

    for node, at, markers in walk(logits, view, follow, frozenset()):
        is_dot = node.op == "dot_general" and not is_scaling(node)
        if not is_dot or node.kind != DATA or key not in at.names:
            continue
        sides = [pull(node, i, at) for i in (0, 1)]
        has_key = [side is not None and key in side.names for side in sides]
        kinds = [v.kind for v in node.inputs]
        i = has_key.index(False) if False in has_key else 0
        if kinds == [DATA, DATA] or (kinds[1 - i] == DATA and _is_learned_query(node, i, markers)):
            yield Product(node, i, at), markers


def multiplies_elementwise(logits: Node, axis: int) -> bool:
    """Returns whether logits are sums of elementwise products of activations."""
    key = ("row", axis)
    view = identity(logits.shape, [("row", d) for d in range(len(logits.shape))])

    def follow(node: Node, view: View, state: Any) -> Iterator[tuple[int, Any]]:
        if key in view.names and node.kind == DATA and node.op in SAME | MOVES | {"tanh"}:
            yield from ((i, state) for i in range(len(node.inputs)))

    for node, at, _ in walk(logits, view, follow):
        if node.op == "reduce_sum" and key in at.names and node.inputs[0].op == "mul":
            a, b = node.inputs[0].inputs[:2]
            if a is not b and a.kind == b.kind == DATA:
                return True
    return False


def _is_learned_query(node: Node, i: int, markers: Any) -> bool:
    """Returns whether an operand is a product of parameters: a learned query."""
    if node.inputs[i].kind != PARAMETER or markers:
        return False
    return any(r.is_chained for r in parameters_of(node.inputs[i], names_of_product(node, i)))


def _mixed_operand(node: Node, view: View, key: Any) -> int | None:
    """Returns which operand has logits, if a product mixes logits of several heads."""
    for i in (0, 1):
        pulled = pull(node, i, view)
        if node.inputs[i].kind == DATA and node.inputs[1 - i].kind == PARAMETER and pulled:
            if key in pulled.names:
                return i
    return None


def _is_nonlinear(node: Node) -> bool:
    """Returns whether a value is more than a scaled, masked or moved operand."""
    return node.op in ELEMENTWISE and sum(v.kind == DATA and v.shape != () for v in node.inputs) > 1


def _marker(node: Node, i: int, view: View, key: Any) -> frozenset[Any]:
    if node.op in ("tanh", "min") or (node.op == "clamp" and i == 1):
        return frozenset({("cap", node.path, i)})
    if node.op == "concatenate" and key in view.axes[node.params["dimension"]].names:
        return frozenset({("join", node.path, (i, len(node.inputs)))})
    if (node.op in ELEMENTWISE and node.op not in LINEAR | {"max"}) or (node.op == "div" and i):
        return frozenset({("bend", node.op, 0)})
    if node.op in ("mul", "div"):
        others = (v for k, v in enumerate(node.inputs) if k != i and v.kind == DATA)
        return frozenset(("factor", v, 0) for v in others)
    return frozenset()

"""Attention layers: the parameters of queries and keys, their heads, and what is on the way."""

import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from muonclip_jax._program.axes import Axis, Shape, View, base, sizes_of
from muonclip_jax._program.graph import CONSTANT, DATA, PARAMETER, PRODUCTS, Node, reached_back
from muonclip_jax._program.logits import COPIES, Softmax, divided
from muonclip_jax._program.rules import ELEMENTWISE, LINEAR, MOVES, REDUCTIONS, has_rule, pull
from muonclip_jax._program.uses import is_float
from muonclip_jax._program.walk import is_scaling, is_tiled, parameters_of, walk

_MOVES = MOVES | {"stacked", "gather", "reduce_sum"}
_FACTORS = frozenset(
    "rsqrt sqrt pow integer_pow square exp exp2 cos sin logistic tanh div reduce_sum reduce_max "
    "iota input constant literal".split()
)


class Source(NamedTuple):
    """The positions of elements of queries or keys in a parameter.

    Attributes:
      number: The number of the parameter.
      view: Its elements by the axes of the logits (`row`), of queries times keys (`dim`), layers
        (`layer`), and others.
      is_kernel: Whether it is multiplied with activations, unlike a bias.
      marks: Operations between it and the logits: `norm`, or the name of a nonlinear primitive.
      is_inner: Whether a product with another parameter is on the way.
    """

    number: int
    view: View
    is_kernel: bool
    marks: frozenset[str]
    is_inner: bool = False


class Traced(NamedTuple):
    """One attention layer.

    Attributes:
      softmax: The softmax.
      queries: The positions of its queries.
      keys: The positions of its keys.
      heads: The axes of the row maxima that are heads, outermost first.
      batch: Those that are shared by queries and keys, without heads.
      layers: Paths of the scans over layers, outermost first.
      sizes: Size of each named index of the views.
      faults: Why its heads cannot be read.
      notes: Why a factor on its kernels would not be one on its logits.
    """

    softmax: Softmax
    queries: tuple[Source, ...]
    keys: tuple[Source, ...]
    heads: tuple[int, ...]
    batch: tuple[int, ...]
    layers: tuple[tuple[int, ...], ...]
    sizes: dict[Hashable, int]
    faults: tuple[str, ...]
    notes: tuple[str, ...]


def trace(softmax: Softmax) -> Traced:
    """Walks back from both operands of an attention to parameters.

    Heads may be in one axis with the batch.

    Args:
      softmax: The attention.

    Returns:
      What is known of it.
    """
    found = _trace(softmax)
    sizes = _heads_apart(found.queries, softmax.shape)
    return found if all(len(parts) == 1 for parts in sizes) else _trace(divided(softmax, sizes))


def _heads_apart(queries: Sequence[Source], shape: Shape) -> list[list[int]]:
    """Divides axes of logits, of which kernels of queries have a part only."""
    kernels = [source.view for source in queries if source.is_kernel]
    digits = [digit for view in kernels for axis in view.axes for _, digit in axis.terms]
    sizes = []
    for d, n in enumerate(shape):
        mine = {digit for digit in digits if digit.name == ("row", d)}
        ends = sorted({1, n, *(e for m in mine for e in (m.div, m.div * m.size))})
        pairs = [*itertools.pairwise(ends)]
        known = {(m.div, m.div * m.size) for m in mine}
        is_part = mine and not known.issuperset(pairs) and all(b % a == 0 for a, b in pairs)
        sizes.append([b // a for a, b in reversed(pairs)] if is_part else [n])
    return sizes


def _trace(softmax: Softmax) -> Traced:
    shape, notes, sizes = softmax.shape, [], {}
    faults = [f"{op} is applied to its logits" for op in softmax.bends]
    both: tuple[list[Source], list[Source]] = [], []
    shared: set[Hashable] = set()
    for product in softmax.products:
        for side, i in enumerate((product.query, 1 - product.query)):
            view = pull(product.node, i, product.view)
            if view is None:
                continue
            if side == 1:
                shared |= view.names
            if side == 0 and ("row", softmax.axis) in view.names:
                faults.append("queries and keys cannot be distinguished")
            operand = product.node.inputs[i]
            found, wrong, added = sources(operand, view)
            both[side].extend(found)
            faults += wrong
            notes += added
            kernels = [source for source in found if source.is_kernel and not source.is_inner]
            sums = {("sum", product.node.path, k) for k in range(len(operand.shape))}
            if side == 0 and kernels and all(sums.isdisjoint(s.view.names) for s in kernels):
                faults.append("its queries are not summed over their columns")
            own = {product.node, *_made_of_products(operand)}
            if any(_depends(factor, own) for factor in softmax.factors):
                notes.append("its logits are scaled by what its queries or keys decide")
    for source in (*both[0], *both[1]):
        sizes |= sizes_of(source.view)
    sizes |= {("row", d): n for d, n in enumerate(shape)}
    queries, keys = (tuple(dict.fromkeys(side)) for side in both)
    if softmax.mixes:
        faults.append("logits of several heads are mixed (talking heads)")
    heads, layers, wrong = head_axes(queries, softmax.axis)
    rows = [d for d in range(len(shape)) if d != softmax.axis]
    batch = tuple(d for d in rows if ("row", d) in shared and d not in heads)
    faults = tuple(dict.fromkeys((*faults, *wrong)))
    notes = tuple(dict.fromkeys(notes))
    return Traced(softmax, queries, keys, heads, batch, layers, sizes, faults, notes)


def head_axes(
    queries: Sequence[Source], key_axis: int
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], list[str]]:
    """Finds the axes of heads and the scans over layers among the axes of query kernels.

    Args:
      queries: The positions of queries, by the axes of the logits.
      key_axis: The axis of the logits that numbers the keys.

    Returns:
      The axes of heads, outermost first; the paths of the scans; and why they are not clear.
    """
    kernels = [source for source in queries if source.is_kernel]
    order: dict[int, tuple[int, int]] = {}
    layers: dict[tuple[int, ...], None] = {}
    faults = [] if kernels else ["its queries come from no parameter"]
    for source in kernels:
        for d, axis in enumerate(source.view.axes):
            for name in axis.names:
                kind = name[0]  # pyright: ignore[reportIndexIssue]
                if kind == "row" and name != ("row", key_axis):
                    order.setdefault(name[1], (d, -_stride(axis, name)))  # pyright: ignore
                    if not axis.is_exact:
                        faults.append("its heads are not clear")
                elif kind == "layer":
                    layers[name[1]] = None  # pyright: ignore
                elif kind in ("loop", "pick"):
                    faults.append("its layer is chosen by a loop counter or by data")
                elif kind == "shard" and any(n[0] == "row" for n in axis.names):  # pyright: ignore
                    faults.append("its heads are split by shard_map")
    return tuple(sorted(order, key=order.__getitem__)), tuple(sorted(layers, key=len)), faults


def _stride(axis: Axis, name: Hashable) -> int:
    return max((stride for stride, digit in axis.terms if base(digit.name) == name), default=0)


def sources(node: Node, view: View) -> tuple[list[Source], list[str], list[str]]:
    """Walks back from queries or keys to the parameters that they are linear in.

    Args:
      node: The queries or keys.
      view: A view of them.

    Returns:
      Where they are in parameters, what cannot be read on the way, and what is added to them that
      no parameter decides.
    """
    found: list[Source] = []
    faults: list[str] = []
    added: list[str] = []

    def follow(node: Node, view: View, marks: frozenset[str]) -> Iterator[tuple[int, Any]]:
        if node.kind == DATA and (node.op in ("mul", "div") or is_scaling(node)):
            yield from _carriers(node, marks)
        elif node.kind != DATA or node.op in PRODUCTS:
            return
        elif node.op in LINEAR or node.op in _MOVES:
            if node.op in ("add", "sub") and any(map(_is_offset, node.inputs)):
                added.append("a constant is added to its queries or keys")
            for i, operand in enumerate(node.inputs):
                if operand.kind != CONSTANT and is_float(operand):
                    yield i, marks
        elif node.op in ELEMENTWISE:
            for i, operand in enumerate(node.inputs):
                if is_float(operand):
                    yield i, marks | {node.op}

    for reached, at, marks in walk(node, view, follow, frozenset()):
        if reached.kind == PARAMETER:
            parameters = [(r, False) for r in parameters_of(reached, at)]
        elif reached.kind == DATA and reached.op in PRODUCTS and not is_scaling(reached):
            parameters = [(r, True) for r in _kernels(reached, at)]
            if not parameters:
                faults.append("a product with an array that is no parameter is on the way")
        elif reached.kind == DATA and not has_rule(reached.op) and reached.inputs:
            faults.append(f"{reached.op}, which has no rule, is on the way")
            continue
        else:
            if reached.op == "input":
                added.append("an input of the model is added to its queries or keys")
            continue
        for r, is_kernel in parameters:
            found.append(Source(r.node.number, r.view, is_kernel, marks | r.marks, r.is_chained))
    return found, faults, added


def _is_offset(node: Node) -> bool:
    """Returns whether a value is a constant other than 0."""
    is_zero = node.op == "literal" and not np.any(node.value)
    return node.kind == CONSTANT and is_float(node) and not is_zero


def _kernels(node: Node, view: View) -> Iterator[Any]:
    """Yields the parameters of a product with activations."""
    for i, operand in enumerate(node.inputs[:2]):
        if operand.kind == PARAMETER and not _is_activation(node, i):
            pulled = pull(node, i, view)
            if pulled is not None:
                yield from parameters_of(operand, pulled)


def _is_activation(node: Node, i: int) -> bool:
    """Returns whether this operand of two parameters is a learned token."""
    both = all(v.kind == PARAMETER for v in node.inputs[:2])
    return both and node.op == "dot_general" and is_tiled(node, i)


def _carriers(node: Node, marks: frozenset[str]) -> Iterator[tuple[int, frozenset[str]]]:
    """Yields which factor carries queries; the other is a scale, a gain, a rotation or a norm."""
    active = [i for i, v in enumerate(node.inputs) if v.kind == DATA]
    if node.op == "div" and 0 in active:
        active = [0]
    made = [i for i in active if _made_of_products(node.inputs[i])] or active
    plain = made if len(made) == 1 else [i for i in made if not _is_factor(node.inputs[i])] or made
    for i in plain:
        others = [v for k, v in enumerate(node.inputs) if k != i and v.kind == DATA]
        own = _made_of_products(node.inputs[i])
        found = {mark for v in others if (mark := _depends(v, own))}
        yield i, marks | found | ({"mul"} if len(plain) > 1 else set())


def _is_factor(node: Node) -> bool:
    """Returns whether a value is a scale, a rotation or a gate, and no queries."""
    while node.op not in _FACTORS and node.op in _MOVES | COPIES | {"neg"} and node.inputs:
        node = node.inputs[0]
    if node.op in _FACTORS or node.kind == CONSTANT:
        return True
    active = [v for v in node.inputs if v.kind == DATA]
    return node.op in ("mul", "add", "max") and all(map(_is_factor, active))


def _made_of_products(node: Node) -> set[Node]:
    """Returns the values between a product and a value, without rotations and scales."""
    before = reached_back([node], stop=lambda v: v.op in PRODUCTS or v.kind != DATA)
    todo = [v for v in before if v.op in PRODUCTS and v.kind == DATA]
    found: set[Node] = set()
    while todo:
        v = todo.pop()
        found.add(v)
        todo += [user for user in v.users if user in before and user not in found]
    return found


def _depends(factor: Node, own: set[Node]) -> str | None:
    """Returns `norm` if a factor is computed from a reduction of the queries that it scales.

    It is `mul` if the factor depends on the queries in another way.
    """
    seen, todo, found = set(), [(factor, False)], None
    while todo:
        node, reduced = todo.pop()
        if node in own:
            found = "norm" if reduced or found == "norm" else "mul"
        elif (node, reduced) not in seen and node.op not in PRODUCTS:
            seen.add((node, reduced))
            todo += [(v, reduced or node.op in REDUCTIONS) for v in node.inputs]
    return found

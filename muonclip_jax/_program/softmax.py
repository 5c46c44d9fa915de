"""Finds every softmax over a product of activations, from the row maximum that it subtracts."""

from collections.abc import Iterator

from muonclip_jax._program.axes import View, identity
from muonclip_jax._program.graph import CONSTANT, DATA, Graph, Node
from muonclip_jax._program.logits import (
    COPIES,
    SAME,
    Softmax,
    multiplies_elementwise,
    products,
    softmax_of,
)
from muonclip_jax._program.rules import ELEMENTWISE, MOVES, REDUCTIONS, pull
from muonclip_jax._program.walk import names_of_product

_EXPONENTIALS = frozenset({"exp", "exp2"})


def softmaxes(graph: Graph) -> tuple[list[Softmax], list[Node]]:
    """Finds the attention of a program.

    Args:
      graph: The program.

    Returns:
      Every softmax over a product of activations that weighs values; and every exponential of such
      a product that weighs values and belongs to none of them.
    """
    found, taken, unread = [], set(), []
    forward = [node for node in graph.nodes if node in graph.live and not node.is_backward]
    for top in forward:
        if top.op != "reduce_max" or top.kind != DATA or len(top.params["axes"]) != 1:
            continue
        axis = int(top.params["axes"][0])
        exps = [e for e in _exponentials(top) if _weighs_values(e, axis)]
        if any(_hides_later(e, top) for e in exps):
            continue  # and so one of the suspects
        taken |= set(exps)
        base = 2 if exps and exps[0].op == "exp2" else 0
        if exps and (softmax := softmax_of(top, top.inputs[0].shape, axis, base)):
            found.append(softmax)
        elif exps and multiplies_elementwise(top.inputs[0], axis):
            taken -= set(exps)
            unread += exps
    suspects = [
        e
        for e in forward
        if e.op in _EXPONENTIALS and e.kind == DATA and e not in taken and _is_suspect(e)
    ]
    return found, [*suspects, *unread, *filter(_is_segmented, forward)]


def _exponentials(top: Node) -> Iterator[Node]:
    """Yields the exponentials of `x - max(x)`, also with a maximum over blocks or a log-sum-exp."""
    masks: set[Node] = set()
    logits = {*_copies(top.inputs[0], masks, collect=True)}
    passes = COPIES | MOVES | {"max", "select_n", "carry", "join", "add", "log", "reduce_sum"}
    seen = set()
    for node in _forward(top, passes):
        if node.op == "sub" and not logits.isdisjoint(_copies(node.inputs[0], masks)):
            # A scale or a mask after the subtraction would not be in the row maximum.
            for after in _forward(node, COPIES | MOVES):
                if after.op in _EXPONENTIALS and after not in seen:
                    seen.add(after)
                    yield after


def _copies(node: Node, masks: set[Node], *, collect: bool = False) -> Iterator[Node]:
    """Yields a value, and what it is a copy of: cast, moved, or masked.

    Args:
      node: The value.
      masks: The masks that it may have.
      collect: Whether it may have any mask, which is added to them.
    """
    todo = [node]
    while todo:
        node = todo.pop()
        yield node
        if node.op in COPIES | MOVES and len(node.inputs) == 1:
            todo += node.inputs
        elif node.op == "select_n":
            mask = {*_copies(node.inputs[0], set())}
            masks |= mask if collect else set()
            if not masks.isdisjoint(mask):
                todo += [v for v in node.inputs[1:] if v.kind == DATA]


def _hides_later(exponential: Node, top: Node) -> bool:
    """Returns whether pairs are hidden after the row maximum, before the exponentials are summed.

    A mask that hid them before the row maximum too is none of these. Dropout hides after the
    division by the sum.
    """
    masks: set[Node] = set()
    masks: set[Node] = set()
    for _ in _copies(top.inputs[0], masks, collect=True):
        pass
    for node in _forward(exponential, COPIES | {"mul", "select_n"}):
        if node.op in ("mul", "select_n") and any(u.op == "reduce_sum" for u in node.users):
            hiding = node.inputs[:1] if node.op == "select_n" else node.inputs
            others = (v for v in hiding if v.shape and not _depends(v, exponential))
            if any(masks.isdisjoint(_copies(v, set())) for v in others):
                return True
    return False


def _forward(start: Node, passes: frozenset[str]) -> Iterator[Node]:
    """Yields what a value reaches through some primitives, itself left out."""
    seen, todo = {start}, [*start.users]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if node.op in passes:
            todo += node.users


def _weighs_values(exponential: Node, axis: int) -> bool:
    """Returns whether exponentials are multiplied with values and summed along the keys.

    Args:
      exponential: The exponentials.
      axis: Their axis of keys; None for any.
    """
    parents: dict[Node, Node] = {exponential: exponential}
    todo = [exponential]
    while todo:
        node = todo.pop()
        for user in node.users:
            i = next(k for k, v in enumerate(user.inputs) if v is node)
            if user in parents or user.is_backward:
                continue
            parents[user] = node
            if user.op == "dot_general" and i < 2:
                other = user.inputs[1 - i]
                summed = _summed(user, i, parents, exponential)
                if other.kind != CONSTANT and _sums(summed, axis):
                    return True
                todo.append(user)  # a mask or a mixture of heads, as a product
            elif _is_weighted_sum(user, node, exponential):
                return True
            elif user.op in SAME | MOVES:
                todo.append(user)
    return False


def _summed(user: Node, i: int, parents: dict[Node, Node], start: Node) -> View | None:
    """Pulls the operand of a product back to the exponentials."""
    view: View | None = names_of_product(user, i)
    node = user.inputs[i]
    while node is not start and view is not None:
        parent = parents[node]
        at = next(k for k, v in enumerate(node.inputs) if v is parent)
        view, node = pull(node, at, view), parent
    return view


def _sums(view: View | None, axis: int) -> bool:
    names = view.axes[axis].names if view is not None else frozenset()
    return any(name[0] == "in" for name in names)  # pyright: ignore


def _is_weighted_sum(user: Node, node: Node, start: Node) -> bool:
    """Returns whether exponentials times values are summed, without a `dot_general`."""
    if user.op != "reduce_sum" or node.op != "mul":
        return False
    others = [v for v in node.inputs if v.kind == DATA and v.shape == node.shape]
    return len(others) == 2 and not all(_depends(v, start) for v in others)


def _depends(node: Node, start: Node) -> bool:
    seen, todo = set(), [node]
    while todo:
        v = todo.pop()
        if v is start:
            return True
        if v not in seen and (v.op in ELEMENTWISE | MOVES | REDUCTIONS):
            seen.add(v)
            todo += v.inputs
    return False


def _is_suspect(exponential: Node) -> bool:
    """Returns whether this is a softmax without a row maximum."""
    (x,) = exponential.inputs
    view = identity(x.shape, [("row", d) for d in range(len(x.shape))])
    return any(
        n > 1 and _weighs_values(exponential, axis) and any(products(x, view, ("row", axis)))
        for axis, n in enumerate(x.shape)
    )


def _is_segmented(node: Node) -> bool:
    """Returns whether this is the maximum of a softmax over segments, as over edges of a graph."""
    if node.op not in ("scatter-max", "scatter_max") or node.kind != DATA:
        return False
    logits = node.inputs[2]
    view = identity(logits.shape, [("row", d) for d in range(len(logits.shape))])
    is_logits = multiplies_elementwise(logits, 0) or any(products(logits, view, ("row", 0)))
    after = _forward(node, COPIES | MOVES | {"sub", "select_n", "gather"})
    return is_logits and any(v.op in _EXPONENTIALS for v in after)

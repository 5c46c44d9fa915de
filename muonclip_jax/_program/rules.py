"""One small rule for each primitive: a view of its result as a view of an operand.

A rule returns None where no element of the operand is in the view. A primitive without a rule
loses the axes: its operands depend on all names in an unknown way.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from muonclip_jax._program import axes
from muonclip_jax._program.axes import Axis, View, lost, named
from muonclip_jax._program.graph import Node

Rule: TypeAlias = Callable[[Node, int, View], View | None]

# Each element of the result depends on the elements of the operands at the same index.
LINEAR = frozenset(
    "add add_any sub mul div neg select_n convert_element_type copy copy_p stop_gradient "
    "sharding_constraint optimization_barrier name reduce_precision real imag complex conj "
    "device_put reshard mesh_cast mesh_context pvary psum psum_invariant pbroadcast "
    "layout_constraint reduce_from_sharded carry join".split()
)
ELEMENTWISE = LINEAR | frozenset(
    "rem abs sign floor ceil round exp exp2 log log1p expm1 sin cos tan tanh sinh cosh asin acos "
    "atan atan2 asinh acosh atanh logistic sqrt rsqrt cbrt square pow integer_pow max min clamp "
    "eq ne lt le gt ge and or xor not is_finite erf erfc erf_inv lgamma digamma nextafter "
    "shift_left shift_right_logical shift_right_arithmetic bitcast_convert_type pmax pmin".split()
)
REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax "
    "argmin".split()
)
# Each element of the result is an element of an operand, or 0.
MOVES = frozenset(
    "transpose reshape broadcast_in_dim squeeze expand_dims slice split concatenate pad "
    "dynamic_slice rev unstack stack tile layer shard unshard".split()
)
# Primitives that choose along one axis: of experts, tokens or classes.
CHOICES = frozenset("top_k approx_top_k sort argmax argmin".split())


def pull(node: Node, i: int, view: View) -> View | None:
    """Returns the view of operand `i` of a node that a view of the node is.

    Args:
      node: The node.
      i: Which operand.
      view: A view of the node.

    Returns:
      The view; None if it has none of the operand's elements.
    """
    operand = node.inputs[i]
    if not operand.shape:
        return View((), view.parts, view.is_partial)
    if node.op in ELEMENTWISE and len(operand.shape) == len(node.shape):
        return _elementwise(node, i, view)
    rule = _RULES.get(node.op, _unknown)
    return rule(node, i, view)


def has_rule(op: str) -> bool:
    """Returns whether a primitive has a rule."""
    return op in ELEMENTWISE or op in _RULES


def choice_axis(node: Node) -> int:
    """Returns the axis along which a node chooses."""
    if node.op == "sort":
        return int(node.params["dimension"])
    if node.op in REDUCTIONS:
        return int(node.params["axes"][0])
    if node.op == "approx_top_k":
        return node.params["reduction_dimension"] % len(node.inputs[0].shape)
    return node.params.get("axis", len(node.inputs[0].shape) - 1) % len(node.inputs[0].shape)


def _ints(values: Iterable[Any]) -> tuple[int, ...]:
    """Returns plain integers: `vmap` leaves NumPy integers in parameters."""
    return tuple(map(int, values))


def _elementwise(node: Node, i: int, view: View) -> View:
    """Axes of size 1 are repeated."""
    sizes = zip(view.axes, node.inputs[i].shape, node.shape, strict=True)
    return view._replace(axes=tuple(axis if n == m else Axis() for axis, n, m in sizes))


def _unknown(node: Node, i: int, view: View) -> View:
    axis = lost(names=view.names)
    sizes = node.inputs[i].shape
    return View(tuple(axis if n > 1 else Axis() for n in sizes), view.parts, is_partial=True)


def _transpose(node: Node, i: int, view: View) -> View:
    return axes.transpose(view, _ints(node.params["permutation"]))


def _reshape(node: Node, i: int, view: View) -> View:
    shape, order = node.inputs[i].shape, node.params.get("dimensions")
    if order is None:
        return axes.reshape(view, node.shape, shape)
    order = _ints(order)  # a transpose first, as the rule of `vmap` for convolutions has it
    view = axes.reshape(view, node.shape, tuple(shape[d] for d in order))
    return axes.transpose(view, order)


def _broadcast_in_dim(node: Node, i: int, view: View) -> View:
    return axes.broadcast(view, _ints(node.params["broadcast_dimensions"]), node.inputs[i].shape)


def _squeeze(node: Node, i: int, view: View) -> View:
    return axes.squeeze(view, _ints(node.params["dimensions"]))


def _expand_dims(node: Node, i: int, view: View) -> View:
    gone = {d % len(node.shape) for d in node.params["dimensions"]}
    return view._replace(axes=tuple(a for d, a in enumerate(view.axes) if d not in gone))


def _slice(node: Node, i: int, view: View) -> View:
    return axes.slices(
        view, _ints(node.params["start_indices"]), _ints(node.params["strides"] or ()) or None
    )


def _split(node: Node, i: int, view: View) -> View:
    starts = [0] * len(node.shape)
    starts[node.params["axis"]] = int(sum(node.params["sizes"][: node.out]))
    return axes.slices(view, starts, None)


def _unstack(node: Node, i: int, view: View) -> View:
    d = int(node.params["axis"])
    return view._replace(axes=(*view.axes[:d], Axis(node.out), *view.axes[d:]))


def _stack(node: Node, i: int, view: View) -> View | None:
    d = int(node.params["axis"])
    at = axes.piece(view, d, i, 1)
    return at and at._replace(axes=(*at.axes[:d], *at.axes[d + 1 :]))


def _tile(node: Node, i: int, view: View) -> View:
    return axes.tile(view, node.inputs[0].shape)


def _rev(node: Node, i: int, view: View) -> View:
    return axes.reverse(view, _ints(node.params["dimensions"]), node.shape)


def _concatenate(node: Node, i: int, view: View) -> View | None:
    d = int(node.params["dimension"])
    start = sum(operand.shape[d] for operand in node.inputs[:i])
    return axes.piece(view, d, start, node.inputs[i].shape[d])


def _pad(node: Node, i: int, view: View) -> View | None:
    shape, found = node.inputs[0].shape, view
    for d, (low, _, interior) in enumerate(node.params["padding_config"]):
        if interior and shape[d] > 1:
            return _unknown(node, i, view)
        found = found and axes.piece(found, d, int(low), shape[d])
    return found


def _dynamic_slice(node: Node, i: int, view: View) -> View | None:
    if i:
        return None
    found, shape = [], node.inputs[0].shape
    for d, (axis, n, m) in enumerate(zip(view.axes, shape, node.shape, strict=True)):
        start = node.inputs[1 + d]
        if n == m:
            found.append(axis)
        elif start.op == "literal":
            at = min(max(int(start.value), 0), n - m)
            found.append(axes.slices(View((axis,)), [at], None).axes[0])
        elif m == 1:  # any of them
            found.append(named(("loop", node.path, d), n))
        else:
            found.append(lost(axis, names=[("loop", node.path, d)]))
    return view._replace(axes=tuple(found))


def _gather(node: Node, i: int, view: View) -> View | None:
    numbers, sizes = node.params["dimension_numbers"], node.params["slice_sizes"]
    if i:
        outer = [d for d in range(len(node.shape)) if d not in numbers.offset_dims]
        return view._replace(axes=(*(view.axes[d] for d in outer), Axis()))
    batching = dict(
        zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    )
    outer = [d for d in range(len(node.shape)) if d not in numbers.offset_dims]
    offsets = iter(numbers.offset_dims)
    found = []
    for d, n in enumerate(node.inputs[0].shape):
        if d in batching:
            found.append(view.axes[outer[batching[d]]])
        elif d in numbers.collapsed_slice_dims:
            found.append(named(("pick", node.path, d), n))
        else:
            axis = view.axes[next(offsets)]
            found.append(axis if sizes[d] == n else lost(axis, names=[("pick", node.path, d)]))
    return view._replace(axes=tuple(found))


def _reduce(node: Node, i: int, view: View) -> View:
    rest = iter(view.axes)
    gone = node.params["axes"]
    shape = node.inputs[i].shape
    found = [
        named(("sum", node.path, d), n) if d in gone else next(rest) for d, n in enumerate(shape)
    ]
    return view._replace(axes=tuple(found))


def _dot_general(node: Node, i: int, view: View) -> View:
    contract, batch = (sides[i] for sides in node.params["dimension_numbers"])
    shape = node.inputs[i].shape
    free = [d for d in range(len(shape)) if d not in contract and d not in batch]
    start = len(batch) if i == 0 else len(node.shape) - len(free)
    found = {d: view.axes[k] for k, d in enumerate(batch)}
    found |= {d: view.axes[start + k] for k, d in enumerate(free)}
    found |= {d: named(("sum", node.path, k), shape[d]) for k, d in enumerate(contract)}
    return view._replace(axes=tuple(found[d] for d in range(len(shape))))


def _conv_general_dilated(node: Node, i: int, view: View) -> View:
    """Pixels stay where they are only under kernels of one pixel."""
    numbers, params = node.params["dimension_numbers"], node.params
    if params["feature_group_count"] > 1 or params["batch_group_count"] > 1:
        return _unknown(node, i, view)
    spec, out, shape = (
        (numbers.lhs_spec, numbers.rhs_spec)[i],
        numbers.out_spec,
        node.inputs[i].shape,
    )
    found = {spec[0]: view.axes[out[i]], spec[1]: named(("sum", node.path, 0), shape[spec[1]])}
    for k, (d, pixel, kernel) in enumerate(
        zip(spec[2:], out[2:], numbers.rhs_spec[2:], strict=True)
    ):
        if i == 1:
            found[d] = named(("sum", node.path, 1 + k), shape[d])
        else:
            moved = node.inputs[1].shape[kernel] > 1 or shape[d] != node.shape[pixel]
            found[d] = lost(view.axes[pixel]) if moved else view.axes[pixel]
    return view._replace(axes=tuple(found[d] for d in range(len(shape))))


def _ragged_dot_general(node: Node, i: int, view: View) -> View:
    """Rows of the first operand times the matrix of their group."""
    numbers = node.params["ragged_dot_dimension_numbers"]
    contract, batch = (sides[i] for sides in numbers.dot_dimension_numbers)
    groups = numbers.rhs_group_dimensions
    if i > 1 or batch or len(groups) != 1:
        return _unknown(node, i, view)
    shape = node.inputs[i].shape
    gone = {*contract, *(groups if i == 1 else ())}
    free = [d for d in range(len(shape)) if d not in gone]
    start = 0 if i == 0 else len(node.shape) - len(free)
    found = {d: view.axes[start + k] for k, d in enumerate(free)}
    found |= {d: named(("sum", node.path, k), shape[d]) for k, d in enumerate(contract)}
    if i == 1:
        found |= {d: named(("pick", node.path, d), shape[d]) for d in groups}
    return view._replace(axes=tuple(found[d] for d in range(len(shape))))


def _layer(node: Node, i: int, view: View) -> View:
    length = node.inputs[0].shape[0]
    return view._replace(axes=(named(("layer", node.path), length), *view.axes))


def _stacked(node: Node, i: int, view: View) -> View:
    return view._replace(axes=view.axes[1:])


def _shard(node: Node, i: int, view: View) -> View:
    """A shard of an operand of `shard_map`: which one is one more named index."""
    found = []
    for axis, mesh_axes, n, m in zip(
        view.axes, node.params["mesh_axes"], node.inputs[0].shape, node.shape, strict=True
    ):
        if n == m or not axis.is_exact:
            found.append(axis if n == m else lost(axis, names=[("shard", mesh_axes)]))
        else:
            (term,) = named(("shard", mesh_axes), n // m).terms
            found.append(Axis(axis.offset, (*axis.terms, (m, term[1]))))
    return view._replace(axes=tuple(found))


def _unshard(node: Node, i: int, view: View) -> View:
    sizes = zip(view.axes, node.shape, node.inputs[0].shape, strict=True)
    return view._replace(axes=tuple(axis if n == m else lost(axis) for axis, n, m in sizes))


def _all_gather(node: Node, i: int, view: View) -> View:
    d = node.params["all_gather_dimension"]
    if not node.params.get("tiled"):
        return view._replace(axes=(*view.axes[:d], *view.axes[d + 1 :]))
    return view._replace(axes=(*view.axes[:d], lost(view.axes[d]), *view.axes[d + 1 :]))


def _choose(node: Node, i: int, view: View) -> View:
    """`top_k` and `sort`: which elements are chosen along the axis is unknown."""
    d = choice_axis(node)
    axis = lost(view.axes[d])
    return view._replace(axes=(*view.axes[:d], axis, *view.axes[d + 1 :]))


def _cumulative(node: Node, i: int, view: View) -> View:
    d = int(node.params["axis"])
    return view._replace(axes=(*view.axes[:d], lost(view.axes[d]), *view.axes[d + 1 :]))


_RULES: dict[str, Rule] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast_in_dim,
    "squeeze": _squeeze,
    "expand_dims": _expand_dims,
    "slice": _slice,
    "split": _split,
    "unstack": _unstack,
    "rev": _rev,
    "concatenate": _concatenate,
    "pad": _pad,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "conv_general_dilated": _conv_general_dilated,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
    "layer": _layer,
    "stack": _stack,
    "stacked": _stacked,
    "tile": _tile,
    "shard": _shard,
    "unshard": _unshard,
    "all_gather": _all_gather,
    "all_gather_invariant": _all_gather,
    "sort": _choose,
    "top_k": _choose,
    "approx_top_k": _choose,
    "cumsum": _cumulative,
    "cumprod": _cumulative,
    "cummax": _cumulative,
    "cumlogsumexp": _cumulative,
    **dict.fromkeys(REDUCTIONS, _reduce),
}

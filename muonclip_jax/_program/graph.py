"""All values of a program as one graph, with calls, loops and branches opened."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax

from muonclip_jax._program.jaxprs import (
    bare,
    call_name,
    called,
    is_opaque,
    is_tracer,
    mesh_axes,
    scan_counts,
)
from muonclip_jax._program.writes import Write, written

# The origin of a value: constants, parameters and constants, or anything else.
CONSTANT, PARAMETER, DATA = 0, 1, 2
PRODUCTS = frozenset({"dot_general", "ragged_dot_general", "conv_general_dilated"})
_BACKWARD = ("transpose(", "rematted_computation")


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """One array of the program.

    Attributes:
      op: The primitive, or one of `parameter`, `input`, `constant`, `literal`, `layer` (one slice
        of what a scan runs over), `carry`, `stacked` (by a scan), `join` (of branches),
        `shard`, `unshard`, `kernel`.
      inputs: The operands.
      params: The parameters of the primitive.
      shape: Its shape.
      dtype: Its dtype.
      path: Index of the equation in each program around it, outermost first.
      out: The index of the result of the equation.
      number: Index among the parameters, if it is one.
      value: The number that a literal is, or a constant.
      kind: `CONSTANT`, `PARAMETER` or `DATA`.
      is_backward: Whether automatic differentiation added it.
      users: The nodes that have it as an operand.
    """

    op: str
    inputs: list["Node"]
    params: dict[str, Any]
    shape: tuple[int, ...]
    dtype: Any
    path: tuple[int, ...] = ()
    out: int = 0
    number: int = -1
    value: Any = None
    kind: int = CONSTANT
    is_backward: bool = False
    users: list["Node"] = dataclasses.field(default_factory=list)


class Graph:
    """The values of a program.

    Attributes:
      nodes: All nodes, operands first, except values that a loop carries.
      parameters: The nodes of the parameters.
      outputs: The results of the program.
      live: The nodes that a result depends on.
      differentiates: Whether the program computes gradients.
    """

    def __init__(self, closed: Any, count: int, kernels: Collection[str] = ()):
        """Opens a program.

        Args:
          closed: The result of `jax.make_jaxpr`.
          count: How many of its first arguments are parameters.
          kernels: Names of calls that stay closed.
        """
        self.nodes: list[Node] = []
        self.differentiates = False
        self._kernels = kernels
        self._backward = False
        jaxpr, consts = bare(closed)
        inputs = [
            self._new("parameter" if i < count else "input", var.aval, number=i)
            for i, var in enumerate(jaxpr.invars)
        ]
        self.parameters = inputs[:count]
        self.outputs = self._run(jaxpr, consts, inputs, ())
        for node in self.nodes:
            for operand in node.inputs:
                operand.users.append(node)
        self.live = reached_back(self.outputs)

    def _new(self, op: str, aval: Any, inputs: Sequence[Node] = (), **fields: Any) -> Node:
        shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
        params = fields.pop("params", {})
        node = Node(op, [*inputs], params, tuple(shape), dtype, **fields)
        node.is_backward = self._backward
        self.nodes.append(node)
        return node

    def _run(
        self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Node], path: tuple[int, ...]
    ) -> list[Node]:
        """Adds a program and returns its results."""
        known = [
            self._new("constant", jax.typeof(c), value=c, kind=DATA if is_tracer(c) else CONSTANT)
            for c in consts
        ]
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*known, *inputs], strict=True))

        def read(atom: Any) -> Node:
            if hasattr(atom, "val"):
                return self._new("literal", atom.aval, value=atom.val)
            return env[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            outer = self._backward
            stack = str(eqn.source_info.name_stack)
            if stack and any(mark in stack for mark in _BACKWARD):
                self._backward = True
                self.differentiates = True
            outs = self._equation(eqn, [read(atom) for atom in eqn.invars], (*path, i))
            self._backward = outer
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, inputs: list[Node], path: tuple[int, ...]) -> list[Node]:
        name = eqn.primitive.name
        if self._kernels and call_name(eqn) in self._kernels:
            return self._opaque(eqn, "kernel", inputs, path)
        if is_opaque(name):
            return self._opaque(eqn, "opaque", inputs, path)
        if (inner := called(eqn)) is not None:
            return self._run(*bare(inner), inputs, path)
        loop = _LOOPS.get(name)
        if loop is not None:
            return loop(self, eqn, inputs, path)
        if (write := written(eqn, inputs)) is not None:
            return [self._concatenated(eqn, inputs, write, path)]
        return [
            self._new(name, var.aval, inputs, params=eqn.params, path=path, out=i)
            for i, var in enumerate(eqn.outvars)
        ]

    def _opaque(self, eqn: Any, op: str, inputs: list[Node], path: tuple[int, ...]) -> list[Node]:
        params = {"name": call_name(eqn)}
        return [
            self._new(op, var.aval, inputs, params=params, path=path, out=i)
            for i, var in enumerate(eqn.outvars)
        ]

    def _concatenated(
        self, eqn: Any, inputs: list[Node], write: Write, path: tuple[int, ...]
    ) -> Node:
        """Adds what is before a write, the update, and what is behind it."""
        array, update, axis = inputs[0], inputs[write.update], write.axis
        size, end = array.shape[axis], write.start + update.shape[axis]
        parts = [
            self._range(array, axis, 0, write.start, path),
            update,
            self._range(array, axis, end, size, path),
        ]
        kept = [part for part in parts if part.shape[axis]]
        params = {"dimension": axis}
        return self._new("concatenate", eqn.outvars[0].aval, kept, params=params, path=path)

    def _range(self, array: Node, axis: int, start: int, end: int, path: tuple[int, ...]) -> Node:
        starts = tuple(start if d == axis else 0 for d in range(len(array.shape)))
        shape = tuple(end - start if d == axis else n for d, n in enumerate(array.shape))
        aval = jax.ShapeDtypeStruct(shape, array.dtype)
        params = {"start_indices": starts, "strides": None}
        return self._new("slice", aval, [array], params=params, path=path)

    def _carried(self, start: Node) -> Node:
        node = self._new("carry", None, [start])
        node.shape, node.dtype = start.shape, start.dtype
        return node

    def _scan(self, eqn: Any, inputs: list[Node], path: tuple[int, ...]) -> list[Node]:
        consts, carried = scan_counts(eqn.params)
        jaxpr, closed = bare(eqn.params["jaxpr"])
        carries = [self._carried(node) for node in inputs[consts : consts + carried]]
        layers = [
            self._new("layer", var.aval, [node], path=path)
            for node, var in zip(
                inputs[consts + carried :], jaxpr.invars[consts + carried :], strict=True
            )
        ]
        outs = self._run(jaxpr, closed, [*inputs[:consts], *carries, *layers], path)
        for carry, out in zip(carries, outs[:carried], strict=True):
            carry.inputs.append(out)
        stacked = zip(outs[carried:], eqn.outvars[carried:], strict=True)
        stacks = [self._new("stacked", var.aval, [out], path=path) for out, var in stacked]
        return [*outs[:carried], *stacks]

    def _while(self, eqn: Any, inputs: list[Node], path: tuple[int, ...]) -> list[Node]:
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carries = [self._carried(node) for node in inputs[n + m :]]
        outs = self._run(*bare(eqn.params["body_jaxpr"]), [*inputs[n : n + m], *carries], path)
        for carry, out in zip(carries, outs, strict=True):
            carry.inputs.append(out)
        return carries

    def _cond(self, eqn: Any, inputs: list[Node], path: tuple[int, ...]) -> list[Node]:
        branches = [
            self._run(*bare(branch), inputs[1:], (*path, i))
            for i, branch in enumerate(eqn.params["branches"])
        ]
        joined = zip(zip(*branches, strict=True), eqn.outvars, strict=True)
        return [self._new("join", var.aval, outs, path=path) for outs, var in joined]

    def _shard_map(self, eqn: Any, inputs: list[Node], path: tuple[int, ...]) -> list[Node]:
        jaxpr, consts = bare(eqn.params["jaxpr"])
        shards = []
        for node, var, spec in zip(inputs, jaxpr.invars, eqn.params["in_specs"], strict=True):
            params = {"mesh_axes": mesh_axes(spec, len(node.shape))}
            shards.append(self._new("shard", var.aval, [node], params=params, path=path))
        outs = self._run(jaxpr, consts, shards, path)
        pairs = zip(outs, eqn.outvars, strict=True)
        return [self._new("unshard", var.aval, [out], path=path) for out, var in pairs]


def reached_back(
    starts: Iterable[Node], stop: Callable[[Node], bool] = lambda node: False
) -> set[Node]:
    """Returns the nodes that some nodes depend on, these included.

    Args:
      starts: The nodes to begin with.
      stop: Whether what a node depends on is left out.

    Returns:
      The nodes.
    """
    found, todo = set(), [*starts]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += () if stop(node) else node.inputs
    return found


_LOOPS = {
    "scan": Graph._scan,
    "while": Graph._while,
    "cond": Graph._cond,
    "shard_map": Graph._shard_map,
}

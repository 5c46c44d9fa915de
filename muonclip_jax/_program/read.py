"""Traces a function on shapes and reads the program."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from muonclip_jax._common.paths import leaf_paths
from muonclip_jax._common.types import ArrayTree
from muonclip_jax._program.closed import Closed, activations, trace_closed
from muonclip_jax._program.describe import AttentionSite, closed_site, describe, distinct
from muonclip_jax._program.graph import DATA, Graph, Node
from muonclip_jax._program.rules import has_rule
from muonclip_jax._program.sites import Traced, trace
from muonclip_jax._program.softmax import softmaxes
from muonclip_jax._program.uses import is_float
from muonclip_jax._program.walk import set_kinds


class Call(NamedTuple):
    """A traced call.

    Attributes:
      closed: Its jaxpr.
      out: The shapes that it returns.
      arrays: The arrays of its arguments, parameters first.
      paths: Components of the path of each parameter.
      positions: Its index among all leaves of the first argument.
    """

    closed: Any
    out: Any
    arrays: list[Any]
    paths: list[tuple[str, ...]]
    positions: list[int]


class Program(NamedTuple):
    """The attention of a program.

    Attributes:
      graph: Its values.
      traced: What is known of each attention that can be read.
      sites: The same in words and numbers; then one layer for each kernel that cannot be read.
      hooked: The kernels that were named; their layers are the last ones.
      suspects: The locations of softmaxes that no layer explains.
      without_rule: How often each primitive without a rule was met.
    """

    graph: Graph
    traced: list[Traced]
    sites: list[AttentionSite]
    hooked: list[Closed]
    suspects: list[str]
    without_rule: dict[str, int]


def call(
    fn: Callable[..., Any], params: ArrayTree, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Call:
    """Traces a call; only arrays and shapes are traced, everything else stays what it is.

    Args:
      fn: The function.
      params: Its first argument.
      args: Its other arguments.
      kwargs: Its keyword arguments.

    Returns:
      The traced call.

    Raises:
      ValueError: if `params` has no arrays.
    """
    leaves, treedef = jax.tree.flatten((params, tuple(args), dict(kwargs)))
    count = len(jax.tree.leaves(params))
    dynamic = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    positions = [i for i in dynamic if i < count]
    if not positions:
        raise ValueError("the first argument of fn must be the parameters, and it has no arrays.")

    def flat(*arrays: Any) -> Any:
        full = list(leaves)
        for i, array in zip(dynamic, arrays, strict=True):
            full[i] = array
        first, others, named = jax.tree.unflatten(treedef, full)
        return fn(first, *others, **named)

    arrays = [leaves[i] for i in dynamic]
    closed, out = jax.make_jaxpr(flat, return_shape=True)(*arrays)
    paths = leaf_paths(params)
    return Call(closed, out, arrays, [paths[i] for i in positions], positions)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def read(traced: Call, kernels: Collection[str] = ()) -> Program:
    """Finds the attention of a program.

    Args:
      traced: The program.
      kernels: Names of kernels and functions that stay closed.

    Returns:
      What was found.
    """
    graph = Graph(traced.closed, len(traced.paths), kernels)
    set_kinds(graph)
    found, suspects = softmaxes(graph)
    attentions = [trace(softmax) for softmax in found]
    shapes = [node.shape for node in graph.parameters]
    sites = distinct([describe(one, traced.paths, shapes) for one in attentions])
    closed = _first_results(graph)
    opaque = [trace_closed(n) for n in closed if n.op == "opaque" and _has_two_activations(n)]
    hooked = [trace_closed(n) for n in closed if n.op == "kernel" and not n.is_backward]
    sites += [closed_site(one, traced.paths) for one in (*opaque, *hooked)]
    without = Counter(
        node.op
        for node in closed
        if node.kind == DATA and is_float(node) and node.inputs and not _is_known(node.op)
    )
    places = [f"{node.op} at {node.path}, shape {node.shape}" for node in suspects]
    return Program(graph, attentions, sites, hooked, places, dict(without))


def _first_results(graph: Graph) -> list[Node]:
    """Lists the first result of each equation that is used: splash attention has unused ones."""
    first: dict[tuple[str, tuple[int, ...]], Node] = {}
    for node in graph.nodes:
        if node in graph.live:
            first.setdefault((node.op, node.path), node)
    return list(first.values())


def _has_two_activations(node: Node) -> bool:
    return not node.is_backward and len(activations(node)) > 1


_KNOWN = frozenset(
    "opaque kernel conv_general_dilated dynamic_update_slice scatter scatter_add scatter-add "
    "scatter_mul reduce_window_max reduce_window_sum reduce_window_min reduce_window random_wrap "
    "random_unwrap random_seed random_fold_in random_split select_and_scatter_add".split()
)


def _is_known(op: str) -> bool:
    return has_rule(op) or op in _KNOWN

"""Kernels that cannot be read: where their first two activations come from."""

from typing import NamedTuple

from muonclip_jax._program.axes import identity, sizes_of
from muonclip_jax._program.graph import DATA, Node
from muonclip_jax._program.sites import Source, head_axes, sources
from muonclip_jax._program.uses import is_float


class Closed(NamedTuple):
    """The properties of a kernel that cannot be read.

    Attributes:
      node: The kernel.
      queries: The position of its first activations in parameters.
      keys: The position of its second activations.
      heads: Sizes of the axes of heads, outermost first; 0 if they are not clear.
      layers: Sizes of the scans over layers by their paths, outermost first.
    """

    node: Node
    queries: tuple[Source, ...]
    keys: tuple[Source, ...]
    heads: tuple[int, ...]
    layers: dict[tuple[int, ...], int]


def activations(node: Node) -> list[Node]:
    """Lists the operands of a kernel that may be queries, keys and values."""
    large = (v for v in node.inputs if v.kind == DATA and is_float(v) and len(v.shape) > 1)
    return list(dict.fromkeys(large))


def trace_closed(node: Node) -> Closed:
    """Walks back from a kernel that cannot be read, its first activations taken for the queries.

    Args:
      node: The kernel.

    Returns:
      What is known of it.
    """
    found: list[tuple[Source, ...]] = []
    operands = activations(node)
    for operand in operands[:2]:
        view = identity(operand.shape, [("row", d) for d in range(len(operand.shape))])
        found.append(tuple(dict.fromkeys(sources(operand, view)[0])))
    queries, keys = (*found, (), ())[:2]
    shape = operands[0].shape if operands else (0,)
    heads, layers, unclear = head_axes(queries, len(shape) - 1)
    sizes = dict(size for source in queries for size in sizes_of(source.view).items())
    return Closed(
        node,
        queries,
        keys,
        (0,) if unclear else tuple(shape[d] for d in heads),
        {path: sizes[("layer", path)] for path in layers},
    )

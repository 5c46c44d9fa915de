"""The parameters of a module, and which of their axes number layers."""

import dataclasses
from typing import NamedTuple, TypeAlias

from muonclip_jax._muon.roles import names
from muonclip_jax._muon.roles.role_table import Role

Path: TypeAlias = tuple[str, ...]
Shape: TypeAlias = tuple[int, ...]
# Sides of stacked matrices by the sizes of their batch axes.
Experts: TypeAlias = dict[tuple[Shape, int], list[set[int]]]
# A side this short is doubted if the other one is `_MUCH_LARGER` times as long.
_SMALL_SIDE, _MUCH_LARGER = 4, 8


class Leaf(NamedTuple):
    """A parameter.

    Attributes:
      path: Components of its path.
      core: The same without the components of a container around it, see `names.core`.
      shape: Its shape.
      role: The role that its names have, with the name; None for none.
    """

    path: Path
    core: Path
    shape: Shape
    role: tuple[Role, str] | None

    @property
    def is_inside(self) -> bool:
        """Whether this is the matrix of a module of its own, such as `kernel` in `up/kernel`."""
        return len(self.core) > 1 and names.matches(names.MATRIX_NAMES, self.core[-1])

    @property
    def module(self) -> Path:
        """Path of the module around the projection: `('attn',)` of `attn/query/kernel`."""
        return self.core[: -2 if self.is_inside else -1]

    @property
    def name(self) -> str:
        """Name of the projection: `query` of `attn/query/kernel` and of `attn/query_w`."""
        return self.core[-2] if self.is_inside else names.stem(self.core[-1])

    @property
    def is_known(self) -> bool:
        """Whether a name shows a role, or an array in no module of its own that is a projection."""
        own = self.core[-1]
        known = (*names.PROJECTIONS, names.PERHAPS_OUT, names.GATE, names.GATED_PAIR)
        is_named = any(names.matches(pattern, names.stem(own)) for pattern in known)
        return self.role is not None or self.is_lora or own.isdigit() or is_named

    def has(self, pattern: str) -> bool:
        """Returns whether a component of the path has a name."""
        return any(names.matches(pattern, name) for name in self.core)

    @property
    def is_lora(self) -> bool:
        """Whether this is a low-rank adapter."""
        return any("lora" in name.lower() for name in self.core)


class Stack(NamedTuple):
    """The axes of a parameter that number layers.

    Attributes:
      axes: These axes.
      known: Whether the shapes of vectors show this. If False, `axes` is empty.
      layers: The size of the axis, where parameters without it share the module; else 0.
    """

    axes: tuple[int, ...]
    known: bool
    layers: int = 0

    def without(self, shape: Shape) -> Shape:
        """Returns the shape of one layer."""
        return tuple(n for axis, n in enumerate(shape) if axis not in self.axes)


@dataclasses.dataclass(slots=True)
class Group:
    """The parameters of one module and of the modules below it.

    Attributes:
      lead: The sizes with which every shape begins.
      second: The sizes with which every shape continues after the first axis.
      leaves: Indices of the parameters.
      rank: The largest number of axes.
      gains: Shapes of gains and other vectors of norms, without norms of queries and keys.
      biases: Shapes of biases.
      widths: Shapes of gains, without norms of a low rank.
    """

    lead: Shape
    second: Shape
    leaves: list[int] = dataclasses.field(default_factory=list)
    rank: int = 0
    gains: set[Shape] = dataclasses.field(default_factory=set)
    biases: set[Shape] = dataclasses.field(default_factory=set)
    widths: set[Shape] = dataclasses.field(default_factory=set)

    def stack(self, vectors: set[Shape]) -> Stack | None:
        """Finds the stack axes that vectors show; None if the other shapes contradict."""
        depth = min(map(len, vectors)) - 1
        if depth <= 0:
            return Stack((), True)
        if vectors is self.biases and depth > 1:
            return None  # (layers, heads, head_dim) as well as (layers, layers, outputs)
        both = len(self.lead) >= depth and len(self.second) >= depth == 1
        if both and len(self.leaves) > 1 and self.lead[0] > self.second[0]:
            return Stack((1,), True)  # vectors (width, layers): layers are fewer than the width
        if len(self.lead) >= depth:
            return Stack(tuple(range(depth)), True)
        if len(self.second) >= depth and self.rank > depth + 1:  # stacked matrices have more axes
            return Stack(tuple(range(1, depth + 1)), True)
        return None


def is_tiny(n_in: int, n_out: int) -> bool:
    """Returns whether a matrix has a side of at most 4 and another one 8 times as long."""
    small, large = sorted((n_in, n_out))
    return 0 < small <= _SMALL_SIDE and large >= _MUCH_LARGER * small


def common(a: Shape, b: Shape) -> Shape:
    """Returns the sizes with which both shapes begin."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return a[:count]

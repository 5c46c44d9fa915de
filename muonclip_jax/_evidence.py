"""What the shapes of a pytree show about a parameter: stacked layers, widths, biases.

Layers that `scan` or `vmap` stacks have one more axis in every parameter, of one size. A gain of a
norm is a vector, so that its rank counts the axes of the stack. The sizes of the gains are the
widths of the activations, which enter a projection on its input side.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from muonclip_jax._role_names import (
    INTO_HEADS,
    Role,
    adamw_role,
    core,
    is_numbered,
    is_qk_norm,
    matches,
    near,
)

Path: TypeAlias = tuple[str, ...]
Shape: TypeAlias = tuple[int, ...]


# Sides of stacked matrices by the sizes of their batch axes.
Experts: TypeAlias = dict[tuple[Shape, int], list[set[int]]]


class Leaf(NamedTuple):
    """A parameter.

    Attributes:
      path: Components of its path.
      core: The same without the components of a container around it, see `_role_names.core`.
      shape: Its shape.
      role: The role that its names have, with the name; None for none.
    """

    path: Path
    core: Path
    shape: Shape
    role: tuple[Role, str] | None


class Stack(NamedTuple):
    """The axes of a parameter that number layers.

    Attributes:
      axes: These axes.
      known: Whether the shapes of vectors show this. If False, `axes` is empty.
    """

    axes: tuple[int, ...]
    known: bool

    def without(self, shape: Shape) -> Shape:
        """Returns the shape of one layer."""
        return tuple(n for axis, n in enumerate(shape) if axis not in self.axes)


@dataclasses.dataclass(slots=True)
class Group:
    """The parameters of one module and of the modules below it.

    Attributes:
      lead: The sizes with which every shape begins.
      second: The sizes with which every shape goes on after the first axis.
      leaves: Indices of the parameters.
      gains: Shapes of gains and other vectors of norms, those of queries and keys left out.
      biases: Shapes of biases.
    """

    lead: Shape
    second: Shape
    leaves: list[int] = dataclasses.field(default_factory=list)
    gains: set[Shape] = dataclasses.field(default_factory=set)
    biases: set[Shape] = dataclasses.field(default_factory=set)

    def stack(self, vectors: set[Shape]) -> Stack | None:
        """Finds the stack axes that vectors show; None if the other shapes contradict."""
        depth = min(map(len, vectors)) - 1
        if depth <= 0:
            return Stack((), True)
        if len(self.lead) >= depth:
            return Stack(tuple(range(depth)), True)
        if len(self.second) >= depth:
            return Stack(tuple(range(1, depth + 1)), True)
        return None


class Evidence:
    """Everything that the shapes of a pytree show; built once, read for each parameter.

    Args:
      paths: Components of the path of each parameter.
      shapes: Its shape.

    Attributes:
      leaves: The parameters.
      groups: The parameters of each module.
      children: The names of the children of each module.
      by_core: The parameters by path.
      vocabulary: The long side of the largest embedding; 0 without one.
      embedded: Its short side.
      convention: Whether matrices are outputs first, by the name of the parameter, where shapes
        show it.
    """

    def __init__(self, paths: Sequence[Path], shapes: Sequence[Shape]):
        cores = [core(path) for path in paths]
        self.leaves = [
            Leaf(path, inner, shape, adamw_role(inner))
            for path, inner, shape in zip(paths, cores, shapes, strict=True)
        ]
        self.groups: dict[Path, Group] = {}
        self.children: dict[Path, set[str]] = {}
        for index, leaf in enumerate(self.leaves):
            self._add(index, leaf)
        self.by_core = {leaf.core: leaf for leaf in self.leaves}
        self.vocabulary, self.embedded = self._embedding_sizes()
        self.convention: dict[str, bool] = {}
        self._stacks: dict[Path, Stack] = {}
        self._shared: dict[Path, bool] = {}
        self._experts: dict[Path, Experts] = {}

    def _add(self, index: int, leaf: Leaf) -> None:
        shape, kind = leaf.shape, _vector_kind(leaf)
        for depth in range(len(leaf.core)):
            prefix = leaf.core[:depth]
            group = self.groups.get(prefix)
            if group is None:
                group = self.groups[prefix] = Group(shape, shape[1:])
            else:
                group.lead = _common(group.lead, shape)
                group.second = _common(group.second, shape[1:])
            group.leaves.append(index)
            self.children.setdefault(prefix, set()).add(leaf.core[depth])
            if kind == "gain":
                group.gains.add(shape)
            elif kind == "bias":
                group.biases.add(shape)

    def _embedding_sizes(self) -> tuple[int, int]:
        """Finds the vocabulary and the width of the largest embedding; 0 if there is none."""
        sizes = [
            (max(leaf.shape), min(leaf.shape))
            for leaf in self.leaves
            if leaf.role and leaf.role[0].name == "embedding" and len(leaf.shape) == 2
        ]
        return max(sizes, default=(0, 0))

    def stack_of(self, leaf: Leaf) -> Stack:
        """Finds the stack axes of a parameter.

        The innermost module that has a norm decides; without a norm, the innermost that has a
        bias. A norm outside of the block shows nothing about what is inside.
        """
        prefix = leaf.core[:-1]
        if prefix not in self._stacks:
            self._stacks[prefix] = self._find_stack(prefix)
        stack = self._stacks[prefix]
        fits = all(axis < len(leaf.shape) for axis in stack.axes)
        return stack if fits else Stack((), False)

    def _find_stack(self, prefix: Path) -> Stack:
        for vectors in ("gains", "biases"):
            for depth in range(len(prefix), -1, -1):
                group = self.groups[prefix[:depth]]
                shapes = getattr(group, vectors)
                stack = group.stack(shapes) if shapes else None
                if stack is not None and (stack.axes or self._is_local(prefix, depth)):
                    return stack
                if stack is not None:
                    break
        return Stack((), False)

    def _is_local(self, prefix: Path, depth: int) -> bool:
        """Returns whether vectors of the module at `depth` belong to the block of `prefix`."""
        if len(prefix) - depth > 2:
            return False
        inner = prefix[: depth + 1]
        if inner == prefix[:depth]:
            return True
        group = self.groups[inner]
        ranks = {len(self.leaves[i].shape) for i in group.leaves}
        return not (group.lead and len(group.leaves) > 2 and max(ranks) > 2)

    def shared_axis(self, leaf: Leaf) -> tuple[Path, int] | None:
        """Finds a module in which all of three or more parameters have the same first size.

        Returns:
          The path of the outermost such module and the number of its parameters.
        """
        for depth in range(len(leaf.core)):
            prefix = leaf.core[:depth]
            if self.groups[prefix].lead:
                shared = self._is_shared(prefix)
                return (prefix, len(self.groups[prefix].leaves)) if shared else None
        return None

    def _is_shared(self, prefix: Path) -> bool:
        if prefix not in self._shared:
            shapes = [self.leaves[i].shape for i in self.groups[prefix].leaves]
            several = len(shapes) > 2 and len(set(shapes)) > 1
            self._shared[prefix] = several and max(map(len, shapes)) > 2
        return self._shared[prefix]

    def experts(self, prefix: Path) -> "Experts":
        """Lists stacks of matrices below a module by the sizes of their batch axes.

        Returns:
          For (sizes of all batch axes but the last, size of the last): the sides of the matrices
          of each such parameter.
        """
        if prefix not in self._experts:
            found: Experts = {}
            for leaf in (self.leaves[i] for i in self.groups[prefix].leaves):
                shape = self.stack_of(leaf).without(leaf.shape)
                if len(shape) > 2 and leaf.role is None and not _is_attention(leaf):
                    found.setdefault((shape[:-3], shape[-3]), []).append({*shape[-2:]})
            self._experts[prefix] = found
        return self._experts[prefix]

    def widths(self, leaf: Leaf) -> set[int]:
        """Lists the widths of the activations around a parameter, from gains and embeddings."""
        for depth in range(len(leaf.core) - 1, -1, -1):
            prefix = leaf.core[:depth]
            if gains := self.groups[prefix].gains:
                second = self.stack_of(leaf).axes[:1] == (1,)
                return {shape[0] if second else shape[-1] for shape in gains if shape}
        return {self.embedded} - {0}

    def siblings(self, leaf: Leaf, up: int = 1) -> Iterator[Leaf]:
        """Lists the other parameters below the module that is `up` components above."""
        prefix = leaf.core[: max(len(leaf.core) - up, 0)]
        for index in self.groups[prefix].leaves if prefix in self.groups else ():
            if self.leaves[index] is not leaf:
                yield self.leaves[index]

    def bias_of(self, leaf: Leaf) -> Leaf | None:
        """Finds the bias that is added to what a kernel puts out."""
        *module, name = leaf.core
        names = [f"{name}_bias", f"b_{name[2:]}" if name.startswith("w_") else "b", "bias"]
        if name[:1] == "w" and name[1:].isdigit():
            names.insert(0, f"b{name[1:]}")
        for candidate in names:
            if (bias := self.by_core.get((*module, candidate))) and bias is not leaf:
                return bias
        return None

    def is_numbered(self, leaf: Leaf) -> bool:
        """Returns whether the parameter is in a list or a numbered series of layers."""
        return any(map(is_numbered, leaf.core[:-2]))


def _is_attention(leaf: Leaf) -> bool:
    return any(matches(INTO_HEADS, name) for name in near(leaf.core))


def _common(a: Shape, b: Shape) -> Shape:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return a[:count]


def _vector_kind(leaf: Leaf) -> str:
    """Returns `gain` for a vector of a norm, `bias` for a bias, an empty string for others."""
    if not leaf.shape or leaf.role is None:
        return ""
    role, name = leaf.role
    if role.name == "norm" and not any(map(is_qk_norm, leaf.core)):
        inside = leaf.core[leaf.core.index(name) + 1 :]
        return "gain" if len(inside) <= 1 and not _is_dense(inside) else ""
    if role.name == "bias" or (role.name == "scale" and matches("scale|gain", leaf.core[-1])):
        return "bias" if not any(map(is_qk_norm, leaf.core)) else ""
    return ""


def _is_dense(inside: Path) -> bool:
    return bool(inside) and matches("kernel", inside[0])

"""One attention module of the parameters: its projections, its max logits, its head layout."""

from typing import NamedTuple, TypeAlias

from jaxtyping import Array

from muonclip_jax._head_layouts.head_layout import HeadLayout, Leaf, Shape, axes_first
from muonclip_jax._head_layouts.kernel_pattern import stack_axes

Path: TypeAlias = tuple[str, ...]


class AttentionModule(NamedTuple):
    """An attention module of the parameters, with its max logits.

    Attributes:
      path: Its path.
      head_layout: The head layout that describes it.
      children: All its children by name, with the shapes of their leaves.
      paths: Paths of all leaves below it, from the module on, without leaves of an attention module
        inside it.
      leaves: The leaves at or below the children that the head layout names.
      hidden: Paths of leaves at or below these children that a mask hides.
      max_logits: One entry per call, each with its stack axes at `head_layout.stat_stack_axis`, the
        heads last.
      is_bound: Whether an entry is an upper bound.
    """

    path: Path
    head_layout: HeadLayout
    children: dict[str, list[Shape]]
    paths: tuple[Path, ...]
    leaves: dict[str, list[Leaf]]
    hidden: tuple[str, ...]
    max_logits: list[Array]
    is_bound: bool

    @property
    def name(self) -> str:
        """Its path as one string."""
        return "/".join(self.path)

    @property
    def scaled(self) -> list[tuple[str, Leaf]]:
        """The leaves to scale, each with the name of its child."""
        names = self.head_layout.scaled_leaves
        return [
            (child, leaf)
            for child, leaves in self.leaves.items()
            for leaf in leaves
            if leaf.name in names
        ]

    @property
    def kernels(self) -> dict[str, Leaf]:
        """The kernel of each child that the head layout names."""
        kernel = self.head_layout.scaled_leaves[0]
        return {child: leaf for child, leaf in self.scaled if leaf.name == kernel}

    @property
    def stack(self) -> int:
        """Number of stack axes."""
        return self.stack_of(self.head_layout.modules[0])

    def stack_of(self, child: str) -> int:
        """Returns the number of stack axes of a child's kernel."""
        return len(self.kernels[child].shape) - len(self.head_layout.patterns[child].axes)

    @property
    def stat_axes(self) -> Shape:
        """The stack axes of each entry of the max logits."""
        return stack_axes(self.head_layout.stat_stack_axis, self.stack)

    def heads(self, entry: Array) -> int:
        """Returns the number of query heads of an entry: its last axis that is no stack axis."""
        return entry.shape[axes_first(self.stat_axes, entry.ndim)[-1]]

"""A leaf as several arrays of matrices, such as the heads of a flat projection.

An axis of a leaf may flatten several: (d, heads · head_dim). A split leaf is unflattened first,
then cut along one axis into parts, and each part is a batch of matrices of its own.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._common.types import ArrayTree
from muonclip_jax._orthogonalize.dimension_numbers import (
    DimensionNumbersOrFn,
    matrix_axes,
    per_leaf,
)
from muonclip_jax._orthogonalize.matrices import Axes, sides


class Part(NamedTuple):
    """A part of a leaf.

    Attributes:
      name: What it holds, such as `keys`; empty if the leaf is one part.
      size: Its size along the axis of the cuts.
      axes: Its axes as a batch of matrices.
      unit: What one matrix is, such as `heads`; empty for a matrix without a name.
    """

    name: str
    size: int
    axes: Axes
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Split:
    """How a leaf is split into matrices. Static, and no pytree.

    Attributes:
      sizes: For each axis of the leaf, the sizes of the axes that it flattens.
      axis: The axis of the unflattened leaf that is cut.
      parts: The parts, in the order of that axis.

    Example:
      >>> heads = Part("", 8, Axes((1,), (0,), (2,)), "heads")
      >>> split = Split(sizes=((8,), (2, 4)), axis=0, parts=(heads,))
      >>> split.shape, split.matrices(heads)
      ((8, 2, 4), (2, 8, 4))
    """

    sizes: tuple[tuple[int, ...], ...]
    axis: int
    parts: tuple[Part, ...]

    @classmethod
    def whole(cls, shape: Sequence[int], axes: Axes) -> "Split":
        """Describes a leaf that is one batch of matrices as it is."""
        return cls(tuple((n,) for n in shape), 0, (Part("", shape[0], axes),))

    @classmethod
    def in_groups(cls, shape: Sequence[int], axes: Axes, axis: int, groups: int) -> "Split":
        """Describes the kernel of a convolution in groups, each of which is a matrix.

        Args:
          shape: Shape of the leaf.
          axes: Its axes.
          axis: The axis of the outputs that the groups divide.
          groups: The number of groups along this axis.

        Example:
          >>> split = Split.in_groups((3, 3, 4, 128), Axes((), (0, 1, 2), (3,)), -1, 32)
          >>> split.sizes[3], split.parts[0].axes, split.matrices(split.parts[0])
          ((32, 4), Axes(batch=(3,), reduction=(0, 1, 2), output=(4,)), (32, 36, 4))
        """
        axis %= len(shape)
        sizes: list[tuple[int, ...]] = [(n,) for n in shape]
        sizes[axis] = (groups, shape[axis] // groups)
        batch, reduction, output = (tuple(a + (a >= axis) for a in side) for side in axes)
        found = Axes(tuple(sorted((*batch, axis))), reduction, output)
        return cls(tuple(sizes), 0, (Part("", sizes[0][0], found, "groups"),))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the unflattened leaf."""
        return sum(self.sizes, ())

    def shape_of(self, part: Part) -> tuple[int, ...]:
        """Returns the shape of a part."""
        return (*self.shape[: self.axis], part.size, *self.shape[self.axis + 1 :])

    def matrices(self, part: Part) -> tuple[int, int, int]:
        """Returns the number of matrices of a part, n_in and n_out."""
        shape = self.shape_of(part)
        return math.prod(shape[a] for a in part.axes.batch), *sides(shape, part.axes)


def splits_of(
    caller: str, tree: ArrayTree, dimension_numbers: DimensionNumbersOrFn | None
) -> list[Split]:
    """Finds how each leaf is split into matrices.

    Args:
      caller: Name of the public function that was called.
      tree: Parameters or gradients, or their shapes.
      dimension_numbers: See `per_leaf`; its leaves may be `Split`s too.

    Returns:
      One entry for each leaf of `tree`.

    Raises:
      ValueError: see `matrix_axes`.

    Example:
      >>> import jax.numpy as jnp
      >>> splits_of("muon", {"w": jnp.ones((2, 3))}, None)[0].parts[0].axes
      Axes(batch=(), reduction=(0,), output=(1,))
    """
    name = f"{caller}: weight_dimension_numbers"
    entries: list[MuonDimensionNumbers | Split | None] = [*per_leaf(name, dimension_numbers, tree)]
    leaves, structure = jax.tree.flatten(tree)
    unsplit = structure.unflatten(None if isinstance(e, Split) else e for e in entries)
    axes = matrix_axes(caller, tree, unsplit)
    return [
        entry if isinstance(entry, Split) else Split.whole(leaf.shape, a)
        for entry, leaf, a in zip(entries, leaves, axes, strict=True)
    ]

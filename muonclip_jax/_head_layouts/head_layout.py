"""The base class of head layouts: which columns of a projection belong to which head."""

import abc
import dataclasses
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Array, Float

from muonclip_jax._head_layouts.kernel_pattern import (
    Columns,
    KernelPattern,
    kernel_pattern,
    stack_axes,
)
from muonclip_jax._head_layouts.module_names import normalizes
from muonclip_jax._head_layouts.sections import Sections

Shape: TypeAlias = tuple[int, ...]
# Shapes of the leaves at or below each child of an attention module.
Children: TypeAlias = Mapping[str, Sequence[Shape]]


class Leaf(NamedTuple):
    """One parameter at or below a query or key module.

    Attributes:
      name: Last component of its path, such as `kernel`.
      path: Its path from the attention module on, such as `query/kernel`.
      position: Its index among the flattened parameters.
      shape: Its shape, stack axes included.
      dtype: Its dtype.
    """

    name: str
    path: str
    position: int
    shape: Shape
    dtype: np.dtype

    def __str__(self) -> str:
        """Shows path and shape, as messages do."""
        return f"{self.path} {self.shape}"


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class HeadLayout(abc.ABC):
    """The fields of every head layout.

    A subclass names the children of the attention module (`module_fields`), lists mismatches
    between their kernels and the max logits (`faults`), and assigns the factors of queries and keys
    to columns (`key_heads`, `columns`).

    Attributes:
      module_fields: The fields that hold names of children.
      literals: The literal numbers that `kernel` may contain.
      kernel: This and all others: see `MultiHeadLayout`.
    """

    module_fields: ClassVar[tuple[str, ...]] = ()
    literals: ClassVar[tuple[str, ...]] = ()
    axis_names: ClassVar[tuple[str, ...]] = ("inputs", "heads", "head_dim")

    kernel: str = "inputs heads head_dim"
    stack_axis: int = 0
    stat_stack_axis: int = 0
    stat: str = "max_logits"
    scaled_leaves: tuple[str, ...] = ("kernel", "bias", "lora_b")
    kept_leaves: tuple[str, ...] = ("lora_a",)
    qk_norm: tuple[str, ...] | None = None
    split_values: bool = True
    heads_per_matrix: int | None = 1

    def __post_init__(self):
        self._parse("kernel", self.literals, self.axis_names)
        if not self.scaled_leaves:
            raise ValueError(f"{self}: scaled_leaves must be a tuple, the kernel's name first.")
        for field in ("stack_axis", "stat_stack_axis"):
            self._check_int(field)
        if self.heads_per_matrix is not None:
            self._check_int("heads_per_matrix", 1)
        if not isinstance(self.split_values, bool):
            raise TypeError(f"{self}: split_values must be True or False.")
        for field in ("scaled_leaves", "kept_leaves", "qk_norm"):
            self._check_names(field)
        for field in (*self.module_fields, "stat"):
            if not isinstance(getattr(self, field), str):
                raise ValueError(f"{self}: {field} must be a name, a string.")
        names = self.modules
        if len(set(names)) != len(names):
            raise ValueError(f"{self}: {' and '.join(self.module_fields)} must be two modules.")

    def __repr__(self) -> str:
        """Shows the module names, and each field that differs from its default."""
        others = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        names = dict.fromkeys((*self.module_fields, *others))
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({shown})"

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the children that the attention module must have."""
        return tuple(getattr(self, field) for field in self.module_fields)

    @property
    def patterns(self) -> dict[str, KernelPattern]:
        """The pattern of one layer's kernel, by module name."""
        pattern = kernel_pattern(self.kernel, self.literals, self.axis_names)
        return dict.fromkeys(self.modules, pattern)

    @abc.abstractmethod
    def faults(
        self, kernels: Mapping[str, Leaf], stack: int, heads: int, children: Children
    ) -> Iterator[str]:
        """Lists mismatches.

        Args:
          kernels: The kernels by module name, with `stack` axes of layers each.
          stack: Number of stack axes.
          heads: Number of heads of the max logits.
          children: All children of the attention module.

        Yields:
          One text per fault.
        """

    @abc.abstractmethod
    def key_heads(self, kernels: Mapping[str, Leaf], stack: int, heads: int) -> int:
        """Returns the number of key heads of kernels that fit. Arguments: see `faults`."""

    @abc.abstractmethod
    def columns(
        self,
        kernels: Mapping[str, Leaf],
        gamma: Float[Array, "*stack heads"],
        query: Float[Array, "*stack heads"],
        key: Float[Array, "*stack key_heads"],
    ) -> dict[str, Columns]:
        """Assigns factors to the columns of each head.

        Args:
          kernels: The kernels by module name, which fit.
          gamma: Factor on the logits of each head; equal to `query` times `key` of its key head.
          query: Factor on the queries of each head.
          key: Factor on each key head.

        Returns:
          The factors of all columns, by module name.
        """

    @abc.abstractmethod
    def num_heads(self, kernels: Mapping[str, Leaf], stack: int) -> int:
        """Infers the number of query heads from kernels alone.

        Args:
          kernels: The kernels by module name, with `stack` axes of layers each.
          stack: Number of stack axes.

        Raises:
          ValueError: if the kernels do not show it.
        """

    @abc.abstractmethod
    def sections(self, kernels: Mapping[str, Leaf], stack: int) -> dict[str, Sections]:
        """Describes which columns of each kernel are matrices under `per_head`.

        Args:
          kernels: The kernels by module name, which fit. A mask may hide some.
          stack: Number of stack axes.

        Returns:
          The sections by module name, without sections of hidden kernels.

        Raises:
          ValueError: if the kernels do not show their heads.
        """

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the children that `per_head` splits: the modules, and values if named."""
        return self.modules

    def normalizes(self, child: str) -> str | None:
        """Returns whether a child of the attention module normalizes queries or keys, by its name.

        Args:
          child: Its name.

        Returns:
          See `muonclip_jax._head_layouts.module_names.normalizes`.
        """
        return normalizes(child)

    def fits(self, child: str, shape: Shape, stack: int) -> bool:
        """Returns whether a leaf has the rank of the child's kernel or of its bias."""
        axes = stack_axes(self.stack_axis, stack)
        in_range = all(-len(shape) <= axis < len(shape) for axis in axes)
        return in_range and len(self.patterns[child].axes) + stack - len(shape) in (0, 1)

    def split(self, shape: Shape, stack: int) -> tuple[Shape, Shape]:
        """Splits a leaf's shape into the sizes of its stack and of one layer."""
        axes = stack_axes(self.stack_axis, stack)
        sizes = tuple(shape[axis] for axis in axes_first(axes, len(shape)))
        return sizes[:stack], sizes[stack:]

    def column_shape(self, child: str, shape: Shape, stack: int) -> tuple[Shape, Shape]:
        """Splits a leaf's shape into the sizes of its stack and of its output axes."""
        pattern = self.patterns[child]
        stacked, layer = self.split(shape, stack)
        if len(layer) == len(pattern.axes):
            layer = layer[: pattern.input_axis] + layer[pattern.input_axis + 1 :]
        return stacked, layer

    def sizes(self, child: str, kernel: Leaf, stack: int, **known: int) -> dict[str, int] | None:
        """Infers the sizes of the axes of one layer's kernel; None if they do not fit."""
        return self.patterns[child].sizes(self.split(kernel.shape, stack)[1], known)

    def _parse(self, field: str, literals: tuple[str, ...], names: tuple[str, ...]) -> None:
        """Checks a pattern, and that `head_dim` is given if the kernel does not show its size."""
        value = getattr(self, field)
        if not isinstance(value, str):
            raise TypeError(f"{self}: {field} must be a string of axis names.")
        try:
            pattern = kernel_pattern(value, literals, names)
        except ValueError as error:
            raise ValueError(f"{self}: {field}={error}.") from None
        if pattern.is_flat and getattr(self, "head_dim", 0) is None:
            raise ValueError(f"{self}: {field} has a flattened head axis and needs head_dim=.")

    def _check_names(self, field: str) -> None:
        """Raises if a field is not a tuple of names; a list would not be hashable."""
        value: Any = getattr(self, field)
        is_tuple = isinstance(value, tuple) and all(isinstance(name, str) for name in value)
        if not is_tuple and not (value is None and field == "qk_norm"):
            raise ValueError(f"{self}: {field} must be a tuple of names.")

    def _check_int(self, field: str, minimum: int | None = None) -> None:
        """Raises if a field is not an integer, or below the minimum."""
        value: Any = getattr(self, field)
        try:
            whole = operator.index(value)
        except TypeError:
            raise TypeError(f"{self}: {field} must be an integer.") from None
        if isinstance(value, bool) or (minimum is not None and whole < minimum):
            raise ValueError(f"{self}: {field} must be at least {minimum}.")


def axes_first(axes: Shape, ndim: int) -> list[int]:
    """Orders the axes of an array as `moveaxis` would, with these in front."""
    front = [axis % ndim for axis in axes]
    return front + [axis for axis in range(ndim) if axis not in front]


def layouts_of(value: Any) -> tuple[HeadLayout, ...] | None:
    """Returns a head layout or a tuple of head layouts as a tuple; None for anything else."""
    layouts = value if isinstance(value, tuple) else (value,)
    return layouts if layouts and all(isinstance(one, HeadLayout) for one in layouts) else None

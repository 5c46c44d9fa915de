"""Where the query and key columns of each head live in the parameters of an attention module."""

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from muonclip_jax._shared_key import query_and_key_factors
from muonclip_jax._types import Scalar

Shape: TypeAlias = tuple[int, ...]


class Leaf(NamedTuple):
    """One parameter at or below a query or key module.

    Attributes:
      name: Last component of its path, such as `kernel`.
      path: Its path from the attention module on, such as `query/kernel`.
      position: Where it is among the flattened parameters.
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
class Layout(abc.ABC):
    """The axes and leaf names that every layout has. The layouts in use are its subclasses.

    A subclass says which children of the attention module it needs (`module_fields`), what in them
    does not fit the statistic (`faults`), and by what each column is multiplied (`factors`).

    Attributes:
      module_fields: The fields that hold names of children.
      initials: For each of them, the letters that a likely name has, the first in front.
      kernel_ndims: The ranks that `kernel_ndim` may have.
      kernel_ndim: This and all others: see `MultiHeadLayout`.
    """

    module_fields: ClassVar[tuple[str, ...]] = ()
    initials: ClassVar[tuple[str, ...]] = ()
    kernel_ndims: ClassVar[tuple[int, ...]] = (2, 3)

    kernel_ndim: int = 3
    head_axis: int = -2
    stack_axis: int = 0
    stat_stack_axis: int = 0
    stat: str = "max_logits"
    scaled_leaves: tuple[str, ...] = ("kernel", "bias", "lora_b")
    kept_leaves: tuple[str, ...] = ("lora_a",)
    qk_norm: tuple[str, ...] = (
        "query_ln",
        "key_ln",
        "query_norm",
        "key_norm",
        "q_norm",
        "k_norm",
    )

    def __post_init__(self):
        if self.kernel_ndim not in self.kernel_ndims:
            ranks = " or ".join(map(str, self.kernel_ndims))
            raise ValueError(f"{self}: kernel_ndim must be {ranks}.")
        if self.head_axis not in (-2, -3):
            raise ValueError(f"{self}: head_axis must be -2 or -3.")
        if not self.scaled_leaves:
            raise ValueError(f"{self}: scaled_leaves needs the name of the kernel.")

    def __repr__(self) -> str:
        """Shows the module names, and what differs from its default."""
        others = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        names = dict.fromkeys((*self.module_fields, *others))
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({shown})"

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the children that the attention module must have."""
        return tuple(getattr(self, field) for field in self.module_fields)

    @abc.abstractmethod
    def faults(self, kernels: Mapping[str, Leaf], stack: int, heads: int) -> Iterator[str]:
        """Says what in the kernels, by module name, does not fit a statistic of so many heads."""

    @abc.abstractmethod
    def factors(
        self,
        gamma: Float[Array, "*stack heads"],
        kernels: Mapping[str, Leaf],
        alpha: Scalar,
        shared_key: str,
    ) -> dict[str, Float[Array, "*stack some_heads width"]]:
        """Gives, by module name, the factor of each column of each head."""

    def stack_axes(self, axis: int, count: int) -> tuple[int, ...]:
        """Lists `count` stack axes, outermost first: a scan of a scan inserts twice at `axis`."""
        return tuple(axis + i if axis >= 0 else axis - i for i in range(count))

    def fits(self, shape: Shape, stack: int) -> bool:
        """Tells whether a leaf's rank is that of a kernel or of its bias, so many layers deep."""
        axes = self.stack_axes(self.stack_axis, stack)
        in_range = all(-len(shape) <= axis < len(shape) for axis in axes)
        return in_range and self.kernel_ndim + stack - len(shape) in (0, 1)

    def column_shape(self, shape: Shape, stack: int) -> tuple[Shape, Shape]:
        """Splits a leaf's shape into stack sizes and the axes of its columns.

        Those are `(heads, width)` or, flat, `(heads * width,)`. The input axis of a kernel is
        dropped; a bias has none.
        """
        axes = self.stack_axes(self.stack_axis, stack)
        sizes = [shape[axis] for axis in axes_first(axes, len(shape))]
        if len(shape) == self.kernel_ndim + stack:
            del sizes[self._input_axis]
        return tuple(sizes[:stack]), tuple(sizes[stack:])

    def leaf_factor(
        self, columns: Float[Array, "*stack heads width"], leaf: Leaf
    ) -> Float[Array, "..."]:
        """Gives factors per column the axes of a leaf, all but the columns and stacks of size 1."""
        stack = columns.ndim - 2
        columns = columns.reshape(*columns.shape[:-2], *self.column_shape(leaf.shape, stack)[1])
        if len(leaf.shape) == self.kernel_ndim + stack:
            columns = jnp.expand_dims(columns, self._input_axis)
        return jnp.moveaxis(columns, range(stack), self.stack_axes(self.stack_axis, stack))

    def head_count(
        self, kernel: Leaf, stack: int, *, heads: int = 0, width: int = 0
    ) -> tuple[int, int, int]:
        """Counts the heads, their columns, and columns left over; a flat kernel needs one given."""
        columns = self.column_shape(kernel.shape, stack)[1]
        if len(columns) == 2:
            return columns[0], columns[1], 0
        count, rest = divmod(columns[0], heads or width)
        return (heads, count, rest) if heads else (count, width, rest)

    @property
    def _input_axis(self) -> int:
        heads_first = self.kernel_ndim == 3 and self.head_axis == -3
        return -2 if heads_first else -self.kernel_ndim


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class MultiHeadLayout(Layout):
    """Attention with one module for the queries and one for the keys: MHA, GQA, MQA.

    The heads are read off: those of the queries are the last axis of the statistic, which a kernel
    of rank 3 confirms and a flat one must believe; those of the keys follow from the kernel. Query
    head h uses key head `h // (heads // key_heads)`. The defaults are the names that
    `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention` give. Immutable and
    hashable.

    Attributes:
      query: Name of the query module inside the attention module.
      key: Name of the key module.
      query_dim: Leading columns of each query head that are query, where the rest is something else
        that is not scaled, such as an output gate. None is all of them.
      kernel_ndim: Rank of one layer's kernel: 3 is `(d, heads, head_dim)`, 2 is
        `(d, heads * head_dim)` with the columns of a head side by side.
      head_axis: Head axis of a kernel of rank 3; -3 is `(heads, d, head_dim)`. A bias is
        `(heads, head_dim)` either way.
      stack_axis: Where stacked layers lie in every leaf: `variable_axes={"params": stack_axis}`.
      stat_stack_axis: Where they lie in the statistic.
      stat: Leaf name of the statistic.
      scaled_leaves: Leaves that carry the columns of the heads. The first name is the kernel.
      kept_leaves: Leaves that are known and left alone.
      qk_norm: Children of the attention module that would divide a clip out again; `()` for none.

    Raises:
      ValueError: if an axis, a rank or `query_dim` is impossible.

    Example:
      >>> import muonclip_jax as mc
      >>> mc.MultiHeadLayout(query="q_proj", key="k_proj", kernel_ndim=2)
      MultiHeadLayout(query='q_proj', key='k_proj', kernel_ndim=2)
    """

    module_fields: ClassVar[tuple[str, ...]] = ("query", "key")
    initials: ClassVar[tuple[str, ...]] = ("q", "k")

    query: str = "query"
    key: str = "key"
    query_dim: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.query == self.key:
            raise ValueError(f"{self}: query and key must be two modules.")
        if self.query_dim is not None and self.query_dim < 1:
            raise ValueError(f"{self}: query_dim must be at least 1.")

    def faults(self, kernels: Mapping[str, Leaf], stack: int, heads: int) -> Iterator[str]:
        """Says what in the kernels does not fit a statistic of so many heads."""
        query, key = kernels[self.query], kernels[self.key]
        found, width, rest = self.head_count(query, stack, heads=heads)
        if found != heads:
            yield f"{query} has {found} heads, its {self.stat} has {heads}."
        elif rest:
            yield f"{query} does not divide into {heads} heads, as its {self.stat} has."
        elif (self.query_dim or 0) > width:
            yield f"{query} has heads of {width} columns, query_dim is {self.query_dim}."
        else:
            width = self.query_dim or width
            key_heads, key_width, rest = self.head_count(key, stack, width=width)
            if key_width != width or rest:
                yield f"{key} does not have heads of {width} columns, as {query}; see query_dim."
            elif heads % key_heads:
                yield f"{key} has {key_heads} heads, no divisor of the {heads} query heads."

    def factors(
        self,
        gamma: Float[Array, "*stack heads"],
        kernels: Mapping[str, Leaf],
        alpha: Scalar,
        shared_key: str,
    ) -> dict[str, Float[Array, "*stack some_heads width"]]:
        """Gives, by module name, the factor of each column of each head."""
        stack, heads = gamma.ndim - 1, gamma.shape[-1]
        _, width, _ = self.head_count(kernels[self.query], stack, heads=heads)
        key_width = self.query_dim or width
        key_heads, _, _ = self.head_count(kernels[self.key], stack, width=key_width)
        query, key = query_and_key_factors(gamma, key_heads, alpha, shared_key)
        is_query = jnp.arange(width) < key_width
        return {
            self.query: jnp.where(is_query, query[..., None], 1),
            self.key: jnp.broadcast_to(key[..., None], (*key.shape, key_width)),
        }


def axes_first(axes: Shape, ndim: int) -> list[int]:
    """Orders the axes of an array as `moveaxis` would, with these in front."""
    front = [axis % ndim for axis in axes]
    return front + [axis for axis in range(ndim) if axis not in front]

"""Patterns of named kernel axes, such as `"inputs (heads head_dim)"`, in the style of einops."""

import functools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

NAMES = ("inputs", "heads", "kv_heads", "groups", "head_dim")
_TOKEN = re.compile(r"[()]|[^\s()]+")


class KernelPattern(NamedTuple):
    """The axes of one layer's kernel, each a tuple of the names that it flattens.

    Attributes:
      axes: Names per axis; a literal number is the number of projections stacked along it.

    Example:
      >>> kernel_pattern("inputs (2 heads head_dim)").axes
      (('inputs',), ('2', 'heads', 'head_dim'))
    """

    axes: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        """Shows the pattern as the user writes it."""
        return " ".join(" ".join(a) if len(a) == 1 else f"({' '.join(a)})" for a in self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in order."""
        return tuple(name for axis in self.axes for name in axis)

    @property
    def literal(self) -> int:
        """The number of projections stacked in the kernel, 1 without a literal number."""
        return math.prod(int(name) for name in self.names if name.isdigit())

    @property
    def input_axis(self) -> int:
        """The axis of the inputs."""
        return self.axes.index(("inputs",))

    @property
    def is_flat(self) -> bool:
        """Whether `head_dim` shares an axis, so that its size cannot be read from the kernel."""
        return ("head_dim",) not in self.axes

    def outputs(self) -> "KernelPattern":
        """Returns the pattern of a bias: the axes without the inputs."""
        return KernelPattern(tuple(axis for axis in self.axes if axis != ("inputs",)))

    def key(self) -> "KernelPattern":
        """Returns the pattern of a key kernel: the axes without the groups of query heads."""
        axes = (tuple(name for name in axis if name != "groups") for axis in self.axes)
        return KernelPattern(tuple(axis for axis in axes if axis))

    def mirrored(self) -> "KernelPattern":
        """Returns the pattern with the inputs at the other end."""
        rest = self.outputs().axes
        axes = (*rest, ("inputs",)) if self.input_axis == 0 else (("inputs",), *rest)
        return KernelPattern(axes)

    def sizes(self, shape: tuple[int, ...], known: Mapping[str, int]) -> dict[str, int] | None:
        """Infers the size of each name.

        Args:
          shape: Sizes of the axes of the pattern.
          known: Sizes that are given. Each axis has at most one name without a size.

        Returns:
          Sizes by name, the known ones included; None if the shape contradicts the pattern.

        Example:
          >>> kernel_pattern("inputs (heads head_dim)").sizes((8, 12), {"head_dim": 4})
          {'head_dim': 4, 'inputs': 8, 'heads': 3}
        """
        found = dict(known)
        for axis, size in zip(self.axes, shape, strict=True):
            unknown = [name for name in axis if name not in known and not name.isdigit()]
            given = (
                int(name) if name.isdigit() else known[name] for name in axis if name not in unknown
            )
            count, rest = divmod(size, math.prod(given))
            if rest or (not unknown and count != 1):
                return None
            found.update(dict.fromkeys(unknown, count))
        return found


class Columns(NamedTuple):
    """The factors of one module's output columns.

    Attributes:
      factors: `[*stack, *names]`, such as `[*stack, heads, head_dim]`.
      names: Names of the last axes: all names of the pattern but `inputs`.
      pattern: The axes of one layer's kernel.
    """

    factors: Float[Array, "..."]
    names: tuple[str, ...]
    pattern: KernelPattern

    def for_leaf(self, ndim: int, stack_axis: int) -> Float[Array, "..."]:
        """Gives the factors the axes of a kernel or of a bias.

        Args:
          ndim: Rank of the leaf, stack axes included. A bias has no axis of inputs.
          stack_axis: Axis of the layers in the leaf.

        Returns:
          The factors, which broadcast to the leaf: the axis of the inputs has size 1.

        Example:
          >>> pattern = kernel_pattern("inputs (heads head_dim)")
          >>> columns = Columns(jnp.ones((3, 2, 4)), ("heads", "head_dim"), pattern)  # 3 layers
          >>> columns.for_leaf(3, stack_axis=0).shape, columns.for_leaf(2, stack_axis=0).shape
          ((3, 1, 8), (3, 8))
        """
        stack = self.factors.ndim - len(self.names)
        outputs = self.pattern.outputs()
        order = [stack + self.names.index(name) for name in outputs.names]
        x = jnp.transpose(self.factors, (*range(stack), *order))
        sizes = dict(zip(outputs.names, x.shape[stack:], strict=True))
        flat = (math.prod(sizes[name] for name in axis) for axis in outputs.axes)
        x = x.reshape(*x.shape[:stack], *flat)
        if ndim == len(self.pattern.axes) + stack:
            x = jnp.expand_dims(x, stack + self.pattern.input_axis)
        return jnp.moveaxis(x, range(stack), stack_axes(stack_axis, stack))


def stack_axes(axis: int, count: int) -> tuple[int, ...]:
    """Lists `count` stack axes, outermost first: a scan of a scan inserts an axis at `axis` twice.

    Example:
      >>> stack_axes(0, 2), stack_axes(-1, 2)
      ((0, 1), (-1, -2))
    """
    return tuple(axis + i if axis >= 0 else axis - i for i in range(count))


@functools.cache
def kernel_pattern(
    text: str, literals: tuple[str, ...] = ("2", "3"), names: tuple[str, ...] = NAMES
) -> KernelPattern:
    """Parses a pattern of kernel axes.

    Args:
      text: Names separated by spaces; parentheses hold the names that one axis flattens, the first
        name varying slowest.
      literals: Numbers that are allowed.
      names: Names that are allowed.

    Returns:
      The pattern. Adjacent `kv_heads groups` in one flattened axis become `heads`.

    Raises:
      ValueError: for a name or number that is not allowed, a name that is missing or repeated, and
        for parentheses that are nested, empty or not closed.

    Example:
      >>> str(kernel_pattern("(heads head_dim) inputs"))
      '(heads head_dim) inputs'
    """
    axes = _axes(text, literals, names)
    found = [name for axis in axes for name in axis]
    repeated = sorted({name for name in found if found.count(name) > 1})
    if repeated:
        raise ValueError(f"{text!r} names {_listed(repeated)} more than once")
    if ("inputs",) not in axes:
        raise ValueError(f"{text!r} needs 'inputs' as an axis of its own")
    if "head_dim" not in found:
        raise ValueError(f"{text!r} needs 'head_dim'")
    if len({"heads", "kv_heads"} & {*found}) != 1 or ("groups" in found and "heads" in found):
        choices = "'heads'" + (", or 'kv_heads' and 'groups'" if "groups" in names else "")
        raise ValueError(f"{text!r} needs {choices}")
    numbers = [name for name in found if name.isdigit()]
    if len(numbers) > 1:
        raise ValueError(f"{text!r} has more than one number: {_listed(numbers)}")
    pattern = KernelPattern(tuple(_with_heads(axis) for axis in axes))
    if any({"kv_heads", "groups"} <= {*axis} for axis in pattern.axes):
        raise ValueError(
            f"{text!r} needs 'kv_heads groups' side by side, in this order, in one axis"
        )
    return pattern


def _axes(text: str, literals: tuple[str, ...], names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Splits a pattern into axes."""
    axes: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for token in _TOKEN.findall(text):
        if token == "(" and group is None:
            group = []
        elif token == ")" and group:
            axes.append(tuple(group))
            group = None
        elif token in "()":
            raise ValueError(f"{text!r} has parentheses that are nested, empty or not opened")
        elif token not in (*names, *literals):
            raise ValueError(f"{text!r} has {token!r}; allowed are {_listed((*names, *literals))}")
        elif group is None:
            axes.append((token,))
        else:
            group.append(token)
    if group is not None:
        raise ValueError(f"{text!r} has a parenthesis that is not closed")
    return axes


def _with_heads(axis: tuple[str, ...]) -> tuple[str, ...]:
    """Replaces key heads followed by their groups, flattened into one axis, by `heads`."""
    return tuple(" ".join(axis).replace("kv_heads groups", "heads").split())


def _listed(names) -> str:
    return ", ".join(repr(name) for name in names)

"""The source of each element of an array: an index into it, as an index into an operand.

A `View` gives, for each axis of an array, the index along that axis as a function of named indices.
The functions are sums of digits with strides:

    index = offset + Σ stride · ((name // div) % size)

so reshapes that split and merge axes, transposes, slices, concatenations, pads and broadcasts are
exact as long as the sizes divide. Otherwise an axis keeps only the names that it depends on.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Shape: TypeAlias = tuple[int, ...]


class Digit(NamedTuple):
    """The number `(name // div) % size`, where `name` is a named index or a `Part`."""

    name: Hashable
    div: int
    size: int


class Part(NamedTuple):
    """The number `digit - start`; it exists where that is in `range(size)`."""

    digit: Digit
    start: int
    size: int


class Axis(NamedTuple):
    """An index along one axis.

    Attributes:
      offset: The index where all digits are 0.
      terms: Pairs of a stride and a digit.
      lost: The names that the index depends on in an unknown way; None if it is exact.
    """

    offset: int = 0
    terms: tuple[tuple[int, Digit], ...] = ()
    lost: frozenset[Hashable] | None = None

    @property
    def names(self) -> frozenset[Hashable]:
        """The named indices that the index depends on."""
        return (self.lost or frozenset()) | {base(digit.name) for _, digit in self.terms}

    @property
    def is_exact(self) -> bool:
        return self.lost is None


class View(NamedTuple):
    """An index into an array.

    Attributes:
      axes: The index along each axis.
      parts: The named indices for which the view exists: those where all of these exist.
      is_partial: Whether it exists for unknown indices only.
    """

    axes: tuple[Axis, ...]
    parts: tuple[Part, ...] = ()
    is_partial: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether all axes are exact, and the indices for which the view exists are known."""
        return not self.is_partial and all(axis.is_exact for axis in self.axes)

    @property
    def names(self) -> frozenset[Hashable]:
        """The named indices that any axis depends on."""
        return frozenset().union(*(axis.names for axis in self.axes))


def base(name: Hashable) -> Hashable:
    """Returns the named index that a part is a part of."""
    while isinstance(name, Part):
        name = name.digit.name
    return name


def sizes_of(view: View) -> dict[Hashable, int]:
    """Returns the size of each named index of a view, as far as digits show it."""
    sizes: dict[Hashable, int] = {}
    digits = [digit for axis in view.axes for _, digit in axis.terms]
    digits += [part.digit for part in view.parts]
    for digit in digits:
        while isinstance(digit.name, Part):
            digit = digit.name.digit
        sizes[digit.name] = max(sizes.get(digit.name, 1), digit.div * digit.size)
    return sizes


def named(name: Hashable, size: int) -> Axis:
    """Returns the axis along which the index is `name`, in `range(size)`."""
    return Axis(0, ((1, Digit(name, 1, size)),) if size > 1 else ())


def identity(shape: Sequence[int], names: Sequence[Hashable]) -> View:
    """Returns the view of an array by one named index for each axis."""
    return View(tuple(map(named, names, shape)))


def lost(*axes: Axis, names: Iterable[Hashable] = ()) -> Axis:
    """Returns an axis that depends on the names of these axes in an unknown way."""
    return Axis(lost=frozenset(names).union(*(axis.names for axis in axes)))


def transpose(view: View, permutation: Sequence[int]) -> View:
    """Pulls a view of the result of a transpose back to its operand."""
    return view._replace(axes=tuple(view.axes[permutation.index(d)] for d in range(len(view.axes))))


def squeeze(view: View, dimensions: Sequence[int]) -> View:
    """Pulls a view back through the removal of axes of size 1."""
    rest = iter(view.axes)
    ndim = len(view.axes) + len(dimensions)
    gone = {d % ndim for d in dimensions}
    return view._replace(axes=tuple(Axis() if d in gone else next(rest) for d in range(ndim)))


def broadcast(view: View, dimensions: Sequence[int], operand: Shape) -> View:
    """Pulls a view back through `broadcast_in_dim`."""
    pairs = zip(dimensions, operand, strict=True)
    return view._replace(axes=tuple(view.axes[d] if n > 1 else Axis() for d, n in pairs))


def slices(view: View, starts: Sequence[int], strides: Sequence[int] | None) -> View:
    """Pulls a view back through a slice."""
    strides = strides or (1,) * len(view.axes)
    return view._replace(axes=tuple(map(_scaled, view.axes, strides, starts)))


def reverse(view: View, dimensions: Sequence[int], shape: Shape) -> View:
    """Pulls a view back through a reversal of axes."""
    axes = [
        _scaled(axis, -1, n - 1) if d in dimensions else axis
        for d, (axis, n) in enumerate(zip(view.axes, shape, strict=True))
    ]
    return view._replace(axes=tuple(axes))


def tile(view: View, operand: Shape) -> View:
    """Pulls a view back through the repetition of a whole array along its axes."""
    pairs = zip(view.axes, operand, strict=True)
    axes = [_divided(axis, n)[1] if n > 1 else Axis() for axis, n in pairs]
    return view._replace(axes=tuple(axes))


def piece(view: View, axis: int, start: int, size: int) -> View | None:
    """Pulls a view back to one operand of a concatenation, or to what a pad surrounds.

    Args:
      view: The view of the result.
      axis: The axis of the concatenation.
      start: The position in the result where the operand begins; negative if a pad crops it.
      size: Its size.

    Returns:
      The view of the operand; None if none of its elements is in the view.
    """
    old = view.axes[axis]
    low, high = _bounds(old)
    if not old.is_exact:
        return view._replace(is_partial=True)
    if high < start or low >= start + size:
        return None
    if start <= low and high < start + size:
        return _with(view, axis, old._replace(offset=old.offset - start))
    *others, (stride, digit) = sorted(old.terms, key=lambda term: term[0])
    inner = _bounds(Axis(0, tuple(others)))  # blocks of the outermost digit, if they have no gaps
    if inner != (0, stride - 1) or (start - old.offset) % stride or size % stride:
        return _with(view, axis, lost(old))._replace(is_partial=True)
    first = (start - old.offset) // stride
    last = first + size // stride
    first, last = max(first, 0), min(last, digit.size)
    part = Part(digit, first, last - first)
    terms = ((stride, Digit(part, 1, part.size)),) if part.size > 1 else ()
    new = Axis(old.offset + first * stride - start, (*terms, *others))
    return _with(view, axis, new)._replace(parts=(*view.parts, part))


def reshape(view: View, result: Shape, operand: Shape) -> View:
    """Pulls a view back through a reshape from `operand` to `result`."""
    found: list[Axis] = []
    for outs, ins in _groups(result, operand):
        axes = view.axes[outs.start : outs.stop]
        flat = _flattened(axes, result[outs.start : outs.stop])
        group: list[Axis] = []
        for n in reversed(operand[ins.start : ins.stop]):
            flat, rest = _divided(flat, n)
            group.append(rest if n > 1 else Axis())
        if not all(axis.is_exact for axis in group):
            sizes = operand[ins.start : ins.stop]
            group = [lost(*axes) if n > 1 else Axis() for n in reversed(sizes)]
        found += reversed(group)
    return view._replace(axes=tuple(found))


def evaluate(view: View, grid: Mapping[Any, np.ndarray]) -> tuple[list[Any], Any]:
    """Computes the indices of an exact view.

    Args:
      view: The view.
      grid: The value of each named index, arrays of one shape.

    Returns:
      The index along each axis, and a mask that is true where the view exists.

    Raises:
      ValueError: if an axis is not exact.
    """
    if not view.is_exact:
        raise ValueError(f"{view} is not exact.")
    indices = [
        axis.offset + sum(stride * _value(digit, grid) for stride, digit in axis.terms)
        for axis in view.axes
    ]
    there: Any = True
    for part in view.parts:
        value = _value(part.digit, grid) - part.start
        there = there & (value >= 0) & (value < part.size)
    return indices, there


def _value(digit: Digit, grid: Mapping[Hashable, np.ndarray]) -> np.ndarray:
    name = digit.name
    part = isinstance(name, Part)
    value = _value(name.digit, grid) - name.start if part else grid[name]
    return value // digit.div % digit.size


def _with(view: View, axis: int, new: Axis) -> View:
    return view._replace(axes=(*view.axes[:axis], new, *view.axes[axis + 1 :]))


def _scaled(axis: Axis, stride: int, start: int) -> Axis:
    if not axis.is_exact:
        return axis
    terms = tuple((t * stride, digit) for t, digit in axis.terms)
    return Axis(axis.offset * stride + start, terms)


def _bounds(axis: Axis) -> tuple[int, int]:
    """Returns the smallest and the largest index."""
    ends = [stride * (digit.size - 1) for stride, digit in axis.terms]
    return axis.offset + sum(min(e, 0) for e in ends), axis.offset + sum(max(e, 0) for e in ends)


def _groups(result: Shape, operand: Shape) -> Iterable[tuple[range, range]]:
    """Yields the smallest runs of axes of both that have equal numbers of elements."""
    if 0 in result:
        yield range(len(result)), range(len(operand))
        return
    i = j = 0
    while i < len(result) or j < len(operand):
        a, b = i, j
        i, j = min(i + 1, len(result)), min(j + 1, len(operand))
        while (m := math.prod(result[a:i])) != (n := math.prod(operand[b:j])):
            i, j = (i + 1, j) if m < n else (i, j + 1)
        yield range(a, i), range(b, j)


def _flattened(axes: Sequence[Axis], shape: Sequence[int]) -> Axis:
    if not all(axis.is_exact for axis in axes):
        return lost(*axes)
    offset, terms, after = 0, [], 1
    for axis, n in zip(reversed(axes), reversed(shape), strict=True):
        offset += axis.offset * after
        terms += [(stride * after, digit) for stride, digit in axis.terms]
        after *= n
    return Axis(offset, tuple(terms))


def _divided(axis: Axis, n: int) -> tuple[Axis, Axis]:
    """Splits an index into the quotient and the remainder of a division by `n`."""
    if not axis.is_exact:
        return axis, axis
    above, below = [], []
    for stride, digit in axis.terms:
        inside = n // stride if stride > 0 and n % stride == 0 else 0
        if stride % n == 0:
            above.append((stride // n, digit))
        elif 0 < stride and stride * digit.size <= n:
            below.append((stride, digit))
        elif inside and digit.size % inside == 0:
            name, div, size = digit
            below.append((stride, Digit(name, div, inside)))
            above.append((1, Digit(name, div * inside, size // inside)))
        else:
            return lost(axis), lost(axis)
    quotient, offset = divmod(axis.offset, n)
    rest = Axis(offset, tuple(below))
    if _bounds(rest)[1] >= n:  # a carry into the quotient
        return lost(axis), lost(axis)
    return Axis(quotient, tuple(above)), rest

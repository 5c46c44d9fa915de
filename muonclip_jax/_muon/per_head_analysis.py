"""`per_head=` by an analysis: the heads that the program of a model shows, as a `Split`.

The map of a parameter numbers the head of each of its columns. The columns are arranged as axes
until every head is an index of some of these axes, which then are a batch of matrices.
"""

import functools
import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from muonclip_jax._orthogonalize.dimension_numbers import axes_of
from muonclip_jax._orthogonalize.matrices import Axes
from muonclip_jax._orthogonalize.split import Part, Split
from muonclip_jax._program.analysis import Analysis
from muonclip_jax._program.head_map import NONE, SHARED, HeadMap

Shape = tuple[int, ...]

_SIDES = {"query": 0, "key": 1}
_NAMES = "queries", "keys"
_FIX = "Pass a head layout as per_head, or set overrides= for these parameters."


def analysis_splits(
    caller: str,
    analysis: Analysis,
    paths: Sequence[tuple[str, ...]],
    shapes: Sequence[Shape],
    decided: Collection[int],
) -> dict[int, Split]:
    """Splits the queries and keys of all attention layers. Values are not in an analysis.

    Args:
      caller: Name of the public function that was called.
      analysis: The analysis.
      paths: Path of each parameter.
      shapes: Its shape.
      decided: Indices of parameters that an override decides.

    Returns:
      How each parameter with queries or keys is split, by its index.

    Raises:
      ValueError: if there is no attention, or its heads cannot be read.
    """
    if not analysis.attention:
        raise ValueError(f"{caller}: per_head is an analysis without attention. {_FIX}")
    index = {_core("/".join(path)): i for i, path in enumerate(paths)}
    maps: dict[str, list[HeadMap]] = {}
    faults = []
    for site in analysis.attention:
        if {index.get(_core(source.path)) for source in site.sources} <= {*decided, None}:
            continue
        try:
            for one in site.head_maps():
                maps.setdefault(one.path, []).append(one)
        except ValueError as error:
            faults.append(f"  {error}")
    splits = {}
    for path, found in maps.items():
        i, numbers = index.get(_core(path)), analysis.decision(path).dimension_numbers
        if i is None or i in decided or numbers is None:
            continue
        try:
            axes = axes_of(numbers, len(shapes[i]))
            if split := _split(analysis.shapes[path], shapes[i], axes, found):
                splits[i] = split
        except ValueError as error:
            faults.append(f"  {path} {shapes[i]}: {error}.")
    if faults:
        lines = "\n".join(faults)
        raise ValueError(f"{caller}: per_head cannot read heads in the analysis.\n{lines}\n{_FIX}")
    return splits


def _core(path: str) -> str:
    return path.removeprefix("params/")


def _split(expected: Shape, shape: Shape, axes: Axes, maps: Sequence[HeadMap]) -> Split | None:
    """Splits one parameter; None if no column belongs to a head alone."""
    if shape != expected:
        raise ValueError(f"expected {expected}, the shape of the analysis")
    varying = sorted({axis for one in maps for axis in one.axes})
    labels = functools.reduce(np.maximum, (_labels(one, varying, shape) for one in maps))
    if (labels < 0).all():
        return None
    if {*varying} & {*axes.reduction}:
        raise ValueError("heads are along its inputs")
    # Along stacked layers, columns of heads are in the same places.
    is_layer = [
        axis in axes.batch and ((labels < 0) == (labels.take([0], d) < 0)).all()
        for d, axis in enumerate(varying)
    ]
    first = labels[tuple(0 if layer else slice(None) for layer in is_layer)]
    columns = [axis for axis, layer in zip(varying, is_layer, strict=True) if not layer]
    arranged = _arranged(first.shape, first.tobytes())
    if arranged is None:
        raise ValueError("no arrangement of its columns shows its heads")
    unflattened = dict(zip(columns, arranged.sizes, strict=True))
    sizes = tuple(unflattened.get(axis, (n,)) for axis, n in enumerate(shape))
    return _as_split(sizes, axes, columns, arranged)


def _labels(one: HeadMap, varying: Sequence[int], shape: Shape) -> np.ndarray:
    """Numbers the head of each element along some axes; -1 for elements of no single head."""
    is_shared = (one.rule == SHARED) & (one.side == "key")
    own = one.heads[..., 0] * 2 + _SIDES[one.side]
    labels = np.where((one.rule == NONE) | is_shared, -1, own)
    order = np.argsort(one.axes)
    labels = np.transpose(labels, order)
    there = [shape[axis] if axis in one.axes else 1 for axis in varying]
    return np.broadcast_to(labels.reshape(there), [shape[axis] for axis in varying])


class _Section(NamedTuple):
    """Adjacent columns: their number, their name, and the axes that number heads, if any do."""

    size: int
    name: str
    heads: Shape | None


class _Arranged(NamedTuple):
    """Columns arranged as axes.

    Attributes:
      sizes: The sizes into which each axis is unflattened.
      cut: The axis that the sections divide.
      sections: The sections.
    """

    sizes: tuple[Shape, ...]
    cut: int
    sections: tuple[_Section, ...]


@functools.lru_cache(maxsize=256)
def _arranged(shape: Shape, data: bytes) -> _Arranged | None:
    """Arranges columns so that some axes number the heads, with as few axes as possible."""
    labels = np.frombuffer(data, np.int64).reshape(shape)
    choices = sorted(
        itertools.product(*map(_unflattened, shape)), key=lambda sizes: sum(map(len, sizes))
    )
    for sizes in choices:
        x = labels.reshape(sum(sizes, ()))
        if (cut := _cut_axis(x >= 0)) is None:
            continue
        sections = [_section(part, cut) for part in _runs(x, cut)]
        if all(section is not None for section in sections):
            return _Arranged(sizes, cut, tuple(filter(None, sections)))
    return None


def _unflattened(n: int) -> Iterator[Shape]:
    """Yields all ways to unflatten an axis into at most three."""
    divisors = [d for d in range(2, n) if n % d == 0]
    yield (n,)
    yield from ((n // d, d) for d in divisors)
    for outer, inner in itertools.product(divisors, divisors):
        if n % (outer * inner) == 0 and outer * inner < n:
            yield (outer, n // (outer * inner), inner)


def _cut_axis(mask: np.ndarray) -> int | None:
    """Returns the only axis along which a mask varies, 0 if it is constant, None for several."""
    varies = [d for d in range(mask.ndim) if (mask != mask.take([0], d)).any()]
    return (varies or [0])[0] if len(varies) < 2 else None


def _runs(x: np.ndarray, cut: int) -> list[np.ndarray]:
    """Cuts labels where columns of heads begin or end."""
    along = np.moveaxis(x, cut, 0).reshape(x.shape[cut], -1)[:, 0] >= 0
    return np.split(x, np.flatnonzero(np.diff(along)) + 1, cut)


def _section(x: np.ndarray, cut: int) -> _Section | None:
    """Describes columns of which all belong to heads, or none; None if axes do not number heads."""
    if x.flat[0] < 0:
        return _Section(x.shape[cut], "others", None)
    heads = tuple(d for d in range(x.ndim) if (x != x.take([0], d)).any())
    found = np.unique(x)
    if len(found) != math.prod(x.shape[d] for d in heads):
        return None
    name = "+".join(_NAMES[side] for side in sorted({*(found % 2)}))
    return _Section(x.shape[cut], name, heads)


def _as_split(
    sizes: tuple[Shape, ...], axes: Axes, columns: Sequence[int], arranged: _Arranged
) -> Split:
    """Builds the split of a leaf from the arrangement of its columns."""
    starts = [0, *itertools.accumulate(map(len, sizes))]

    def places(own: Sequence[int]) -> Shape:
        """Returns where axes of the leaf are in the unflattened leaf."""
        return tuple(p for axis in own for p in range(starts[axis], starts[axis + 1]))

    at = places(columns)
    parts = []
    for section in arranged.sections:
        heads = tuple(at[axis] for axis in section.heads or ())
        batch = tuple(sorted({*places(axes.batch), *heads}))
        rest = tuple(place for place in places(axes.output) if place not in heads)
        name = section.name if len(arranged.sections) > 1 else ""
        unit = "" if section.heads is None else "heads"
        parts.append(Part(name, section.size, Axes(batch, places(axes.reduction), rest), unit))
    return Split(sizes, at[arranged.cut], tuple(parts))

"""The head, and the column of queries times keys, of each element of a kernel."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from muonclip_jax._program.axes import Axis, View, evaluate, sizes_of

NONE, OWN, GROUP, SHARED = range(4)
_MINE = frozenset({"head", "dim", "layer"})


class SiteSource(NamedTuple):
    """Elements of one parameter that are queries or keys.

    Attributes:
      side: `"query"` or `"key"`.
      path: Path of the parameter.
      shape: Its shape.
      view: Its elements by `("layer", i)`, `("head", i)`, `("dim", i)` and others.
      is_inner: Whether it is multiplied with another parameter, as an adapter is.
    """

    side: str
    path: str
    shape: tuple[int, ...]
    view: View
    is_inner: bool = False


class HeadMap(NamedTuple):
    """The head of each element along some axes of a parameter.

    Attributes:
      side: `"query"` or `"key"`.
      path: Path of the parameter.
      axes: The axes along which elements belong to different heads.
      heads: `[*sizes of axes, group]`: numbers of heads in the flattened `[*layers, heads]`. For
        a key, the heads that use it; for a query, its own head first, then all that use its key.
      rule: `[*sizes of axes]`: `NONE` for elements of no head; `OWN` where each head has its own
        key; `GROUP` where groups of heads share keys; `SHARED` where heads that have keys of their
        own share this one too, as the rotary key of latent attention.
    """

    side: str
    path: str
    axes: tuple[int, ...]
    heads: np.ndarray
    rule: np.ndarray


def head_maps(
    sources: Sequence[SiteSource],
    layers: Sequence[int],
    heads: Sequence[int],
    dims: Sequence[Sequence[int]],
) -> list[HeadMap]:
    """Computes the head of each element of each query and key parameter.

    Args:
      sources: The positions of queries and keys.
      layers: Sizes of the stacks of layers, outermost first.
      heads: Sizes of the axes of heads, outermost first.
      dims: For each product of queries and keys, the sizes of the axes it sums over.

    Returns:
      One map for each parameter and side.

    Raises:
      ValueError: if elements of a parameter cannot be distinguished.
    """
    order = [("layer", i) for i in range(len(layers))] + [("head", i) for i in range(len(heads))]
    sizes: dict[Hashable, int] = dict(zip(order, [*layers, *heads], strict=True))
    sizes |= {("dim", i): n for i, n in enumerate(n for product in dims for n in product)}
    sources = [s for s in sources if not s.is_inner or s.view.names & {*sizes}]
    points = [_points(source, sizes, order, dims) for source in sources]
    shape = math.prod((*layers, *heads)), sum(map(math.prod, dims))
    keys = [(s, at) for s, at in zip(sources, points, strict=True) if s.side == "key"]
    members, group = _groups(keys, shape)
    owned = bool((_sizes_of(members) == 1).any())
    found: dict[tuple[str, str], HeadMap] = {}
    for source, at in zip(sources, points, strict=True):
        new = _map(source, at, members, group, owned=owned)
        old = found.get((source.side, source.path))
        found[source.side, source.path] = new if old is None else _union(old, new)
    maps = list(found.values())
    for i, one in enumerate(maps):
        if any(overlap(one, other) for other in maps[:i] if other.path == one.path):
            raise ValueError(f"{one.path}: queries and keys share its elements.")
    return maps


def overlap(one: HeadMap, other: HeadMap) -> bool:
    """Returns whether two maps of one parameter have elements in common."""
    axes = sorted({*one.axes, *other.axes})
    masks = []
    for each in (one, other):
        sizes = dict(zip(each.axes, each.rule.shape, strict=True))
        order = np.argsort(each.axes)
        mask = np.transpose(each.rule != NONE, order) if each.axes else each.rule != NONE
        masks.append(mask.reshape([sizes.get(d, 1) for d in axes]))
    return bool((masks[0] & masks[1]).any())


class _Points(NamedTuple):
    """For each combination of named indices: a position, its head and its column."""

    axes: tuple[int, ...]
    positions: np.ndarray
    head: np.ndarray
    column: np.ndarray


def _points(
    source: SiteSource,
    sizes: Mapping[Hashable, int],
    order: Sequence[Hashable],
    dims: Sequence[Sequence[int]],
) -> _Points:
    axes = tuple(d for d, n in enumerate(source.shape) if _varies(source.view.axes[d], n))
    view = View(tuple(source.view.axes[d] for d in axes), source.view.parts)
    if source.view.is_partial or not view.is_exact:
        raise ValueError(f"{source.path}: the program moves its heads in a way that is not exact.")
    others = sizes_of(view)
    product, names = _dims_of(source.path, view, dims)
    known = {name: sizes[name] for name in order} | {name: sizes[name] for name in names}
    grid_sizes = {**known, **{k: n for k, n in others.items() if k not in known}}
    values = np.indices(tuple(grid_sizes.values())).reshape(len(grid_sizes), -1)
    grid = dict(zip(grid_sizes, values, strict=True))
    positions, there = evaluate(view, grid)
    count = values.shape[1]
    there = np.broadcast_to(there, count)
    head, column = np.zeros(count, int), np.zeros(count, int)
    for name in order:
        head = head * sizes[name] + grid[name]
    for name in names:
        column = column * sizes[name] + grid[name]
    column += sum(math.prod(p) for p in dims[:product])
    stacked = np.stack([np.broadcast_to(p, count) for p in positions] or [np.zeros(count, int)])
    return _Points(axes, stacked[:, there], head[there], column[there])


def _varies(axis: Axis, size: int) -> bool:
    """Returns whether elements along an axis belong to different heads, or some to none."""
    if any(name[0] in _MINE for name in axis.names):  # pyright: ignore[reportIndexIssue]
        return True
    if not axis.is_exact:
        return False  # inputs, gathered from shards
    if len(axis.terms) == 1 and axis.offset == 0:
        ((stride, digit),) = axis.terms
        return stride != 1 or digit.size != size
    return size > 1


def _dims_of(path: str, view: View, dims: Sequence[Sequence[int]]) -> tuple[int, list[Hashable]]:
    """Returns the product whose columns a view has, and the names of these."""
    found = {*sizes_of(view)}
    start = 0
    for product, sizes in enumerate(dims):
        names: list[Hashable] = [("dim", start + k) for k in range(len(sizes))]
        if found & {*names}:
            return product, names
        start += len(sizes)
    raise ValueError(f"{path}: it is not summed over in queries times keys.")


def _groups(
    keys: Sequence[tuple[SiteSource, _Points]], shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the heads that share elements of keys.

    Args:
      keys: The sources of keys.
      shape: Number of heads of all layers, and of columns.

    Returns:
      The heads of each group, `[groups, most]`, the first repeated where there are fewer; and the
      group of each head and column, -1 where the key has no parameter.
    """
    pairs, group = [], np.full(shape, -1)
    start = 0
    for source, at in keys:
        ids = _element(source, at) + start
        start += math.prod(source.shape)
        pairs.append(np.stack([ids, at.head, at.column]))
    if not pairs:
        return np.zeros((0, 1), int), group
    ids, heads, columns = np.concatenate(pairs, axis=1)
    _, ids = np.unique(ids, return_inverse=True)
    unique = np.unique(np.stack([ids, heads]), axis=1)
    first = np.searchsorted(unique[0], np.arange(unique[0, -1] + 1))
    rank = np.arange(unique.shape[1]) - first[unique[0]]
    members = np.repeat(unique[1, first][:, None], rank.max() + 1, axis=1)
    members[unique[0], rank] = unique[1]
    # A column may be a sum, such as a projection and positions that heads share: the largest group.
    by_size = np.argsort(_sizes_of(members)[ids], kind="stable")
    group[heads[by_size], columns[by_size]] = ids[by_size]
    return members, group


def _sizes_of(members: np.ndarray) -> np.ndarray:
    """Returns the number of different heads of each group."""
    return np.asarray(1 + np.sum(members[:, 1:] != members[:, :1], axis=1))


def _element(source: SiteSource, at: _Points) -> np.ndarray:
    """Numbers the elements of a parameter along the axes of its heads."""
    shape = [source.shape[d] for d in at.axes]
    return np.asarray(
        np.ravel_multi_index(tuple(at.positions), shape) if shape else at.positions[0]
    )


def _map(
    source: SiteSource, at: _Points, members: np.ndarray, group: np.ndarray, *, owned: bool
) -> HeadMap:
    """Computes the map of one source."""
    found = group[at.head, at.column]
    count = np.where(found < 0, 0, _sizes_of(members)[found] if len(members) else 0)
    rule = np.where(count == 1, OWN, np.where((count == 0) | owned, SHARED, GROUP))
    grouped = members[found] if len(members) else at.head[:, None]
    alone = np.repeat(at.head[:, None], grouped.shape[1], axis=1)
    grouped = np.where((rule == GROUP)[:, None], grouped, alone)
    if source.side == "query":
        grouped = np.concatenate([at.head[:, None], grouped], axis=1)
    elif not (rule == GROUP).any():
        grouped = grouped[:, :1]
    shape = tuple(source.shape[d] for d in at.axes)
    where = tuple(at.positions) if shape else ()
    heads = np.full((*shape, grouped.shape[1]), -1)
    rules = np.full(shape, NONE)
    heads[where], rules[where] = grouped, rule
    same = (heads[where] == grouped).all(axis=1) | ((source.side == "key") & (rule == SHARED))
    if not same.all() or (rules[where] != rule).any():
        raise ValueError(f"{source.path}: elements of its {source.side} belong to several heads.")
    return HeadMap(source.side, source.path, at.axes, heads, rules)


def _union(old: HeadMap, new: HeadMap) -> HeadMap:
    """Joins the maps of one parameter, such as both halves of a rotated key."""
    if old.axes != new.axes or old.heads.shape != new.heads.shape:
        raise ValueError(f"{old.path}: it is used in two ways by one attention.")
    both = (old.rule != NONE) & (new.rule != NONE)
    same = (old.rule == new.rule) & (
        (old.heads == new.heads).all(axis=-1) | ((old.rule == SHARED) & (old.side == "key"))
    )
    if not same[both].all():
        raise ValueError(f"{old.path}: elements of its {old.side} belong to several heads.")
    fill = old.rule == NONE
    heads = np.where(fill[..., None], new.heads, old.heads)
    return old._replace(heads=heads, rule=np.where(fill, new.rule, old.rule))

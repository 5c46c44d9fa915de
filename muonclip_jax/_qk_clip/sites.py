"""Joins max logits to the weights that caused them, by module path."""

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from muonclip_jax._attention.flax_attention import BOUND
from muonclip_jax._common.paths import components
from muonclip_jax._common.types import ArrayTree
from muonclip_jax._qk_clip.head_layout import Layout, Leaf, Shape, axes_first

Path: TypeAlias = tuple[str, ...]
# By path of a module, then by name of a child: path, position and value of each leaf below it.
Modules: TypeAlias = dict[Path, dict[str, list[tuple[Path, int, Any]]]]
# By path of a module and name of its max logits: what was sown there, one entry per call.
Statistics: TypeAlias = dict[tuple[Path, str], list[Array]]


class Site(NamedTuple):
    """An attention module of the parameters, with its max logits.

    Attributes:
      path: Its path.
      layout: The layout that describes it.
      children: All its children by name, with the shapes of their leaves.
      paths: Paths of all leaves below it, from the module on; not those of attention modules in it.
      leaves: The leaves at or below the children that the layout names.
      hidden: Paths of leaves at or below these children that a mask hides.
      statistics: What was sown, each with its stack axes at `layout.stat_stack_axis`, heads last.
      is_bound: Whether any of them is an upper bound.
    """

    path: Path
    layout: Layout
    children: dict[str, list[Shape]]
    paths: tuple[Path, ...]
    leaves: dict[str, list[Leaf]]
    hidden: tuple[str, ...]
    statistics: list[Array]
    is_bound: bool

    @property
    def name(self) -> str:
        """Its path as one string."""
        return "/".join(self.path)

    @property
    def scaled(self) -> list[tuple[str, Leaf]]:
        """The leaves to scale, each with the child that it is in."""
        names = self.layout.scaled_leaves
        return [
            (c, leaf) for c, leaves in self.leaves.items() for leaf in leaves if leaf.name in names
        ]

    @property
    def kernels(self) -> dict[str, Leaf]:
        """The kernel of each child that the layout names."""
        return {c: leaf for c, leaf in self.scaled if leaf.name == self.layout.scaled_leaves[0]}

    @property
    def stack(self) -> int:
        """Number of stack axes."""
        return self.stack_of(self.layout.modules[0])

    def stack_of(self, child: str) -> int:
        """Returns the number of stack axes of a child's kernel."""
        return len(self.kernels[child].shape) - len(self.layout.patterns[child].axes)

    @property
    def stat_axes(self) -> Shape:
        """The stack axes of each array of max logits."""
        return self.layout.stack_axes(self.layout.stat_stack_axis, self.stack)

    def heads(self, statistic: Array) -> int:
        """Number of query heads: the last axis that is not a stack axis."""
        return statistic.shape[axes_first(self.stat_axes, statistic.ndim)[-1]]


class Survey(NamedTuple):
    """All attention modules and max logits, whether or not they fit.

    Attributes:
      layouts: The layouts that were looked for.
      modules: Every module of the parameters, with its children.
      statistics: Everything sown under the name of a layout's max logits, bounds included.
      owners: The attention modules, with the layout that describes each.
      sites: The attention modules that have max logits.
      left_out: Paths of modules that are hidden or ignored.
    """

    layouts: tuple[Layout, ...]
    modules: Modules
    statistics: Statistics
    owners: dict[Path, Layout]
    sites: list[Site]
    left_out: set[Path]


def survey(
    params: ArrayTree,
    max_logits: ArrayTree,
    layouts: tuple[Layout, ...],
    ignore: Sequence[str] = (),
) -> Survey:
    """Finds the attention modules of `params` and joins each to its max logits.

    Whole path components are compared. Root keys `params` and `intermediates` are dropped; beside
    them, other collections are not read. Modules whose queries and keys are all hidden
    (`optax.MaskedNode`, or None) are left out together with their max logits.

    Args:
      params: The parameters.
      max_logits: The max logits.
      layouts: Each module is described by the first layout whose children it has.
      ignore: Patterns (`fnmatch`) of paths of modules to leave out.

    Returns:
      What was found.

    Raises:
      ValueError: for patterns of `ignore` that match no attention module and no max logits.
    """
    modules, masked, absent = _modules(params)
    statistics, bounds = _statistics(max_logits, {layout.stat for layout in layouts})
    owners = {path: owner for path in modules if (owner := _owner(modules[path], layouts))}
    paths = {*owners, *(path for path, _ in statistics)}
    left_out = {
        path
        for path in paths
        if _is_hidden(path, owners.get(path), modules.get(path, {}), layouts, masked, absent)
    }
    left_out |= _ignored(paths, ignore)
    owners = {path: layout for path, layout in owners.items() if path not in left_out}
    statistics = {key: s for key, s in statistics.items() if key[0] not in left_out}
    found = Survey(layouts, modules, statistics, owners, [], left_out)
    for path, layout in owners.items():
        if (path, layout.stat) in statistics:
            found.sites.append(make_site(found, path, layout, (path, layout.stat) in bounds))
    return found


def make_site(
    found: Survey,
    path: Path,
    layout: Layout,
    is_bound: bool = False,
    statistics: list[Array] | None = None,
) -> Site:
    """Collects what belongs to one attention module.

    Args:
      found: The survey that it is part of.
      path: Path of the module.
      layout: The layout that describes it.
      is_bound: Whether its max logits are an upper bound.
      statistics: Its max logits; None takes those of the survey.

    Returns:
      The module.
    """
    children, depth = found.modules[path], len(path)

    def leaf(child: str, full_path: Path, index: int, value: Any) -> Leaf:
        below = full_path[depth + 1 :]
        # A child that is itself an array is a kernel without a module around it.
        name = below[-1] if below else layout.scaled_leaves[0]
        relative = "/".join((child, *below))
        return Leaf(name, relative, index, jnp.shape(value), jnp.result_type(value))

    leaves, hidden = {}, []
    for name in layout.modules:
        there = [entry for entry in children[name] if not _hides(entry[2])]
        leaves[name] = [leaf(name, *entry) for entry in there]
        hidden += ["/".join(full[depth:]) for full, _, value in children[name] if _hides(value)]
    paths = tuple(
        full[depth:]
        for entries in children.values()
        for full, _, _ in entries
        if not any(full[:end] in found.owners for end in range(depth + 1, len(full)))
    )
    stats = found.statistics[path, layout.stat] if statistics is None else statistics
    shapes = {
        name: [jnp.shape(x) for _, _, x in entries if not _hides(x)]
        for name, entries in children.items()
    }
    return Site(path, layout, shapes, paths, leaves, tuple(hidden), stats, is_bound)


def _modules(params: ArrayTree) -> tuple[Modules, set[Path], set[Path]]:
    """Lists the children of every module and the leaves below each, then masked and None paths."""
    modules: Modules = {}
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: x is None or _hides(x))[0]
    masked, absent, position = set(), set(), 0
    positions = []
    for _, value in flat:
        positions.append(position)
        position += value is not None and not _hides(value)
    for index, path in _below("params", [components(path) for path, _ in flat]):
        value = flat[index][1]
        if value is None:
            absent.add(path)
            continue
        if _hides(value):
            masked.add(path)
        for depth, child in enumerate(path):
            leaves = modules.setdefault(path[:depth], {}).setdefault(child, [])
            leaves.append((path, positions[index], value))
    return modules, masked, absent


def _hides(value: Any) -> bool:
    """Returns whether a mask of optax took the parameters away."""
    return isinstance(value, optax.MaskedNode)


def _is_hidden(
    path: Path,
    owner: Layout | None,
    children: Mapping[str, list[tuple[Path, int, Any]]],
    layouts: Iterable[Layout],
    masked: set[Path],
    absent: set[Path],
) -> bool:
    """Returns whether the queries and keys of a module are there, but all of them hidden."""
    if any(path[:end] in masked | absent for end in range(len(path) + 1)):
        return True
    if owner is not None:
        return all(_hides(value) for name in owner.modules for _, _, value in children[name])
    starts = {other[: len(path) + 1] for other in absent}
    return any(all((*path, name) in starts for name in layout.modules) for layout in layouts)


def _ignored(paths: Collection[Path], patterns: Sequence[str]) -> set[Path]:
    """Returns the paths that match one of the patterns."""
    names = {"/".join(path): path for path in paths}
    matches = {p: [n for n in names if fnmatch.fnmatchcase(n, p)] for p in patterns}
    unused = [pattern for pattern, found in matches.items() if not found]
    if unused:
        shown = ", ".join(map(repr, sorted(names)[:4])) + (", ..." if len(names) > 4 else "")
        raise ValueError(
            f"qk_clip: ignore={', '.join(map(repr, unused))} matches no attention module; there "
            f"are {shown or 'none'}."
        )
    return {names[name] for found in matches.values() for name in found}


def _statistics(
    max_logits: ArrayTree, names: Collection[str]
) -> tuple[Statistics, set[tuple[Path, str]]]:
    """Collects what was sown under these names, and which of it has upper bounds."""
    statistics: Statistics = {}
    bounds = set()
    stats = {suffixed: name for name in names for suffixed in (name + BOUND, name)}
    flat = jax.tree_util.tree_flatten_with_path(max_logits)[0]
    for index, path in _below("intermediates", [_without_index(path) for path, _ in flat]):
        if path and path[-1] in stats:
            key = (path[:-1], stats[path[-1]])
            statistics.setdefault(key, []).append(jnp.asarray(flat[index][1]))
            if path[-1].endswith(BOUND):
                bounds.add(key)
    return statistics, bounds


def _without_index(path: Sequence[Any]) -> Path:
    """Names max logits without their index in the tuple that `sow` makes of several calls."""
    keys = tuple(path)
    while keys and isinstance(keys[-1], jax.tree_util.SequenceKey):
        keys = keys[:-1]
    return components(keys)


def _below(root: str, paths: Sequence[Path]) -> Iterator[tuple[int, Path]]:
    """Numbers the paths; where there is a root key of this name, only those below it."""
    wrapped = any(path[:1] == (root,) for path in paths)
    for index, path in enumerate(paths):
        if not wrapped:
            yield index, path
        elif path[:1] == (root,):
            yield index, path[1:]


def _owner(children: Collection[str], layouts: Iterable[Layout]) -> Layout | None:
    """Returns the first layout whose modules are all there."""
    fitting = (layout for layout in layouts if all(name in children for name in layout.modules))
    return next(fitting, None)

"""Joins statistics to the weights that caused them, by module path."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from muonclip_jax._attention_layouts import Layout, Leaf, Shape, axes_first
from muonclip_jax._paths import components
from muonclip_jax._types import ArrayTree

Path: TypeAlias = tuple[str, ...]
# By path of a module, then by name of a child: path, position and value of each leaf below it.
Modules: TypeAlias = dict[Path, dict[str, list[tuple[Path, int, Any]]]]
# By path of a module and name of a statistic: what was sown there, one entry per call.
Statistics: TypeAlias = dict[tuple[Path, str], list[Array]]

# What follows the name of a statistic that is an upper bound and not exact.
BOUND = "_bound"


class Site(NamedTuple):
    """An attention module of the parameters, with its statistic.

    Attributes:
      path: Its path.
      layout: The layout that describes it.
      children: Names of all its children.
      leaves: The leaves at or below the children that the layout names.
      statistics: What was sown, each with its stack axes at `layout.stat_stack_axis`, heads last.
      is_bound: Whether any of them is an upper bound.
    """

    path: Path
    layout: Layout
    children: tuple[str, ...]
    leaves: dict[str, list[Leaf]]
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
        return len(self.kernels[self.layout.modules[0]].shape) - self.layout.kernel_ndim

    @property
    def stat_axes(self) -> Shape:
        """The stack axes of each statistic."""
        return self.layout.stack_axes(self.layout.stat_stack_axis, self.stack)

    def heads(self, statistic: Array) -> int:
        """Number of query heads: the last axis that is no stack axis."""
        return statistic.shape[axes_first(self.stat_axes, statistic.ndim)[-1]]


class Survey(NamedTuple):
    """All that was found in the parameters and the statistics, whether or not it fits.

    Attributes:
      layouts: What was looked for.
      modules: Every module of the parameters, with its children.
      statistics: Everything sown under the name of a layout's statistic, bounds included.
      owners: The attention modules, with the layout that describes each.
      sites: Those of them that have a statistic.
    """

    layouts: tuple[Layout, ...]
    modules: Modules
    statistics: Statistics
    owners: dict[Path, Layout]
    sites: list[Site]


def survey(params: ArrayTree, max_logits: ArrayTree, layouts: tuple[Layout, ...]) -> Survey:
    """Finds the attention modules of `params` and joins each to its statistic.

    Whole path components are compared. Root keys `params` and `intermediates` are left out; beside
    them, other collections are not looked at. What does not fit is for `check_survey` to say.

    Args:
      params: The parameters.
      max_logits: The statistics.
      layouts: Each module is taken by the first layout whose children it has.

    Returns:
      What was found.
    """
    modules = _modules(params)
    statistics, bounds = _statistics(max_logits, {layout.stat for layout in layouts})
    owners = {path: owner for path in modules if (owner := _owner(modules[path], layouts))}
    sites = [
        _site(
            path,
            layout,
            modules[path],
            statistics[path, layout.stat],
            (path, layout.stat) in bounds,
        )
        for path, layout in owners.items()
        if (path, layout.stat) in statistics
    ]
    return Survey(layouts, modules, statistics, owners, sites)


def _modules(params: ArrayTree) -> Modules:
    """Lists the children of every module, and the leaves at or below each."""
    modules: Modules = {}
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    for index, path in _below("params", [components(path) for path, _ in flat]):
        for depth, child in enumerate(path):
            leaves = modules.setdefault(path[:depth], {}).setdefault(child, [])
            leaves.append((path, index, flat[index][1]))
    return modules


def _statistics(
    max_logits: ArrayTree, names: Collection[str]
) -> tuple[Statistics, set[tuple[Path, str]]]:
    """Collects what was sown under these names, and tells which have upper bounds among it."""
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
    """Names a statistic without its place in the tuple that `sow` makes of several calls."""
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
    """Gives the first layout whose modules are all there."""
    fitting = (layout for layout in layouts if all(name in children for name in layout.modules))
    return next(fitting, None)


def _site(
    path: Path,
    layout: Layout,
    children: Mapping[str, list[tuple[Path, int, Any]]],
    statistics: list[Array],
    is_bound: bool,
) -> Site:
    """Puts together what belongs to one attention module."""

    def leaf(child: str, full_path: Path, index: int, value: Any) -> Leaf:
        below = full_path[len(path) + 1 :]
        # A child that is itself an array is a kernel without a module around it.
        name = below[-1] if below else layout.scaled_leaves[0]
        relative = "/".join((child, *below))
        return Leaf(name, relative, index, jnp.shape(value), jnp.result_type(value))

    leaves = {name: [leaf(name, *entry) for entry in children[name]] for name in layout.modules}
    return Site(path, layout, tuple(children), leaves, statistics, is_bound)

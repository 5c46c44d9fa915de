"""Joins max logits to the weights that produced them, by module path.

Max logits sown at `a/b/attn/max_logits` belong to the kernels under `a/b/attn/`.
"""

import fnmatch
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from muonclip_jax._common.paths import all_components, without_boxes
from muonclip_jax._common.types import ArrayTree
from muonclip_jax._head_layouts.head_layout import HeadLayout, Leaf, Shape, axes_first
from muonclip_jax._head_layouts.kernel_pattern import stack_axes
from muonclip_jax._head_layouts.layout_evidence import module_of
from muonclip_jax._qk_clip.sown import MaxLogits, Path, below_root, sown_arrays

# One leaf at or below a child of a module: its path, its index and its value.
Entry: TypeAlias = tuple[Path, int, Any]
# By path of a module, then by name of a child.
Modules: TypeAlias = dict[Path, dict[str, list[Entry]]]


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


class Matching(NamedTuple):
    """All attention modules and max logits, whether or not they fit.

    Attributes:
      head_layouts: The head layouts of the user.
      modules: Every module of the parameters, with its children.
      max_logits: Everything sown under the name of a head layout's max logits, bounds included.
      unread: Names of everything else that was sown, by path.
      described: The attention modules, each with the head layout that describes it.
      matched: The attention modules that have max logits.
      left_out: Paths of modules that are hidden or ignored.
    """

    head_layouts: tuple[HeadLayout, ...]
    modules: Modules
    max_logits: MaxLogits
    unread: dict[Path, list[str]]
    described: dict[Path, HeadLayout]
    matched: list[AttentionModule]
    left_out: set[Path]


def match(
    params: ArrayTree,
    max_logits: ArrayTree,
    head_layouts: tuple[HeadLayout, ...],
    ignore: Sequence[str],
    fits: Callable[[AttentionModule], bool],
) -> Matching:
    """Finds the attention modules of `params` and joins each to its max logits.

    Whole path components are compared. Root keys `params` and `intermediates` are dropped; beside
    them, other collections are not read. Modules whose queries and keys are all hidden
    (`optax.MaskedNode`, or None) are left out together with their max logits.

    Args:
      params: The parameters.
      max_logits: The max logits.
      head_layouts: The first of them that has the children of a module and fits describes it.
      ignore: Patterns (`fnmatch`) of paths of modules to leave out.
      fits: Whether a module fits its head layout; asked where several have its children.

    Returns:
      All that was found.

    Raises:
      ValueError: for patterns of `ignore` that match no attention module and no max logits.
    """
    modules, masked, absent = _modules(params)
    sown, bounds, unread = sown_arrays(max_logits, {layout.stat for layout in head_layouts})
    named = {path: named_layouts(children, head_layouts) for path, children in modules.items()}
    described = {path: layouts[0] for path, layouts in named.items() if layouts}
    left_out = {
        path
        for path in {*described, *(path for path, _ in sown)}
        if _is_hidden(path, described.get(path), modules, head_layouts, masked, absent)
    }
    ignored = _ignored({*described, *(path for path, _ in sown)}, ignore)
    if ignored and not left_out and ignored >= described.keys() and "*" not in ignore:
        warnings.warn(
            f"qk_clip: ignore={', '.join(map(repr, ignore))} leaves out every attention module, so "
            'that nothing is clipped. If this is the intention, pass ignore="*".',
            stacklevel=3,
        )
    left_out |= ignored
    described = {path: layout for path, layout in described.items() if path not in left_out}
    sown = {key: entries for key, entries in sown.items() if key[0] not in left_out}
    found = Matching(head_layouts, modules, sown, unread, described, [], left_out)
    for path, first in described.items():
        if key_of(path, first) not in sown:
            continue
        layouts = [layout for layout in named[path] if layout.stat == first.stat]
        is_bound = key_of(path, first) in bounds
        candidates = [attention_module(found, path, one, is_bound=is_bound) for one in layouts]
        fitting = filter(fits, candidates) if len(candidates) > 1 else iter(candidates)
        found.matched.append(next(fitting, candidates[0]))
    return found


def key_of(path: Path, layout: HeadLayout) -> tuple[Path, str]:
    """Returns the key of a module's max logits."""
    return path, layout.stat


def attention_module(
    found: Matching,
    path: Path,
    layout: HeadLayout,
    max_logits: list[Array] | None = None,
    *,
    is_bound: bool = False,
) -> AttentionModule:
    """Collects the leaves and the max logits of one attention module.

    Args:
      found: The matching that it is part of.
      path: Path of the module.
      layout: The head layout that describes it.
      max_logits: Its max logits; None: all that were sown.
      is_bound: Whether its max logits are an upper bound.

    Returns:
      The module.
    """
    children, depth = found.modules[path], len(path)
    leaves: dict[str, list[Leaf]] = {}
    hidden: list[str] = []
    for name in layout.modules:
        there = [entry for entry in children[name] if not _hides(entry[2])]
        leaves[name] = [_leaf(layout, depth, name, *entry) for entry in there]
        hidden += ["/".join(full[depth:]) for full, _, value in children[name] if _hides(value)]
    for name in layout.scaled_leaves[1:]:  # such as an array "bq" beside "wq"
        owner, entries = module_of(layout, name), children.get(name, [])
        if owner and name not in layout.modules and entries and len(entries[0][0]) == depth + 1:
            hidden += [name] * _hides(entries[0][2])
            there = [entry for entry in entries if not _hides(entry[2])]
            leaves[owner] += [
                _leaf(layout, depth, name, *entry)._replace(name=name) for entry in there
            ]
    paths = tuple(
        full[depth:]
        for entries in children.values()
        for full, _, _ in entries
        if not any(full[:end] in found.described for end in range(depth + 1, len(full)))
    )
    shapes = {
        name: [jnp.shape(x) for _, _, x in entries if not _hides(x)]
        for name, entries in children.items()
    }
    sown = found.max_logits[key_of(path, layout)] if max_logits is None else max_logits
    return AttentionModule(path, layout, shapes, paths, leaves, tuple(hidden), sown, is_bound)


def _leaf(
    layout: HeadLayout, depth: int, child: str, full_path: Path, index: int, value: Any
) -> Leaf:
    """Describes a leaf of a child of the attention module at a depth."""
    below = full_path[depth + 1 :]
    # A child that is itself an array is a kernel without a module around it.
    name = below[-1] if below else layout.scaled_leaves[0]
    relative = "/".join((child, *below))
    return Leaf(name, relative, index, jnp.shape(value), jnp.result_type(value))


def _modules(params: ArrayTree) -> tuple[Modules, set[Path], set[Path]]:
    """Lists the children of every module and the leaves below each, then masked and None paths."""
    modules: Modules = {}
    masked, absent, position = set(), set(), 0
    positions = []
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: x is None or _hides(x))[0]
    for _, value in flat:
        positions.append(position)
        position += value is not None and not _hides(value)
    paths = without_boxes(all_components([path for path, _ in flat]))
    for index, path in below_root("params", paths):
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


def named_layouts(children: Collection[str], layouts: Iterable[HeadLayout]) -> list[HeadLayout]:
    """Returns the head layouts whose modules are all among the children.

    Args:
      children: Names of the children of one module.
      layouts: The head layouts.
    """
    return [layout for layout in layouts if all(name in children for name in layout.modules)]


def _hides(value: Any) -> bool:
    """Returns whether a mask of optax replaced a parameter."""
    return isinstance(value, optax.MaskedNode)


def _is_hidden(
    path: Path,
    layout: HeadLayout | None,
    modules: Mapping[Path, Mapping[str, list[Entry]]],
    layouts: Iterable[HeadLayout],
    masked: set[Path],
    absent: set[Path],
) -> bool:
    """Returns whether a mask hides all queries and keys of a module."""
    if any(path[:end] in masked | absent for end in range(len(path) + 1)):
        return True
    if layout is not None:
        return all(_hides(value) for name in layout.modules for *_, value in modules[path][name])
    starts = {other[: len(path) + 1] for other in absent}
    return any(all((*path, name) in starts for name in one.modules) for one in layouts)


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

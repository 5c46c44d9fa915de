"""`per_head=`: finds the kernels of attention whose heads are matrices of their own."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from muonclip_jax._common.paths import leaf_paths
from muonclip_jax._common.settings import Rule, shown
from muonclip_jax._common.types import ArrayTree
from muonclip_jax._head_layouts.head_layout import HeadLayout, Leaf, layouts_of
from muonclip_jax._head_layouts.module_names import words
from muonclip_jax._muon.head_split import head_split
from muonclip_jax._muon.per_head_analysis import analysis_splits
from muonclip_jax._muon.roles.decision import HeadPatterns
from muonclip_jax._orthogonalize.dimension_numbers import DimensionNumbersOrFn, per_leaf
from muonclip_jax._orthogonalize.split import Split
from muonclip_jax._program.analysis import Analysis

PerHead: TypeAlias = HeadLayout | tuple[HeadLayout, ...] | Analysis | None
Path: TypeAlias = tuple[str, ...]
Shape: TypeAlias = tuple[int, ...]

_FIX = (
    "Pass a head layout that describes these kernels, or a tuple of layouts: docs/qk_clip.md has a "
    "table. overrides= decides for single kernels."
)


def _rule(value: Any) -> Exception | None:
    """Returns what is wrong with `per_head`, None if nothing is."""
    if value is None or isinstance(value, Analysis) or layouts_of(value):
        return None
    return TypeError(
        f"a head layout, a tuple of head layouts, an Analysis or None, got {shown(value)}"
    )


def _rule_or_layout(value: Any) -> Exception | None:
    """Returns what is wrong with `per_head` of `muonclip`, where True means its layout."""
    return None if isinstance(value, bool) else _rule(value)


PER_HEAD_RULES: dict[str, Rule] = {"per_head": _rule}
LAYOUT_RULES: dict[str, Rule] = {"layout": _rule}
PER_HEAD_OR_LAYOUT_RULES: dict[str, Rule] = {"per_head": _rule_or_layout}


def head_patterns(layouts: PerHead) -> tuple[HeadPatterns, ...]:
    """Lists for each head layout the modules that project into heads.

    Args:
      layouts: The head layouts; the dimension numbers of an analysis are passed on their own.

    Returns:
      The axes of their kernels, as `RoleSettings` has them.
    """
    return tuple(
        {name: (pattern.axes, one.stack_axis) for name, pattern in one.patterns.items()}
        for one in layouts_of(layouts) or ()
    )


def with_heads(
    caller: str, dimension_numbers: DimensionNumbersOrFn | None, per_head: PerHead
) -> DimensionNumbersOrFn | None:
    """Splits the heads of leaves that have dimension numbers.

    Args:
      caller: Name of the public function that was called.
      dimension_numbers: See `scale_by_muon`.
      per_head: See `muon`.

    Returns:
      Dimension numbers with a `Split` for each kernel of attention.
    """
    if per_head is None:
        return dimension_numbers

    def numbers(tree: ArrayTree) -> ArrayTree:
        leaves, structure = jax.tree.flatten(tree)
        shapes = [tuple(np.shape(x)) for x in leaves]
        splits = find_heads(caller, leaf_paths(tree), shapes, per_head).splits
        name = f"{caller}: weight_dimension_numbers"
        whole = enumerate(per_leaf(name, dimension_numbers, tree))
        return structure.unflatten(splits.get(index, entry) for index, entry in whole)

    return numbers


class Heads(NamedTuple):
    """The kernels whose heads are matrices.

    Attributes:
      splits: How each kernel is split, by its index.
      left_whole: Why kernels with the names of a head layout are not split, by their index.
    """

    splits: dict[int, Split]
    left_whole: dict[int, str]


class _Module(NamedTuple):
    """A module with the children of a head layout.

    Attributes:
      path: Its path.
      children: Indices of the leaves at and below each child; none for hidden children.
      layouts: The head layouts whose children it has.
      recurrent: A child that linear attention has and softmax attention has not.
    """

    path: Path
    children: dict[str, list[int]]
    layouts: list[HeadLayout]
    recurrent: str


def find_heads(
    caller: str,
    paths: Sequence[Path],
    shapes: Sequence[Shape],
    per_head: PerHead,
    decided: Collection[int] = (),
    hidden: Sequence[Path] = (),
    *,
    is_part: bool = False,
) -> Heads:
    """Finds the kernels whose heads are matrices of their own.

    Linear attention, such as KDA and Gated DeltaNet, may have modules of the same names. It is left
    whole, unless no softmax attention has these names: then the layout is meant for it.

    Args:
      caller: Name of the public function that was called.
      paths: Path of each parameter.
      shapes: Its shape.
      per_head: The head layouts, or an analysis.
      decided: Indices of parameters that an override decides.
      hidden: Paths at and below which another optimizer has the leaves.
      is_part: Whether a mask hides modules, so that there may be no attention here.

    Returns:
      The splits.

    Raises:
      ValueError: with the paths of all modules that do not fit their layout, or if no module has
        the names of a layout.

    Example:
      >>> from muonclip_jax import MultiHeadLayout
      >>> paths = [("attn", "query", "kernel"), ("attn", "key", "kernel")]
      >>> heads = find_heads("muon", paths, [(8, 4, 2), (8, 2, 2)], MultiHeadLayout())
      >>> heads.splits[1].parts[0].axes
      Axes(batch=(1,), reduction=(0,), output=(2,))
    """
    if per_head is None or not paths:
        return Heads({}, {})
    if isinstance(per_head, Analysis):
        return Heads(analysis_splits(caller, per_head, paths, shapes, decided), {})
    layouts = layouts_of(per_head) or ()
    modules = [*_modules(paths, hidden, layouts)]
    if not modules and not is_part:
        wanted = ", or ".join(" and ".join(map(repr, layout.projections)) for layout in layouts)
        raise ValueError(
            f"{caller}: per_head matches no parameter: no module has {wanted}. Pass the names of "
            "the query and key modules in the head layout."
        )
    softmax = {module.layouts[0] for module in modules if not module.recurrent}
    heads, faults = Heads({}, {}), []
    for module in modules:
        indices = [
            i for name in module.layouts[0].projections for i in module.children.get(name, ())
        ]
        if set(indices) <= {*decided}:
            continue
        if module.recurrent and module.layouts[0] in softmax:
            reason = f"not per head: '{module.recurrent}' is of linear attention"
            heads.left_whole.update(dict.fromkeys(indices, reason))
            continue
        try:
            heads.splits.update(_first_fitting(module, paths, shapes))
        except ValueError as error:
            faults.append(f"  {'/'.join(module.path) or '(root)'}: {error}")
    for index in {*decided} & heads.splits.keys():
        del heads.splits[index]
    if faults:
        raise ValueError(
            f"{caller}: per_head does not fit {len(faults)} of {len(modules)} modules.\n"
            + "\n".join(faults)
            + f"\n{_FIX}"
        )
    return heads


def _modules(
    paths: Sequence[Path], hidden: Sequence[Path], layouts: Sequence[HeadLayout]
) -> Iterator[_Module]:
    """Yields the modules that have all children of a head layout."""
    children: dict[Path, dict[str, list[int]]] = {}
    for index, path in enumerate((*paths, *hidden)):
        for depth, child in enumerate(path):
            below = children.setdefault(path[:depth], {}).setdefault(child, [])
            below += [index] if index < len(paths) else []
    for path, found in children.items():
        named = [layout for layout in layouts if all(name in found for name in layout.modules)]
        recurrent = next(filter(_is_recurrent, found), "")
        if named:
            yield _Module(path, found, named, recurrent)


def _is_recurrent(child: str) -> bool:
    """Returns whether linear attention has a child of this name: a convolution, or its decay."""
    return "conv" in words(child) or child.lower() in ("a_log", "dt_bias")


def _first_fitting(
    module: _Module, paths: Sequence[Path], shapes: Sequence[Shape]
) -> dict[int, Split]:
    """Splits the kernels of a module by the first head layout that fits."""
    errors = []
    for layout in module.layouts:
        try:
            return _splits(layout, module, paths, shapes)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _splits(
    layout: HeadLayout, module: _Module, paths: Sequence[Path], shapes: Sequence[Shape]
) -> dict[int, Split]:
    """Splits the kernels of a module by one head layout."""
    kernels = {}
    for name in layout.projections:
        if kernel := _kernel(layout, module, name, paths, shapes):
            kernels[name] = kernel
    stack = _stack(layout, kernels)
    if all(name in kernels for name in layout.modules):
        children = {name: [shapes[i] for i in found] for name, found in module.children.items()}
        heads = layout.num_heads(kernels, stack)
        for fault in layout.faults(kernels, stack, heads, children):
            raise ValueError(fault)
    return {
        kernels[name].position: head_split(layout, kernels[name], stack, sections)
        for name, sections in layout.sections(kernels, stack).items()
    }


def _kernel(
    layout: HeadLayout,
    module: _Module,
    child: str,
    paths: Sequence[Path],
    shapes: Sequence[Shape],
) -> Leaf | None:
    """Finds the kernel of a child; None if a mask hides it."""
    if child not in module.children:
        there = ", ".join(map(repr, sorted(module.children)))
        raise ValueError(f"value={child!r} is no child; the children are {there}.")
    indices, expected = module.children[child], layout.scaled_leaves[0]
    depth = len(module.path) + 1
    # A child that is itself an array is a kernel without a module around it.
    found = [i for i in indices if len(paths[i]) == depth or paths[i][-1] == expected]
    if indices and len(found) != 1:
        names = ", ".join(sorted(paths[i][-1] for i in indices))
        raise ValueError(f"{child} has {names}, expected one {expected!r} (scaled_leaves).")
    for i in found:
        relative = "/".join(paths[i][depth - 1 :])
        return Leaf(expected, relative, i, shapes[i], np.dtype(np.float32))
    return None


def _stack(layout: HeadLayout, kernels: Mapping[str, Leaf]) -> int:
    """Returns the number of stack axes, which is equal for all kernels."""
    stacks = {}
    for name, kernel in kernels.items():
        pattern = layout.patterns.get(name) or layout.patterns[layout.modules[0]].key()
        stacks[name] = len(kernel.shape) - len(pattern.axes)
        if stacks[name] < 0:
            raise ValueError(f"{kernel} has fewer axes than {str(pattern)!r}.")
    if len({*stacks.values()}) > 1:
        shown_shapes = ", ".join(map(str, kernels.values()))
        raise ValueError(f"{shown_shapes} have unequal numbers of stack axes.")
    return next(iter(stacks.values()), 0)

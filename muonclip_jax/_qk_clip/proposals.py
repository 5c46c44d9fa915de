"""Proposes head layouts in an error message: only head layouts that fit the module."""

import dataclasses
import difflib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from muonclip_jax._head_layouts.fused_qkv import FusedQKVLayout
from muonclip_jax._head_layouts.head_layout import HeadLayout
from muonclip_jax._head_layouts.module_names import (
    letters,
    names_bias,
    names_fused_bias,
    names_keys_and_values,
    normalizes,
)
from muonclip_jax._head_layouts.multi_head import MultiHeadLayout
from muonclip_jax._qk_clip.hints import hint
from muonclip_jax._qk_clip.matching import (
    AttentionModule,
    Matching,
    Path,
    attention_module,
    named_layouts,
)
from muonclip_jax._qk_clip.module_faults import fits
from muonclip_jax._qk_clip.other_kinds import other_kinds, unshown

_PATTERNS = (
    "inputs heads head_dim",
    "inputs (heads head_dim)",
    "(heads head_dim) inputs",
    "heads inputs head_dim",
    "heads head_dim inputs",
    "kv_heads groups head_dim inputs",
    "inputs kv_heads groups head_dim",
    "inputs 3 heads head_dim",
    "inputs heads 3 head_dim",
    "3 heads inputs head_dim",
)
# Patterns of a key kernel that holds the values too, by the pattern of the query kernel.
_KEY_PATTERNS = {
    "inputs heads head_dim": ("inputs 2 heads head_dim", "inputs heads 2 head_dim"),
    "inputs (heads head_dim)": ("inputs (2 heads head_dim)", "inputs (heads 2 head_dim)"),
    "(heads head_dim) inputs": ("(2 heads head_dim) inputs", "(heads 2 head_dim) inputs"),
    "heads inputs head_dim": ("2 heads inputs head_dim",),
    "heads head_dim inputs": ("2 heads head_dim inputs",),
}
# Letters in the name of a module: queries (q), keys (k), values (v), by field of the layout.
_LETTERS = {
    "query": ({"q"},),
    "key": ({"k"}, {"k", "v"}),
    "key_value": ({"k", "v"}, {"k"}),
    "qkv": ({"q", "k", "v"},),
}
_KERNELS = (("kernel", "bias"), ("weight", "bias"), ("w", "b"))
_IF_MIXED = (
    "Of several head layouts, the first that fits a module describes it, so that no tuple is right "
    "here: pass layout=mc.analyze(loss_fn, params, batch)."
)
_MOST = 3  # Head layouts in one message. If more fit, the shapes decide nothing.


def proposal(
    found: Matching, paths: Iterable[Path], kept: Iterable[HeadLayout], *, report_only: bool = False
) -> list[str]:
    """Proposes head layouts that describe modules without a fault.

    Args:
      found: All modules and max logits.
      paths: The modules to describe.
      kept: Head layouts of other modules, which have to stay.
      report_only: See `module_faults`.

    Returns:
      Sentences for the error message. If two or three head layouts fit a module, all are named; if
      none or more fit, a sentence names the fields to fill in.
    """
    fitting = {path: _fitting(found, path, report_only) for path in paths}
    alone = {path: choices[0] for path, choices in fitting.items() if len(choices) == 1}
    several = {path: c for path, c in fitting.items() if 1 < len(c) <= _MOST}
    lines = _lines_of(found, (*kept,), alone, several, report_only)
    new = [layout for choices in (*several.values(), alone.values()) for layout in choices]
    given = {type(layout) for layout in found.head_layouts} - {FusedQKVLayout}
    new = [layout for layout in new if type(layout) not in given]
    sown = {path for path, _ in found.max_logits}
    rest = [path for path, c in fitting.items() if path not in several and len(c) != 1]
    # Other modules, such as a state space layer with an `in_proj`, may hold no attention.
    rest = [path for path in rest if path not in found.described and (path in sown or not lines)]
    hints = dict.fromkeys(hint(found, path) for path in rest)
    return [*lines[:_MOST], *unshown(new), *[*filter(None, hints)][:_MOST]]


def _shown(layouts: Iterable[HeadLayout]) -> str:
    """Shows head layouts as the argument that the user passes."""
    one, *others = (f"mc.{layout}" for layout in dict.fromkeys(layouts))
    return f"layout=({', '.join((one, *others))})" if others else f"layout={one}"


def _by_kernel(several: Mapping[Path, list[HeadLayout]]) -> list[tuple[HeadLayout, ...]]:
    """Groups the choices for all modules by the pattern of the kernels, which they share.

    Returns:
      For each pattern that fits all modules, the layouts; none if a module is left with a choice.
    """
    kernels = [[layout.kernel for layout in choices] for choices in several.values()]
    if not kernels or any(len({*own}) < len(own) for own in kernels):
        return []
    shared = [kernel for kernel in kernels[0] if all(kernel in own for own in kernels)]
    return [
        tuple(one for choices in several.values() for one in choices if one.kernel == kernel)
        for kernel in shared
    ]


def _lines_of(
    found: Matching,
    kept: tuple[HeadLayout, ...],
    alone: Mapping[Path, HeadLayout],
    several: Mapping[Path, list[HeadLayout]],
    report_only: bool,
) -> list[str]:
    """Writes the arguments that describe all modules; or else the head layouts of each.

    Args:
      found: All modules and max logits.
      kept: Head layouts of other modules.
      alone: The head layout of each module without a choice.
      several: The choices for each other module.
      report_only: See `module_faults`.
    """

    def is_right(layouts: tuple[HeadLayout, ...], choices: Mapping[Path, HeadLayout]) -> bool:
        """Returns whether each module is described by its own layout: by the first that fits."""
        for path, choice in choices.items():
            named = named_layouts(found.modules[path], layouts)
            fitting = (x for x in named if _fitting_module(x, found, path, report_only))
            if next(fitting, None) != choice:
                return False
        return True

    if alone and not is_right((*kept, *alone.values()), alone):
        return [*_choices({p: [one] for p, one in alone.items()} | {**several}), _IF_MIXED]
    tuples = [dict(zip(several, one, strict=True)) for one in _by_kernel(several)]
    options = [(*kept, *one.values(), *alone.values()) for one in tuples]
    if options and all(is_right(o, {**alone, **t}) for o, t in zip(options, tuples, strict=True)):
        return [f"By the shapes, pass {' or '.join(map(_shown, options))}."]
    passed = [f"Pass {_shown((*kept, *alone.values()))}."] if alone else []
    return [*passed, *_choices(several)]


def _choices(several: Mapping[Path, list[HeadLayout]]) -> list[str]:
    """Lists the choices for each module, in one line for all modules with equal choices."""
    paths: dict[tuple[HeadLayout, ...], list[Path]] = {}
    for path, choices in several.items():
        paths.setdefault(tuple(choices), []).append(path)
    lines = []
    for choices, (first, *others) in paths.items():
        more = f" and {len(others)} more fit" if others else " fits"
        shown = " or ".join(f"mc.{layout}" for layout in choices)
        lines.append(f"By its shapes, {'/'.join(first) or 'the root'}{more} {shown}.")
    return lines


def _fitting(found: Matching, path: Path, report_only: bool) -> list[HeadLayout]:
    """Lists the most plausible head layouts that describe one module without a fault."""
    own = {layout.kernel for layout in found.head_layouts}
    ranks: dict[HeadLayout, tuple[bool, bool]] = {}
    for layout in found.head_layouts:
        for candidate in _candidates(layout, found, path):
            module = _fitting_module(candidate, found, path, report_only)
            # Without stacked layers the axis of the stack decides nothing.
            if module is not None and (module.stack or candidate.stack_axis == layout.stack_axis):
                # The user's own settings first, then heads that are not wider than the inputs.
                is_own = candidate.kernel in own and candidate.stack_axis == layout.stack_axis
                ranks[candidate] = is_own, _is_narrow(module)
    if not ranks:
        own_axis = found.head_layouts[0].stack_axis
        for candidate in _others(found, path):
            module = _fitting_module(candidate, found, path, report_only)
            if module is not None and (module.stack or candidate.stack_axis == own_axis):
                ranks[candidate] = False, _is_narrow(module)
    best = max(ranks.values(), default=None)
    return [candidate for candidate, rank in ranks.items() if rank == best]


def _others(found: Matching, path: Path) -> Iterator[HeadLayout]:
    """Yields head layouts of other kinds, with the names of the leaves in the modules."""
    own, children = found.head_layouts, found.modules[path]
    entries = found.max_logits.get((path, own[0].stat), [])
    heads = entries[0].shape[-1] if entries and entries[0].ndim else None
    shapes = {n: [np.shape(value) for *_, value in leaves] for n, leaves in children.items()}
    for layout in other_kinds(own, shapes, heads):
        if isinstance(layout, MultiHeadLayout):
            yield from _candidates(layout, found, path)
        else:
            for scaled in _scaled_leaves(layout, found, path, layout.modules):
                yield dataclasses.replace(layout, **scaled)


def _candidates(layout: HeadLayout, found: Matching, path: Path) -> Iterator[HeadLayout]:
    """Varies the names of modules and leaves, and the patterns, but no other field."""
    children = found.modules[path]
    for names in itertools.product(
        *(_likely(layout, field, children) for field in layout.module_fields)
    ):
        if len(set(names)) != len(names):
            continue
        fields: dict[str, Any] = dict(zip(layout.module_fields, names, strict=True))
        for scaled in _scaled_leaves(layout, found, path, names):
            yield from _patterns(layout, fields | scaled, found, path)


def _likely(layout: HeadLayout, field: str, children: Any) -> list[str]:
    """Lists children that may be the module of a field, names near to the layout's name first."""
    name = getattr(layout, field)
    if name in children:
        return [name]
    likely = [c for c in children if normalizes(c) is None and letters(c) in _LETTERS[field]]
    ranks = {c: max(np.ndim(value) for *_, value in children[c]) for c in likely}
    likely = [c for c in likely if not names_bias(c) or ranks[c] == max(ranks.values())]
    return difflib.get_close_matches(name, likely, n=3, cutoff=0.0)


def _scaled_leaves(
    layout: HeadLayout, found: Matching, path: Path, names: Collection[str]
) -> Iterator[dict[str, Any]]:
    """Yields the layout's own leaf names, or the names in the modules, then biases beside them."""
    depth, children = len(path) + 1, found.modules[path]
    leaves = {full[-1] for name in names for full, *_ in children[name] if len(full) > depth}
    own, other = layout.scaled_leaves, layout.scaled_leaves[2:]
    is_own = not leaves or own[0] in leaves
    biases = [
        name
        for name, ((full, *_), *_) in children.items()
        if (names_bias(name) or names_fused_bias(name)) and len(full) == depth
        if name not in (*names, *layout.kept_leaves)
    ]
    for kernel in [own] if is_own else [(*k, *other) for k in _KERNELS if k[0] in leaves]:
        yield {"scaled_leaves": (*dict.fromkeys((*kernel, *biases)),)}


def _patterns(
    layout: HeadLayout, fields: dict[str, Any], found: Matching, path: Path
) -> Iterator[HeadLayout]:
    """Varies the patterns of the kernels."""
    fused = (
        isinstance(layout, MultiHeadLayout)
        and names_keys_and_values(fields["key"])
        and layout.key_kernel is None
        and layout.value is None
    )
    for kernel in dict.fromkeys((layout.kernel, *_PATTERNS)):
        keys = _KEY_PATTERNS.get(kernel, ()) if fused else (None,)
        for key_kernel, axis in itertools.product(keys, dict.fromkeys((layout.stack_axis, 1))):
            extra: dict[str, Any] = {"kernel": kernel}
            if key_kernel:
                extra["key_kernel"] = key_kernel
            if axis != layout.stack_axis:
                extra["stack_axis"] = axis
            width = _head_dim(layout, fields | extra, found, path)
            try:
                yield dataclasses.replace(layout, **fields, **extra, **width)
            except (TypeError, ValueError):  # a pattern that this kind of layout does not have
                continue


def _head_dim(
    layout: HeadLayout, fields: dict[str, Any], found: Matching, path: Path
) -> dict[str, Any]:
    """Infers the width of a head of a flat query kernel from the heads of the max logits."""
    if not isinstance(layout, MultiHeadLayout) or layout.head_dim or "(" not in fields["kernel"]:
        return {}
    sown = found.max_logits.get((path, layout.stat))
    entries = found.modules[path][fields["query"]]
    name = fields.get("scaled_leaves", layout.scaled_leaves)[0]
    kernels = [value for full, _, value in entries if full[-1] == name]
    kernels = kernels or [value for _, _, value in entries]
    if not sown or not sown[0].ndim or np.ndim(kernels[0]) < 2:
        return {}
    heads = sown[0].shape[-1]
    size = np.shape(kernels[0])[-1 if fields["kernel"].startswith("inputs") else -2]
    return {"head_dim": size // heads} if heads and size % heads == 0 and size else {}


def _fitting_module(
    candidate: HeadLayout, found: Matching, path: Path, report_only: bool
) -> AttentionModule | None:
    """Describes a module by a head layout; None for a fault or for unequal inputs."""
    sown = found.max_logits.get((path, candidate.stat), [])
    module = attention_module(found, path, candidate, sown)
    if not all(name in module.kernels and module.stack_of(name) >= 0 for name in candidate.modules):
        return None
    if not sown:
        module = module._replace(max_logits=_stand_in(module))
    if not module.max_logits or not fits(module, report_only=report_only):
        return None
    inputs = {_sizes(module, name)["inputs"] for name in candidate.modules}
    return module if len(inputs) == 1 or not isinstance(candidate, MultiHeadLayout) else None


def _sizes(module: AttentionModule, name: str) -> dict[str, int]:
    """Returns the sizes of one kernel's unflattened axes."""
    layout = module.head_layout
    shape = layout.split(module.kernels[name].shape, module.stack)[1]
    axes = layout.patterns[name].axes
    return {axis[0]: n for axis, n in zip(axes, shape, strict=True) if len(axis) == 1}


def _is_narrow(module: AttentionModule) -> bool:
    """Returns whether heads are not wider than the inputs."""
    sizes = _sizes(module, module.head_layout.modules[0])
    return sizes.get("head_dim", 0) <= sizes["inputs"]


def _stand_in(module: AttentionModule) -> list[Any]:
    """Makes max logits for a module without any, if its kernel shows the number of heads."""
    layout, name = module.head_layout, module.head_layout.modules[0]
    if layout.patterns[name].is_flat or not isinstance(layout, MultiHeadLayout):
        return []
    stack = layout.split(module.kernels[name].shape, module.stack)[0]
    sizes = _sizes(module, name)
    heads = sizes.get("heads") or sizes.get("kv_heads", 0) * sizes.get("groups", 0)
    return [np.moveaxis(np.empty((*stack, heads)), range(len(stack)), module.stat_axes)]

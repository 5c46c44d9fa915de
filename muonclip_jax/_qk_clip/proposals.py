"""Proposes head layouts in an error message: only head layouts that fit the module."""

import dataclasses
import difflib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from muonclip_jax._head_layouts.head_layout import HeadLayout
from muonclip_jax._head_layouts.module_names import letters, names_keys_and_values, normalizes
from muonclip_jax._head_layouts.multi_head import MultiHeadLayout
from muonclip_jax._qk_clip.matching import AttentionModule, Matching, Path, attention_module
from muonclip_jax._qk_clip.module_faults import fits

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
_MOST = 3  # Head layouts in one message. If more fit, the shapes decide nothing.


def proposal(
    found: Matching, paths: Iterable[Path], kept: Iterable[HeadLayout], *, report_only: bool = False
) -> str:
    """Proposes head layouts that describe modules without a fault.

    Args:
      found: All modules and max logits.
      paths: The modules to describe.
      kept: Head layouts of other modules, which have to stay.
      report_only: See `module_faults`.

    Returns:
      Sentences for the error message, or an empty string. If two or three head layouts fit a
      module, all are named; if more fit, none.
    """
    fitting = {path: _fitting(found, path, report_only) for path in paths}
    alone = dict.fromkeys(choices[0] for choices in fitting.values() if len(choices) == 1)
    lines = []
    if alone:
        layouts = tuple(dict.fromkeys((*kept, *alone)))
        lines.append(f"Pass layout={layouts[0] if len(layouts) == 1 else layouts}.")
    several: dict[tuple[HeadLayout, ...], list[Path]] = {}
    for path, choices in fitting.items():
        if 1 < len(choices) <= _MOST:
            several.setdefault(tuple(choices), []).append(path)
    for choices, (first, *others) in several.items():
        more = f" and {len(others)} more fit" if others else " fits"
        shown = " or ".join(map(str, choices))
        lines.append(f"By its shapes, {'/'.join(first) or 'the root'}{more} {shown}.")
    return "\n".join(dict.fromkeys(lines[:_MOST]))


def hint(found: Matching, paths: Iterable[Path]) -> str:
    """Names the kind of layout that a module without a proposal needs.

    Args:
      found: All modules and max logits.
      paths: The modules to describe.

    Returns:
      One sentence, or an empty string for modules without names of queries and keys and without
      max logits.
    """
    for path in paths:
        children = found.modules[path]
        shown = {name: letters(name) for name in children if normalizes(name) is None}
        fused = [n for n, found_letters in shown.items() if found_letters >= {"q", "k", "v"}]
        fused += [name for name in ("c_attn", "in_proj") if name in children]
        latent = {"q_b", "kv_b", "wq_b", "wkv_b", "q_b_proj", "kv_b_proj"} & {*children}
        if fused:
            return (
                f"{fused[0]!r} holds queries, keys and values: pass a FusedQKVLayout with "
                f"qkv={fused[0]!r} and its head_dim."
            )
        if len(latent) > 1:
            return (
                f"{' and '.join(map(repr, sorted(latent)))} are up-projections of latent "
                "attention: pass an MLALayout with these names and its nope_dim, rope_dim, "
                "value_dim and kernel."
            )
        if {"q"} in shown.values() and any(
            "k" in found_letters for found_letters in shown.values()
        ):
            return (
                "No layout fits by names and shapes alone: pass a MultiHeadLayout with query, key "
                "and kernel, and with query_dim where query heads hold a gate too; docs/qk_clip.md "
                "has a table of kernels."
            )
    if any(path in paths for path, _ in found.max_logits):
        return (
            "These names do not show queries and keys: name them in a MultiHeadLayout, or pass "
            "layout=mc.analyze(loss_fn, params, batch), which finds them without names."
        )
    return ""


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
    best = max(ranks.values(), default=None)
    return [candidate for candidate, rank in ranks.items() if rank == best]


def _candidates(layout: HeadLayout, found: Matching, path: Path) -> Iterator[HeadLayout]:
    """Varies the names of modules and leaves, and the patterns, but no other field."""
    children = found.modules[path]
    for names in itertools.product(
        *(_likely(layout, field, children) for field in layout.module_fields)
    ):
        if len(set(names)) != len(names):
            continue
        leaves = {
            full[-1] for name in names for full, _, _ in children[name] if len(full) > len(path) + 1
        }
        fields: dict[str, Any] = dict(zip(layout.module_fields, names, strict=True))
        for scaled in _scaled_leaves(layout, leaves):
            yield from _patterns(layout, fields | scaled, found, path)


def _likely(layout: HeadLayout, field: str, children: Any) -> list[str]:
    """Lists children that may be the module of a field, names near to the layout's name first."""
    name = getattr(layout, field)
    if name in children:
        return [name]
    likely = [c for c in children if normalizes(c) is None and letters(c) in _LETTERS[field]]
    return difflib.get_close_matches(name, likely, n=3, cutoff=0.0)


def _scaled_leaves(layout: HeadLayout, leaves: set[str]) -> list[dict[str, Any]]:
    """Returns the layout's own leaf names, or the names in the modules."""
    if not leaves or layout.scaled_leaves[0] in leaves:
        return [{}]
    found = [names for names in _KERNELS if names[0] in leaves]
    return [{"scaled_leaves": (*names, *layout.scaled_leaves[2:])} for names in found]


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

"""Proposes layouts for an error message: only layouts that fit the module."""

import dataclasses
import difflib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from muonclip_jax._qk_clip.child_names import letters, names_keys_and_values, normalizes
from muonclip_jax._qk_clip.head_layout import Layout
from muonclip_jax._qk_clip.multi_head import MultiHeadLayout
from muonclip_jax._qk_clip.site_faults import site_faults
from muonclip_jax._qk_clip.sites import Path, Site, Survey, make_site

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
# Patterns of keys beside values, by the pattern of the queries.
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
_MOST = 3  # Layouts in one message. Where more fit, the shapes decide nothing.


def proposal(
    found: Survey, paths: Iterable[Path], kept: Iterable[Layout], *, watching: bool = False
) -> str:
    """Proposes layouts that describe modules without a fault.

    Args:
      found: All modules and max logits.
      paths: The modules to describe.
      kept: Layouts of other modules, which have to stay.
      watching: See `site_faults`.

    Returns:
      Sentences for the error message, or an empty string. Where several layouts fit a module, all
      are named; where more than three do, none.
    """
    fitting = {path: _fitting(found, path, watching) for path in paths}
    alone = dict.fromkeys(fits[0] for fits in fitting.values() if len(fits) == 1)
    lines = []
    if alone:
        layouts = tuple(dict.fromkeys((*kept, *alone)))
        lines.append(f"Pass layout={layouts[0] if len(layouts) == 1 else layouts}.")
    several: dict[tuple[Layout, ...], list[Path]] = {}
    for path, fits in fitting.items():
        if 1 < len(fits) <= _MOST:
            several.setdefault(tuple(fits), []).append(path)
    for fits, (first, *others) in several.items():
        more = f" and {len(others)} more fit" if others else " fits"
        shown = " or ".join(map(str, fits))
        lines.append(f"By its shapes, {'/'.join(first) or 'the root'}{more} {shown}.")
    return "\n".join(dict.fromkeys(lines[:_MOST]))


def hint(found: Survey, paths: Iterable[Path]) -> str:
    """Names the kind of layout that a module without a proposal needs.

    Args:
      found: All modules and max logits.
      paths: The modules to describe.

    Returns:
      One sentence, or an empty string if no module has queries and keys by name.
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
    return ""


def _fitting(found: Survey, path: Path, watching: bool) -> list[Layout]:
    """Lists the layouts that describe one module without a fault: the most plausible ones."""
    own = {layout.kernel for layout in found.layouts}
    fits: dict[Layout, tuple[bool, bool]] = {}
    for layout in found.layouts:
        for candidate in _candidates(layout, found, path):
            site = _fitting_site(candidate, found, path, watching)
            # Without stacked layers the axis of the stack decides nothing.
            if site is not None and (site.stack or candidate.stack_axis == layout.stack_axis):
                # The user's own settings, then a head that is not wider than the inputs.
                is_own = candidate.kernel in own and candidate.stack_axis == layout.stack_axis
                fits[candidate] = is_own, _is_narrow(site)
    best = max(fits.values(), default=None)
    return [candidate for candidate, rank in fits.items() if rank == best]


def _candidates(layout: Layout, found: Survey, path: Path) -> Iterator[Layout]:
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


def _likely(layout: Layout, field: str, children: Any) -> list[str]:
    """Names of children that may be the module of a field, nearest to the layout's name first."""
    name = getattr(layout, field)
    if name in children:
        return [name]
    fits = [c for c in children if normalizes(c) is None and letters(c) in _LETTERS[field]]
    return difflib.get_close_matches(name, fits, n=3, cutoff=0.0)


def _scaled_leaves(layout: Layout, leaves: set[str]) -> list[dict[str, Any]]:
    """Returns the layout's own leaf names, or those that the modules have."""
    if not leaves or layout.scaled_leaves[0] in leaves:
        return [{}]
    found = [names for names in _KERNELS if names[0] in leaves]
    return [{"scaled_leaves": (*names, *layout.scaled_leaves[2:])} for names in found]


def _patterns(
    layout: Layout, fields: dict[str, Any], found: Survey, path: Path
) -> Iterator[Layout]:
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


def _head_dim(layout: Layout, fields: dict[str, Any], found: Survey, path: Path) -> dict[str, Any]:
    """Infers the width of a head of a flat query kernel from the heads of the max logits."""
    if not isinstance(layout, MultiHeadLayout) or layout.head_dim or "(" not in fields["kernel"]:
        return {}
    stats = found.statistics.get((path, layout.stat))
    entries = found.modules[path][fields["query"]]
    kernels = [
        v
        for full, _, v in entries
        if full[-1] in fields.get("scaled_leaves", layout.scaled_leaves)[:1]
    ]
    kernels = kernels or [value for _, _, value in entries]
    if not stats or not stats[0].ndim or np.ndim(kernels[0]) < 2:
        return {}
    heads = stats[0].shape[-1]
    size = np.shape(kernels[0])[-1 if fields["kernel"].startswith("inputs") else -2]
    return {"head_dim": size // heads} if heads and size % heads == 0 and size else {}


def _fitting_site(candidate: Layout, found: Survey, path: Path, watching: bool) -> Site | None:
    """Returns a module as a layout describes it, if without a fault and with equal inputs."""
    stats = found.statistics.get((path, candidate.stat), [])
    site = make_site(found, path, candidate, statistics=stats)
    if not all(name in site.kernels and site.stack_of(name) >= 0 for name in candidate.modules):
        return None
    if not stats:
        site = site._replace(statistics=_stand_in(site))
    if not site.statistics or site_faults(site, watching=watching):
        return None
    inputs = {_sizes(site, name)["inputs"] for name in candidate.modules}
    return site if len(inputs) == 1 or not isinstance(candidate, MultiHeadLayout) else None


def _sizes(site: Site, name: str) -> dict[str, int]:
    """Returns the sizes of one kernel's unflattened axes."""
    pattern = site.layout.patterns[name]
    shape = site.layout.split(site.kernels[name].shape, site.stack)[1]
    return {axis[0]: n for axis, n in zip(pattern.axes, shape, strict=True) if len(axis) == 1}


def _is_narrow(site: Site) -> bool:
    """Returns whether heads are not wider than the inputs."""
    sizes = _sizes(site, site.layout.modules[0])
    return sizes.get("head_dim", 0) <= sizes["inputs"]


def _stand_in(site: Site) -> list[Any]:
    """Makes max logits for a module without, where its kernel shows the number of heads."""
    layout, name = site.layout, site.layout.modules[0]
    if layout.patterns[name].is_flat or not isinstance(layout, MultiHeadLayout):
        return []
    stack = layout.split(site.kernels[name].shape, site.stack)[0]
    sizes = _sizes(site, name)
    heads = sizes.get("heads") or sizes.get("kv_heads", 0) * sizes.get("groups", 0)
    return [np.moveaxis(np.empty((*stack, heads)), range(len(stack)), site.stat_axes)]

"""Says what does not fit between parameters, statistics and layouts: everything, once."""

import dataclasses
import difflib
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from muonclip_jax._attention_layouts import Layout
from muonclip_jax._attention_sites import Path, Site, Survey

_IF_MISSING = (
    'A statistic is missing when "intermediates" is not in `mutable` of `apply`, or not in '
    "`variable_axes` of `nn.scan` or `nn.vmap`, or when attention with `attention_fn` was called "
    "without `sow_weights=True`; in NNX, when no `nnx.capture(..., MaxLogits)` was around the call."
)
_IF_ADAPTERS = "Pass the whole parameter tree: a clip of adapters alone cannot hold."
_IF_UNKNOWN = (
    "List a leaf that carries the columns of the heads in `scaled_leaves` of the layout, any other "
    "in `kept_leaves`."
)
_IF_INERT = (
    "A norm of queries and keys bounds the logits by itself: leave the clip out, or pass "
    "`qk_norm=()` to the layout if these children are something else."
)


class Fault(NamedTuple):
    """One thing that does not fit: at which module, what, and what to do about it."""

    path: Path
    text: str
    cure: str = ""


def check_survey(found: Survey, *, strict: bool) -> int:
    """Raises, or under `strict=False` warns, if modules and statistics do not fit.

    Args:
      found: What was found.
      strict: Whether a module without a statistic, or the reverse, is an error or skipped.

    Returns:
      How many modules and statistics are skipped.

    Raises:
      ValueError: with everything that does not fit.
    """
    unpaired = [*_missing(found), *_unused(found)]
    if not found.owners and not found.statistics:
        unpaired = [_nothing(found)]
    faults = [fault for site in found.sites for fault in _leaf_faults(site) or _shape_faults(site)]
    if faults or (strict and unpaired):
        raise ValueError(_message([*(unpaired if strict else ()), *faults], found.layouts))
    if unpaired:
        _warn_skipped(unpaired)
    return len(unpaired)


def _missing(found: Survey) -> Iterator[Fault]:
    """Lists the attention modules without statistic."""
    free = [(*path, stat) for path, stat in found.statistics if path not in found.owners]
    for path, layout in found.owners.items():
        if (path, layout.stat) not in found.statistics:
            near = _nearest((*path, layout.stat), free)
            yield Fault(path, f"no statistic {layout.stat!r}{near}.", _IF_MISSING)


def _unused(found: Survey) -> Iterator[Fault]:
    """Lists the statistics that belong to no attention module."""
    for path, stat in found.statistics:
        children, owner = found.modules.get(path), found.owners.get(path)
        if children is None:
            near = _nearest(path, found.owners)
            yield Fault(path, f"has {stat!r}, but the parameters have no such module{near}.")
        elif owner is None:
            layout = next(layout for layout in found.layouts if layout.stat == stat)
            absent = " and no ".join(repr(name) for name in layout.modules if name not in children)
            there = ", ".join(repr(name) for name in sorted(children))
            text = f"no module {absent}; there are {there}."
            yield Fault(path, text, _renaming(layout, children))
        elif owner.stat != stat:
            yield Fault(path, f"has {stat!r}, but its layout {owner} reads {owner.stat!r}.")


def _nothing(found: Survey) -> Fault:
    """Says what was looked for where neither modules nor statistics were found."""
    layouts, modules = found.layouts, found.modules
    wanted = ", or ".join(" and ".join(map(repr, layout.modules)) for layout in layouts)
    stats = ", ".join(sorted({repr(layout.stat) for layout in layouts}))
    cures = (_renaming(layout, modules[path]) for path in modules for layout in layouts)
    text = f"nothing to clip: no module has {wanted}, and no statistic is called {stats}."
    return Fault((), text, next(filter(None, cures), ""))


def _nearest(path: Path, paths: Iterable[Path]) -> str:
    near = difflib.get_close_matches("/".join(path), map("/".join, paths), n=1)
    return f"; nearest is {near[0]!r}" if near else ""


def _renaming(layout: Layout, children: Collection[str]) -> str:
    """Proposes the layout with the children that are there, where each name has a likely one."""
    names = {}
    for field, letters in zip(layout.module_fields, layout.initials, strict=True):
        named = [c for c in children if c[:1] == letters[0] and set(letters) <= set(c)]
        likely = [c for c in named if "norm" not in c and c not in layout.qk_norm]
        near = difflib.get_close_matches(getattr(layout, field), likely, n=1, cutoff=0.0)
        names[field] = next(iter(near), None)
    if None in names.values():
        return ""
    return f"Name the modules: {dataclasses.replace(layout, **names)}."


def _leaf_faults(site: Site) -> list[Fault]:
    """Lists norms that undo a clip, unknown leaves, and kernels that are missing or no numbers."""
    layout, faults = site.layout, []
    for name in layout.qk_norm:
        if name in site.children:
            faults.append(Fault(site.path, f"{name!r} undoes the clip.", _IF_INERT))
    for child, leaves in site.leaves.items():
        names = [leaf.name for leaf in leaves]
        if names.count(layout.scaled_leaves[0]) != 1:
            text = f"{child} has {', '.join(sorted(names))}, not one {layout.scaled_leaves[0]!r}."
            adapters = set(names) <= {*layout.scaled_leaves[1:], *layout.kept_leaves}
            faults.append(Fault(site.path, text, _IF_ADAPTERS if adapters else ""))
        for leaf in leaves:
            if leaf.name not in (*layout.scaled_leaves, *layout.kept_leaves):
                text = f"{leaf.path} is in neither scaled_leaves nor kept_leaves."
                faults.append(Fault(site.path, text, _IF_UNKNOWN))
            elif leaf.name in layout.scaled_leaves and not jnp.issubdtype(leaf.dtype, jnp.floating):
                text = f"{leaf.path} is {leaf.dtype.name}, which cannot be scaled."
                faults.append(Fault(site.path, text))
    return faults


def _shape_faults(site: Site) -> list[Fault]:
    """Lists leaves and statistics whose shapes do not fit each other."""
    texts = list(_rank_faults(site)) or list(_stack_faults(site))
    if not texts:
        texts = list(site.layout.faults(site.kernels, site.stack, site.heads(site.statistics[0])))
    return [Fault(site.path, text) for text in texts]


def _rank_faults(site: Site) -> Iterator[str]:
    """Says which leaves, or statistics, have too few axes or too many."""
    layout, stat = site.layout, site.layout.stat
    first = site.kernels[layout.modules[0]]
    if site.stack < 0:
        yield f"{first} has fewer axes than kernel_ndim={layout.kernel_ndim}; 2 is a flat kernel."
        return
    for _, leaf in site.scaled:
        kernel = leaf.name == first.name
        if kernel and len(leaf.shape) != len(first.shape):
            yield f"{leaf} and {first} differ in rank."
        elif not layout.fits(leaf.shape, site.stack):
            yield f"{leaf} has no rank that fits {first} and stack_axis={layout.stack_axis}."
    for entry in site.statistics:
        if not all(-entry.ndim <= axis < entry.ndim for axis in (*site.stat_axes, site.stack)):
            yield f"{stat} {entry.shape} has too few axes for {site.stack} stack axes and heads."


def _stack_faults(site: Site) -> Iterator[str]:
    """Says which sizes of stacks, columns or heads differ that should be equal."""
    layout, stat = site.layout, site.layout.stat
    first = site.kernels[layout.modules[0]]
    stack, _ = layout.column_shape(first.shape, site.stack)
    for child, leaf in site.scaled:
        kernel = site.kernels[child]
        sizes = layout.column_shape(leaf.shape, site.stack)
        if sizes[0] != stack:
            yield f"{first} stacks {stack} layers, {leaf} stacks {sizes[0]}."
        elif sizes != layout.column_shape(kernel.shape, site.stack):
            yield f"{leaf} does not have the columns of {kernel}."
    heads = site.heads(site.statistics[0])
    for entry in site.statistics:
        sizes = tuple(entry.shape[axis] for axis in site.stat_axes)
        if sizes != stack:
            yield f"{first} stacks {stack} layers, its {stat} {entry.shape} stacks {sizes}."
        if site.heads(entry) != heads:
            yield f"calls have {stat} of {heads} and of {site.heads(entry)} heads."


def _message(faults: Sequence[Fault], layouts: Sequence[Layout]) -> str:
    """Writes the one error: what does not fit, where, and each cure once."""
    count = len({fault.path for fault in faults})
    subject = "1 module does" if count == 1 else f"{count} modules do"
    plural = "s" if len(layouts) > 1 else ""
    head = f"qk_clip: {subject} not fit the layout{plural} {', '.join(map(str, layouts))}."
    cures = dict.fromkeys(fault.cure for fault in faults if fault.cure)
    return "\n".join([head, *map(_line, faults), *cures])


def _warn_skipped(unpaired: Sequence[Fault]) -> None:
    count = "1 module" if len(unpaired) == 1 else f"{len(unpaired)} modules"
    lines = [f"qk_clip: {count} skipped, as strict=False.", *map(_line, unpaired)]
    # The line of the user's call: this, attention_sites and qk_clip are above it.
    warnings.warn("\n".join(lines), stacklevel=4)


def _line(fault: Fault) -> str:
    return f"  {'/'.join(fault.path) or '(root)'}: {fault.text}"

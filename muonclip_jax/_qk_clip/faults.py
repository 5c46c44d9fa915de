"""One error that lists everything that does not fit between parameters, max logits and layouts."""

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence

from muonclip_jax._qk_clip.proposals import hint, proposal
from muonclip_jax._qk_clip.site_faults import Fault, site_faults
from muonclip_jax._qk_clip.sites import Path, Site, Survey, make_site

_IF_LEFT_OUT = "Leave out modules that are not clipped, such as frozen ones, with `ignore=`."
_IF_MISSING = (
    'Max logits are missing when "intermediates" is not in `mutable` of `apply`, or not in '
    "`variable_axes` of `nn.scan` or `nn.vmap`; when attention with `attention_fn` is called "
    "without `sow_weights=True`; in NNX, when no `nnx.capture(..., MaxLogits)` is around the "
    "call.\n" + _IF_LEFT_OUT
)
_IF_ABOVE = (
    "Sow in the attention module itself, the one whose children are queries and keys: max logits "
    "belong to the weights at the same path."
)


def check_survey(found: Survey, *, strict: bool, watching: bool = False) -> tuple[list[Site], int]:
    """Raises, or under `strict=False` warns, if modules and max logits do not fit.

    Args:
      found: What was found.
      strict: Whether a module without max logits, or the reverse, is an error or skipped.
      watching: Whether nothing is clipped, so that norms of queries and keys are accepted.

    Returns:
      The attention modules, each with the first layout that fits it, and the number of modules and
      max logits that are skipped.

    Raises:
      ValueError: with everything that does not fit.
    """
    unpaired = [*_missing(found), *_unused(found)]
    if not (found.owners or found.statistics or found.left_out):
        unpaired = [_nothing(found)]
    sites = [_described(found, site, watching) for site in found.sites]
    faults = [fault for site in sites for fault in site_faults(site, watching=watching)]
    if faults or (strict and unpaired):
        faults = [*(unpaired if strict else ()), *faults]
        raise ValueError(_message(found, faults, watching))
    if unpaired:
        _warn_skipped(unpaired)
    return sites, len(unpaired)


def _described(found: Survey, site: Site, watching: bool) -> Site:
    """Describes a module by the first layout that has its names and fits it."""
    if len(found.layouts) == 1 or not site_faults(site, watching=watching):
        return site
    for layout in found.layouts:
        named = layout.stat == site.layout.stat and {*layout.modules} <= {*site.children}
        if named and layout != site.layout:
            other = make_site(found, site.path, layout, site.is_bound, site.statistics)
            if not site_faults(other, watching=watching):
                return other
    return site


def _missing(found: Survey) -> Iterator[Fault]:
    """Lists the attention modules without max logits."""
    free = [(*path, stat) for path, stat in found.statistics if path not in found.owners]
    for path, layout in found.owners.items():
        if (path, layout.stat) in found.statistics:
            continue
        above = [key for key in free if key[-1] == layout.stat and key[:-1] == path[: len(key) - 1]]
        if above:
            at = "/".join(above[0][:-1]) or "the root"
            yield Fault(path, f"has no {layout.stat}, but {at} above it has.", _IF_ABOVE)
        else:
            near = _nearest((*path, layout.stat), free)
            yield Fault(path, f"has no {layout.stat}{near}.", _IF_MISSING)


def _unused(found: Survey) -> Iterator[Fault]:
    """Lists the max logits that belong to no attention module."""
    for path, stat in found.statistics:
        children, owner = found.modules.get(path), found.owners.get(path)
        below = next((other for other in found.owners if other[: len(path)] == path), None)
        if owner is not None:
            if owner.stat != stat:
                yield Fault(path, f"has {stat}, but its layout {owner} reads {owner.stat}.")
        elif children is None:
            near = _nearest(path, found.owners)
            text = f"has {stat}, but the parameters have no such module{near}."
            yield Fault(path, text, _IF_LEFT_OUT)
        elif below is not None:
            text = f"has {stat}, but queries and keys are in {'/'.join(below)!r}."
            yield Fault(path, text, _IF_ABOVE)
        else:
            layout = next(layout for layout in found.layouts if layout.stat == stat)
            absent = " and no ".join(repr(name) for name in layout.modules if name not in children)
            there = ", ".join(repr(name) for name in sorted(children))
            text = f"no module {absent}; there are {there}."
            yield Fault(path, text)


def _nothing(found: Survey) -> Fault:
    """Describes what was looked for where neither modules nor max logits were found."""
    wanted = ", or ".join(" and ".join(map(repr, layout.modules)) for layout in found.layouts)
    stats = ", ".join(sorted({repr(layout.stat) for layout in found.layouts}))
    text = f"nothing to clip: no module has {wanted}, and no max logits are named {stats}."
    return Fault((), text)


def _nearest(path: Path, paths: Iterable[Path]) -> str:
    near = difflib.get_close_matches("/".join(path), map("/".join, paths), n=1)
    return f"; nearest is {near[0]!r}" if near else ""


def _message(found: Survey, faults: Sequence[Fault], watching: bool) -> str:
    """Writes the one error: what does not fit, where, and each fix once."""
    count = len({fault.path for fault in faults})
    subject = "1 module does" if count == 1 else f"{count} modules do"
    plural = "s" if len(found.layouts) > 1 else ""
    head = f"qk_clip: {subject} not fit the layout{plural} {', '.join(map(str, found.layouts))}."
    nothing = not (found.owners or found.statistics)
    wrong = found.modules if nothing else dict.fromkeys(f.path for f in faults if not f.cure)
    kept = dict.fromkeys(layout for path, layout in found.owners.items() if path not in wrong)
    paths = [path for path in wrong if path in found.modules]
    cures = [line for fault in faults for line in fault.cure.splitlines()]
    proposed = proposal(found, paths, kept, watching=watching) or hint(
        found, [path for path in paths if path not in found.owners]
    )
    cures += proposed.splitlines()
    return "\n".join([head, *_lines(faults), *dict.fromkeys(cures)])


def _warn_skipped(unpaired: Sequence[Fault]) -> None:
    count = "1 module" if len(unpaired) == 1 else f"{len(unpaired)} modules"
    lines = [f"qk_clip: {count} skipped because of strict=False.", *_lines(unpaired)]
    # The line of the user's call: this, attention_sites and qk_clip are above it.
    warnings.warn("\n".join(lines), stacklevel=4)


def _lines(faults: Sequence[Fault]) -> Iterator[str]:
    """Writes one line per fault, and one for all layers that differ in their numbers alone."""
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        path = re.sub(r"\d+", "#", "/".join(fault.path))
        quoted = re.sub(r"'[^']*'", lambda m: re.sub(r"\d+", "#", m[0]), fault.text)
        groups.setdefault((path, quoted), []).append(fault)
    for first, *others in groups.values():
        where = "/".join(first.path) or "(root)"
        more = f" and {len(others)} more layer{'s' * (len(others) > 1)}" if others else ""
        yield f"  {where}{more}: {first.text}"

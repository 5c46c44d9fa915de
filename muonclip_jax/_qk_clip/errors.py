"""One error that lists all mismatches between parameters, max logits and head layouts."""

import difflib
import warnings
from collections.abc import Iterable, Iterator, Sequence

from muonclip_jax._common.folding import fold_faults
from muonclip_jax._qk_clip.matching import Matching, Path, key_of, named_layouts
from muonclip_jax._qk_clip.module_faults import IF_SECOND_PAIR, Fault, module_faults
from muonclip_jax._qk_clip.proposals import proposal

_IF_NOT_CLIPPED = "Leave out modules that are not clipped, such as frozen ones, with `ignore=`."
_IF_MISSING = (
    "Max logits are missing when your own attention module does not call "
    '`mc.linen.sow_max_logits` or `mc.nnx.sow_max_logits`; when "intermediates" is not in '
    "`mutable` of `apply`, or not in `variable_axes` of `nn.scan` or `nn.vmap`; when "
    "attention with `attention_fn` is called without `sow_weights=True`; in NNX, when no "
    "`nnx.capture(..., MaxLogits)` is around the call.\n" + _IF_NOT_CLIPPED
)
_IF_RENAMED = "Sow them as {stat!r}, or pass stat={name!r} in the head layout."
_IF_SWAPPED = "Call qk_clip(params, stats, layout): parameters first, then max logits."
_IF_ABOVE = (
    "Sow in the attention module itself, the parent of the query and key modules: max logits "
    "belong to the weights at the same path."
)


def check_matching(found: Matching, *, strict: bool, report_only: bool = False) -> int:
    """Raises, or under `strict=False` warns, if modules and max logits do not fit.

    Args:
      found: The attention modules and max logits.
      strict: Whether a module without max logits, or max logits without a module, is an error or
        skipped.
      report_only: Whether nothing is clipped, so that norms of queries and keys are accepted.

    Returns:
      The number of modules and max logits that are skipped.

    Raises:
      ValueError: with all mismatches.
    """
    unpaired = [*_missing(found), *_unused(found)]
    if not (found.described or found.max_logits or found.left_out):
        unpaired = [_nothing(found)]
    several = [] if report_only else [*_several_pairs(found)]
    faults = [*_swapped(found), *several]
    others = [one for one in found.matched if one.path not in {f.path for f in several}]
    faults += [f for one in others for f in module_faults(one, report_only=report_only)]
    if faults or (strict and unpaired):
        faults = [*(unpaired if strict else ()), *faults]
        raise ValueError(_message(found, faults, report_only))
    if unpaired:
        _warn_skipped(unpaired)
    return len(unpaired)


def _missing(found: Matching) -> Iterator[Fault]:
    """Lists attention modules without max logits."""
    free = [(*path, stat) for path, stat in found.max_logits if path not in found.described]
    for path, layout in found.described.items():
        if key_of(path, layout) in found.max_logits:
            continue
        above = [key for key in free if key[-1] == layout.stat and key[:-1] == path[: len(key) - 1]]
        if above:
            at = "/".join(above[0][:-1]) or "the root"
            yield Fault(path, f"has no {layout.stat}, but {at} above it has.", _IF_ABOVE)
        elif similar := difflib.get_close_matches(layout.stat, found.unread.get(path, ())):
            text = f"has no {layout.stat}, but {similar[0]!r}."
            yield Fault(path, text, _IF_RENAMED.format(stat=layout.stat, name=similar[0]))
        else:
            near = _nearest((*path, layout.stat), free)
            yield Fault(path, f"has no {layout.stat}{near}.", _IF_MISSING)


def _unused(found: Matching) -> Iterator[Fault]:
    """Lists max logits without an attention module."""
    for path, stat in found.max_logits:
        children, described = found.modules.get(path), found.described.get(path)
        below = next((other for other in found.described if other[: len(path)] == path), None)
        if described is not None:
            if described.stat != stat:
                yield Fault(path, f"has {stat}, but its layout {described} reads {described.stat}.")
        elif children is None:
            near = _nearest(path, found.described)
            text = f"has {stat}, but the parameters have no such module{near}."
            yield Fault(path, text, _IF_NOT_CLIPPED)
        elif below is not None:
            text = f"has {stat}, but queries and keys are in {'/'.join(below)!r}."
            yield Fault(path, text, _IF_ABOVE)
        else:
            layout = next(layout for layout in found.head_layouts if layout.stat == stat)
            absent = " and no ".join(repr(name) for name in layout.modules if name not in children)
            there = ", ".join(repr(name) for name in sorted(children))
            text = f"no module {absent}; there are {there}."
            yield Fault(path, text)


def _swapped(found: Matching) -> Iterator[Fault]:
    """Lists max logits among the parameters, where there are no others."""
    stats = {layout.stat for layout in found.head_layouts}
    for path, children in found.modules.items():
        if not found.max_logits and stats & children.keys():
            name = "/".join((*path, *stats & children.keys()))
            yield Fault(path, f"the parameters hold max logits, {name!r}.", _IF_SWAPPED)


def _several_pairs(found: Matching) -> Iterator[Fault]:
    """Lists modules that have all children of two layouts without a common child."""
    for module in found.matched:
        declared = {*module.head_layout.projections, *module.head_layout.kept_leaves}
        for other in named_layouts(module.children, found.head_layouts):
            if declared.isdisjoint(other.modules):
                text = f"{module.head_layout} and {other} both describe it."
                yield Fault(module.path, text, IF_SECOND_PAIR)


def _nothing(found: Matching) -> Fault:
    """Describes the search that found neither modules nor max logits."""
    wanted = ", or ".join(" and ".join(map(repr, layout.modules)) for layout in found.head_layouts)
    stats = ", ".join(sorted({repr(layout.stat) for layout in found.head_layouts}))
    text = f"nothing to clip: no module has {wanted}, and no max logits are named {stats}."
    return Fault((), text)


def _nearest(path: Path, paths: Iterable[Path]) -> str:
    near = difflib.get_close_matches("/".join(path), map("/".join, paths), n=1)
    return f"; nearest is {near[0]!r}" if near else ""


def _message(found: Matching, faults: Sequence[Fault], report_only: bool) -> str:
    """Writes the one error: each mismatch with its path, then each fix once."""
    count = len({fault.path for fault in faults})
    subject = "1 module does" if count == 1 else f"{count} modules do"
    plural = "s" if len(found.head_layouts) > 1 else ""
    head = (
        f"qk_clip: {subject} not fit the layout{plural} {', '.join(map(str, found.head_layouts))}."
    )
    nothing = not (found.described or found.max_logits)
    wrong = found.modules if nothing else dict.fromkeys(f.path for f in faults if not f.fix)
    kept = dict.fromkeys(layout for path, layout in found.described.items() if path not in wrong)
    paths = [path for path in wrong if path in found.modules]
    fixes = [line for fault in faults for line in fault.fix.splitlines()]
    proposed = proposal(found, paths, kept, report_only=report_only)
    fixes += [line for text in proposed for line in text.splitlines()]
    return "\n".join([head, *_lines(faults), *dict.fromkeys(fixes)])


def _warn_skipped(unpaired: Sequence[Fault]) -> None:
    count = "1 module" if len(unpaired) == 1 else f"{len(unpaired)} modules"
    lines = [f"qk_clip: {count} skipped because of strict=False.", *_lines(unpaired)]
    # The line of the user's call: this function, check_matching and qk_clip are above it.
    warnings.warn("\n".join(lines), stacklevel=4)


def _lines(faults: Sequence[Fault]) -> list[str]:
    """Writes one line per fault; layers whose faults differ only in their number share a line."""
    return fold_faults(("/".join(fault.path), fault.text) for fault in faults)

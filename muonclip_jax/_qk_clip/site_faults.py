"""Lists what does not fit between one attention module, its layout and its max logits."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp

from muonclip_jax._qk_clip.child_names import letters, words
from muonclip_jax._qk_clip.sites import Path, Site

_IF_ADAPTERS = "Pass all parameters: a clip of adapters alone cannot keep the logits down."
_IF_UNKNOWN = (
    "List a leaf that carries the columns of the heads in `scaled_leaves` of the layout, any other "
    "in `kept_leaves`."
)
_IF_HIDDEN = (
    "Mask all of a module's queries and keys or none; or train without the clip (threshold=None), "
    "and call mc.qk_clip on all parameters after optax.apply_updates."
)
_IF_NORM = (
    "A norm between projection and logits gives back the size that the clip takes: the logits stay "
    "and the weights shrink to zero. Leave these modules out with ignore=, or watch them with "
    "threshold=float('inf'), not traced; if the children are no such norms, pass qk_norm=()."
)
_IF_OPEN = (
    "Declare it in the layout: qk_norm=() if nothing normalizes queries or keys between projection "
    "and logits, otherwise the names of the children that do, such as qk_norm={names}."
)


_IF_BIAS = (
    "A head reaches the threshold only if its bias is scaled with its kernel: keep the bias in the "
    "module of the projection, or list it in `kept_leaves` to leave it as it is."
)


class Fault(NamedTuple):
    """One thing that does not fit: at which module, what, and how to fix it."""

    path: Path
    text: str
    cure: str = ""


def site_faults(site: Site, *, watching: bool = False) -> list[Fault]:
    """Lists everything that does not fit at one attention module.

    Args:
      site: The module, with the layout that describes it and its max logits.
      watching: Whether nothing is clipped, so that norms of queries and keys are no fault.

    Returns:
      The faults; none if the clip is right.
    """
    faults = [] if watching else list(_norm_faults(site))
    leaves = [*_bias_faults(site), *_leaf_faults(site)]
    return [*faults, *leaves] if leaves else [*faults, *_shape_faults(site)]


def _norm_faults(site: Site) -> Iterator[Fault]:
    """Lists norms of queries and keys, and norms whose names leave it open."""
    declared = site.layout.qk_norm
    if declared is None:
        named, unnamed = _norms(site)
    else:
        named, unnamed = [name for name in declared if name in site.children], []
        for name in declared:
            if name not in site.children:
                yield Fault(site.path, f"no child {name!r}, which qk_norm names.")
    for name in named:
        yield Fault(site.path, f"{name!r} normalizes queries or keys.", _IF_NORM)
    for name in unnamed:
        cure = _IF_OPEN.format(names=(name.partition("/")[0],))
        yield Fault(site.path, f"{name!r} may normalize queries or keys.", cure)


def _norms(site: Site) -> tuple[list[str], list[str]]:
    """Returns paths of norms of queries or keys, and of those that may be, by their names."""
    named: dict[str, None] = {}
    unnamed: dict[str, None] = {}
    for path in site.paths:
        # A container may name what its norm does not: query/norm, norm/key.
        pairs = [path[0], *map("_".join, itertools.pairwise(path))]
        shown = [site.layout.normalizes(name) for name in pairs]
        own = [site.layout.normalizes(name) for name in path]
        first = next((i for i, letters in enumerate(shown) if letters), None)
        if first is not None:
            named["/".join(path[: first + 1])] = None
        elif own[0] == "":
            unnamed[path[0]] = None
        elif path[0] in site.layout.modules and "" in own:
            unnamed["/".join(path[: own.index("") + 1])] = None
    scales = [name for name in site.children if "scale" in words(name)]
    pair = [name for name in scales if letters(name) in ({"q"}, {"k"})]
    if not named and {letter for name in pair for letter in letters(name)} == {"q", "k"}:
        unnamed |= dict.fromkeys(pair)
    return [*named], [*unnamed]


def _bias_faults(site: Site) -> Iterator[Fault]:
    """Lists biases of queries or keys beside the modules of the projections."""
    for name in site.children:
        is_bias = {"bias", "b", "bq", "bk"} & {*words(name)} and letters(name) & {"q", "k"}
        if is_bias and name not in (*site.layout.modules, *site.layout.kept_leaves):
            yield Fault(site.path, f"{name!r} looks like a bias of queries or keys.", _IF_BIAS)


def _leaf_faults(site: Site) -> Iterator[Fault]:
    """Lists leaves that are hidden or unknown, and kernels that are missing or not numbers."""
    layout = site.layout
    hidden = [path for path in site.hidden if path.rpartition("/")[2] not in layout.kept_leaves]
    if hidden:
        text = f"{', '.join(hidden)} hidden by a mask (MaskedNode), other leaves are not."
        yield Fault(site.path, text, _IF_HIDDEN)
        return
    for child, leaves in site.leaves.items():
        names = [leaf.name for leaf in leaves]
        if names.count(layout.scaled_leaves[0]) != 1:
            there = ", ".join(sorted(names)) or "no leaves"
            text = f"{child} has {there}, not one {layout.scaled_leaves[0]!r}."
            adapters = set(names) <= {*layout.scaled_leaves[1:], *layout.kept_leaves}
            yield Fault(site.path, text, _IF_ADAPTERS if names and adapters else "")
        for leaf in leaves:
            if leaf.name not in (*layout.scaled_leaves, *layout.kept_leaves):
                text = f"{leaf.path} is in neither scaled_leaves nor kept_leaves."
                yield Fault(site.path, text, _IF_UNKNOWN)
            elif leaf.name in layout.scaled_leaves and not jnp.issubdtype(leaf.dtype, jnp.floating):
                text = f"{leaf.path} is {leaf.dtype.name}, which cannot be scaled."
                yield Fault(site.path, text)


def _shape_faults(site: Site) -> list[Fault]:
    """Lists leaves and max logits whose shapes do not fit each other."""
    texts = list(_rank_faults(site)) or list(_stack_faults(site))
    if not texts:
        heads = site.heads(site.statistics[0])
        texts = list(site.layout.faults(site.kernels, site.stack, heads, site.children))
    return [Fault(site.path, text) for text in texts]


def _rank_faults(site: Site) -> Iterator[str]:
    """Lists leaves and max logits that have too few or too many axes."""
    layout, stat, patterns = site.layout, site.layout.stat, site.layout.patterns
    first = site.kernels[layout.modules[0]]
    low = [name for name in layout.modules if site.stack_of(name) < 0]
    for name in low:
        yield f"{site.kernels[name]} has fewer axes than {str(patterns[name])!r}."
    if low:
        return
    for child, leaf in site.scaled:
        if leaf.name == first.name and site.stack_of(child) != site.stack:
            axes = f"{str(patterns[child])!r} and {str(patterns[layout.modules[0]])!r}"
            yield f"{leaf} and {first} have unequal numbers of stack axes under {axes}."
        elif not layout.fits(child, leaf.shape, site.stack):
            yield f"{leaf} has no rank that fits {first} and stack_axis={layout.stack_axis}."
    for entry in site.statistics:
        if not all(-entry.ndim <= axis < entry.ndim for axis in (*site.stat_axes, site.stack)):
            yield f"{stat} {entry.shape} has too few axes for {site.stack} stack axes and heads."


def _stack_faults(site: Site) -> Iterator[str]:
    """Lists sizes of stacks, columns or heads that differ and should be equal."""
    layout, stat = site.layout, site.layout.stat
    first = site.kernels[layout.modules[0]]
    stack, _ = layout.split(first.shape, site.stack)
    for child, leaf in site.scaled:
        kernel = site.kernels[child]
        sizes = layout.column_shape(child, leaf.shape, site.stack)
        if sizes[0] != stack:
            yield f"{first} stacks {stack} layers, {leaf} stacks {sizes[0]}."
        elif sizes != layout.column_shape(child, kernel.shape, site.stack):
            yield f"{leaf} does not have the columns of {kernel}."
    heads = site.heads(site.statistics[0])
    for entry in site.statistics:
        sizes = tuple(entry.shape[axis] for axis in site.stat_axes)
        if sizes != stack:
            yield f"{first} stacks {stack} layers, its {stat} {entry.shape} stacks {sizes}."
        if site.heads(entry) != heads:
            yield f"calls have {stat} of {heads} and of {site.heads(entry)} heads."

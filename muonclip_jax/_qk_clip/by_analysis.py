"""Attention layers of an analysis instead of attention modules: no names, no head layout."""

import fnmatch
import math
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from muonclip_jax._common.folding import fold_faults
from muonclip_jax._common.paths import leaf_paths
from muonclip_jax._common.types import ArrayTree, Scalar
from muonclip_jax._program.analysis import Analysis
from muonclip_jax._program.describe import AttentionSite
from muonclip_jax._program.head_map import GROUP, OWN, SHARED, HeadMap, overlap
from muonclip_jax._qk_clip.head_factors import factors_of_group, power
from muonclip_jax._qk_clip.sown import without_index

_STAT = "max_logits"


class ClippedSite(NamedTuple):
    """An attention layer with its max logits.

    Attributes:
      name: Its path; numbered where several layers share one.
      site: The layer.
      maps: The head of each element of its parameters.
      places: The place of each parameter, by path.
      max_logits: One entry per call, `[*layers, ..., heads]`.
      stat_axes: The axes of layers of each entry.
      is_bound: Whether an entry is an upper bound: never.
    """

    name: str
    site: AttentionSite
    maps: list[HeadMap]
    places: dict[str, "_Place"]
    max_logits: list[Array]
    stat_axes: tuple[int, ...]
    is_bound: bool = False


def clipped_sites(
    params: ArrayTree,
    max_logits: ArrayTree,
    analysis: Analysis,
    ignore: Sequence[str],
    *,
    strict: bool,
    report_only: bool,
) -> tuple[list[ClippedSite], int]:
    """Joins the attention layers of an analysis to their max logits.

    Args:
      params: The parameters.
      max_logits: The max logits, at the paths of the layers.
      analysis: The analysis.
      ignore: Patterns (`fnmatch`) of paths of layers to leave out.
      strict: Whether a layer without max logits, or max logits without a layer, is an error or
        skipped.
      report_only: Whether nothing is clipped, so that norms of queries and keys are accepted.

    Returns:
      The layers, and how many are skipped.

    Raises:
      ValueError: with everything that does not fit.
    """
    places = _places(params)
    entries = _entries(max_logits)
    groups: dict[str, list[AttentionSite]] = defaultdict(list)
    for site in analysis.attention:
        groups[site.path].append(site)
    _check_ignored(ignore, groups)
    found: list[ClippedSite] = []
    faults: list[str] = []
    unpaired: list[str] = []
    for path, sites in groups.items():
        mine = entries.pop(path, [])
        hidden = all(_is_hidden(source.path, places) for s in sites for source in s.sources)
        if any(fnmatch.fnmatchcase(path, p) for p in ignore) or (sites[0].sources and hidden):
            continue
        if not mine:
            unpaired.append(f"{path or '(root)'}: no max logits.")
            continue
        for name, site, stats in _paired(path, sites, mine, faults):
            wrong = [*_faults(name, site, stats, places, report_only=report_only)]
            faults += wrong
            if not wrong:
                axes = tuple(range(len(site.layers)))
                maps = [] if report_only and site.faults else site.head_maps()
                found.append(ClippedSite(name, site, maps, places, stats, axes))
    faults += _shared(found)
    unpaired += [f"{path or '(root)'}: max logits, but no attention." for path in entries]
    if faults or (strict and unpaired):
        texts = [*faults, *(unpaired if strict else ())]
        pairs = ((path, text) for path, _, text in (one.partition(": ") for one in texts))
        raise ValueError(
            "qk_clip: the max logits, the parameters and the analysis do not fit.\n"
            + "\n".join(fold_faults(pairs))
        )
    if unpaired:
        text = "qk_clip: skipped because of strict=False: " + " ".join(unpaired)
        warnings.warn(text, stacklevel=3)
    return found, len(unpaired)


def _check_ignored(ignore: Sequence[str], paths: Collection[str]) -> None:
    unused = [p for p in ignore if not any(fnmatch.fnmatchcase(path, p) for path in paths)]
    if unused:
        raise ValueError(
            f"qk_clip: ignore={unused} matches no attention of the analysis; there are "
            f"{sorted(paths)}."
        )


def site_factors(
    clipped: ClippedSite, gamma: Float[Array, "*layers heads"], alpha: Scalar, shared_key: str
) -> Iterator[tuple[int, Float[Array, "..."]]]:
    """Yields the position and the factor of each parameter of a layer.

    Args:
      clipped: The layer.
      gamma: Factor on the logits of each head.
      alpha: Share of the query.
      shared_key: Rule for heads that share a key.

    Yields:
      The index among all leaves, and the factor: axes along which it does not differ have size 1.
    """
    gamma = gamma.reshape(-1)
    table = _factors(gamma, _groups(clipped.maps, gamma.size), alpha, shared_key)
    for one in clipped.maps:
        heads, rule = one.heads[..., 0], one.rule
        for d in range(rule.ndim):  # along columns of one head, all factors are equal
            first = heads.take([0], d), rule.take([0], d)
            if (heads == first[0]).all() and (rule == first[1]).all():
                heads, rule = first
        factor = jnp.ones(rule.shape, jnp.float32)
        for kind, factors in table[one.side].items():
            if (rule == kind).any():
                factor = jnp.where(rule == kind, factors[np.maximum(heads, 0)], factor)
        ndim = len(clipped.places[_core(one.path)].shape)
        sizes = dict(zip(one.axes, rule.shape, strict=True))
        leaf = clipped.places[_core(one.path)].leaf
        if leaf is not None:
            yield leaf, factor.reshape([sizes.get(d, 1) for d in range(ndim)])


def _factors(
    gamma: Float[Array, " heads"], groups: np.ndarray | None, alpha: Scalar, shared_key: str
) -> dict[str, dict[int, Float[Array, " heads"]]]:
    """Computes, for each side and rule, the factor of each head."""
    query = {OWN: power(gamma, alpha), SHARED: gamma}
    key = {OWN: power(gamma, 1 - alpha)}  # what heads share beside keys of their own stays
    if groups is not None:
        least = jnp.min(gamma[groups], axis=-1)
        query[GROUP], key[GROUP] = factors_of_group(gamma, least, alpha, shared_key)
    return {"query": query, "key": key}


def _groups(maps: Sequence[HeadMap], heads: int) -> np.ndarray | None:
    """Returns for each head all heads that share its key, `[heads, group]`."""
    found = None
    for one in maps:
        at = one.rule == GROUP
        if one.side == "query" and at.any():
            members = one.heads[at]
            found = np.repeat(np.arange(heads)[:, None], members.shape[1] - 1, axis=1)
            found[members[:, 0]] = members[:, 1:]
    return found


def _paired(
    path: str, sites: Sequence[AttentionSite], entries: Sequence[Array], faults: list[str]
) -> Iterator[tuple[str, AttentionSite, list[Array]]]:
    """Yields layers with their entries; calls of one module are one layer."""
    same = all(site.sources == sites[0].sources for site in sites)
    if same:
        yield path, sites[0], list(entries)
    elif len(entries) == len(sites):
        for i, (site, entry) in enumerate(zip(sites, entries, strict=True)):
            yield f"{path}[{i}]", site, [entry]
    else:
        faults.append(
            f"{path or '(root)'}: {len(entries)} max logits, but the analysis has {len(sites)} "
            "attentions there."
        )


def _faults(
    name: str,
    site: AttentionSite,
    entries: Sequence[Array],
    places: Mapping[str, "_Place"],
    *,
    report_only: bool,
) -> Iterator[str]:
    expected = (*site.layers, "...", math.prod(site.heads))
    for entry in entries:
        shape = entry.shape
        if shape[: len(site.layers)] != site.layers or shape[-1:] != (math.prod(site.heads),):
            yield f"{name}: max logits {shape}, expected {expected}."
    for source in site.sources:
        place = places.get(_core(source.path))
        if place is None or place.leaf is None or place.shape != source.shape:
            got = place.shape if place else "no such parameter"
            yield f"{name}: {source.path} is {got}, expected {source.shape}."
    if report_only:
        return
    if site.qk_norm:
        yield (
            f"{name}: its queries or keys are normalized after their projection, so a clip of "
            "their kernels does not reach the logits. Pass threshold=float('inf') or "
            f"ignore={name!r}."
        )
    for fault in site.faults:
        yield f"{name}: {fault}. Pass a head layout, or ignore={name!r}."


def _shared(sites: Sequence[ClippedSite]) -> Iterator[str]:
    """Lists parameters with elements that belong to several attentions."""
    taken: dict[str, list[tuple[str, HeadMap]]] = defaultdict(list)
    for site in sites:
        for one in site.maps:
            others = taken[one.path]
            clash = next((name for name, other in others if overlap(one, other)), None)
            if clash is not None and clash != site.name:
                yield (
                    f"{site.name}: it shares elements of {one.path} with {clash}, so a clip for "
                    "one changes the other. Pass a head layout, or ignore= one of them."
                )
            others.append((site.name, one))


class _Place(NamedTuple):
    """A parameter: its number among all leaves, None if a mask hides it, and its shape."""

    leaf: int | None
    shape: tuple[int, ...]


def _core(path: str) -> str:
    return path.removeprefix("params/")


def _places(params: ArrayTree) -> dict[str, _Place]:
    """Finds every parameter, with or without a root key `params`."""

    def is_hidden(value: Any) -> bool:
        return value is None or isinstance(value, optax.MaskedNode)

    places, index = {}, 0
    values = jax.tree.leaves(params, is_leaf=is_hidden)
    for path, value in zip(leaf_paths(params, is_leaf=is_hidden), values, strict=True):
        hidden = is_hidden(value)
        shape = () if hidden else tuple(getattr(value, "shape", ()))
        places[_core("/".join(path))] = _Place(None if hidden else index, shape)
        index += not hidden
    return places


def _is_hidden(path: str, places: Mapping[str, _Place]) -> bool:
    """Returns whether a mask hides a parameter, or a module that it is in."""
    parts = _core(path).split("/")
    above = ("/".join(parts[:end]) for end in range(1, len(parts) + 1))
    return any(p in places and places[p].leaf is None for p in above)


def _entries(max_logits: ArrayTree) -> dict[str, list[Array]]:
    """Collects max logits by the path of their layer."""
    entries: dict[str, list[Array]] = defaultdict(list)
    for path, value in jax.tree_util.tree_leaves_with_path(max_logits):
        names = without_index(path)
        names = names[1:] if names[:1] == ("intermediates",) else names
        if names[-1:] == (_STAT,):
            entries["/".join(names[:-1])].append(jnp.asarray(value))
        else:
            raise ValueError(
                f"qk_clip: {'/'.join(names)!r} is no max logits: with an analysis, pass what "
                f"with_max_logits returned, or what was sown as {_STAT!r}."
            )
    return entries

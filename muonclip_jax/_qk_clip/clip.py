"""QK-clip: scales down the query and key weights of heads with large attention logits.

    γ_h = τ / S_h if S_h > τ, otherwise 1
    W_q,h ← γ_hᵃ W_q,h
    W_k,h ← γ_h¹⁻ᵃ W_k,h

after the update of the optimizer, with S_h the max logit of head h in the forward pass (Kimi K2,
arXiv 2507.20534, algorithm 1, lines 8 to 17). If heads share a key, `head_factors` has the
rules; in MLA, the rotary query columns take γ_h, and the shared rotary key stays.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from muonclip_jax._common.folding import fold_faults
from muonclip_jax._common.paths import path_string
from muonclip_jax._common.resharding import placed_like, unsharded
from muonclip_jax._common.settings import check_settings, flag, shown
from muonclip_jax._common.types import ArrayTree, Scalar
from muonclip_jax._head_layouts.head_layout import HeadLayout, layouts_of
from muonclip_jax._head_layouts.multi_head import MultiHeadLayout
from muonclip_jax._program.analysis import Analysis
from muonclip_jax._qk_clip.by_analysis import ClippedSite, clipped_sites, site_factors
from muonclip_jax._qk_clip.errors import check_matching
from muonclip_jax._qk_clip.head_factors import gamma_of, query_and_key_factors
from muonclip_jax._qk_clip.info import QKClipInfo, clip_info
from muonclip_jax._qk_clip.matching import AttentionModule, match
from muonclip_jax._qk_clip.module_faults import fits
from muonclip_jax._qk_clip.one_reduction import Sown, maxima_over_batch

_IF_MERGED = (
    "Merge max logits of the same model and batch size. Start with the max logits of the first "
    "micro-batch, or with -inf in their shapes."
)


def qk_clip(
    params: ArrayTree,
    max_logits: ArrayTree,
    layout: HeadLayout | tuple[HeadLayout, ...] | Analysis = MultiHeadLayout(),
    *,
    threshold: Scalar = 100.0,
    alpha: Scalar = 0.5,
    shared_key: str = "query",
    where: bool | Bool[Array, ""] = True,
    strict: bool = True,
    ignore: str | Sequence[str] = (),
    ever_clipped: Mapping[str, Bool[Array, "*stack heads"]] | None = None,
) -> tuple[ArrayTree, QKClipInfo]:
    """Scales down the queries and keys of each head whose max logit exceeds the threshold.

    Call it once per step, on the parameters after the update, with the max logits of the forward
    pass before it. It keeps no state. A head that is not clipped does not change.

    Args:
      params: The parameters, in any pytree, with or without a root key `params`.
      max_logits: The max logits, as `sow_max_logits` of `linen` and `nnx` store them: at the path
        of each attention module, `max_logits`: an array or a tuple of `[*stack, ..., heads]`. The
        maximum is taken over all axes except stacked layers and heads. The name `max_logits_bound`
        marks an upper bound, which may clip early and is counted.
      layout: Head layout: the names of the query and key modules, and the axes of their kernels. Of
        a tuple, the first layout that fits a module is used for it. An `Analysis` needs no names:
        see `analyze`.
      threshold: τ, in units of a logit. Infinity never clips, and still fills the info.
      alpha: Share of the query in γ, in [0, 1].
      shared_key: Rule for query heads that share a key head, with g the smallest γ of them and
        a = alpha. `"query"`: queries γ, key 1; alpha is unused. `"group"`: queries gᵃ, key g¹⁻ᵃ.
        `"exact"`: queries γ / g¹⁻ᵃ, key g¹⁻ᵃ, so that queries with γ = 1 grow.
      where: False changes nothing and reports γ = 1: for a step that was skipped.
      strict: Whether a module without max logits, or max logits without a module, is an error.
        False skips it with one warning, and counts it.
      ignore: Patterns (`fnmatch`) of `/`-joined paths of attention modules to leave out, such as
        frozen ones: `"encoder/*"`. A pattern that matches nothing is an error. Modules whose
        queries and keys are hidden by `optax.masked` or `optax.partition` are left out without it.
      ever_clipped: Result of `heads_ever_clipped` at the step before, for `stuck_heads`.

    Returns:
      The parameters, in the same pytree, shapes and dtypes; and the report of the clip.

    Raises:
      ValueError: if modules and max logits do not fit, with the paths of all of them; or if a
        setting is out of range.
      TypeError: if a setting has the wrong type; or if `max_logits` is an array, or holds numbers
        in place of arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> import muonclip_jax as mc
      >>> kernel = jnp.ones((4, 2, 8))  # d, heads, head_dim
      >>> params = {"attn": {"query": {"kernel": kernel}, "key": {"kernel": kernel}}}
      >>> stats = {"attn": {"max_logits": jnp.array([400.0, 7.0])}}
      >>> params, info = mc.qk_clip(params, stats, threshold=100.0)
      >>> params["attn"]["query"]["kernel"][0, :, 0].tolist(), info.gamma["attn"].tolist()
      ([0.5, 1.0], [0.25, 1.0])

    References:
      Kimi K2, arXiv 2507.20534, section 2.1 and algorithm 1, lines 8 to 17.
    """
    check_settings("qk_clip", locals(), schedules=False, rules=_RULES)
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    report_only = _is_infinite(threshold)
    clipped: Sequence[ClippedSite | AttentionModule]
    if isinstance(layout, Analysis):
        clipped, skipped = clipped_sites(
            params, max_logits, layout, ignore, strict=strict, report_only=report_only
        )
    else:
        head_layouts = layout if isinstance(layout, tuple) else (layout,)
        is_fitting = functools.partial(fits, report_only=report_only)
        found = match(params, max_logits, head_layouts, ignore, is_fitting)
        skipped = check_matching(found, strict=strict, report_only=report_only)
        clipped = found.matched

    s = maxima_over_batch(
        Sown(one.name, entry, one.stat_axes) for one in clipped for entry in one.max_logits
    )
    # Unsharded, or XLA propagates the sharding of one kernel to another through their gamma.
    gamma = {name: unsharded(gamma_of(s_h, threshold, where)) for name, s_h in s.items()}
    leaves, treedef = jax.tree.flatten(params)
    for one in clipped:
        rules = gamma[one.name], alpha, shared_key
        is_site = isinstance(one, ClippedSite)
        factors = site_factors(one, *rules) if is_site else _module_factors(one, *rules)
        for position, factor in factors:
            leaves[position] = _scaled(jnp.asarray(leaves[position]), factor)
    bounds = sum(one.is_bound for one in clipped)
    counts = {"skipped_modules": skipped, "bound_modules": bounds}
    return treedef.unflatten(leaves), clip_info(s, gamma, ever_clipped, **counts)


def _module_factors(
    module: AttentionModule, gamma: Float[Array, "*stack heads"], alpha: Scalar, shared_key: str
) -> Iterator[tuple[int, Float[Array, "..."]]]:
    """Yields the position and the factor of each leaf of a module that is scaled."""
    head_layout, kernels = module.head_layout, module.kernels
    key_heads = head_layout.key_heads(kernels, module.stack, gamma.shape[-1])
    query, key = query_and_key_factors(gamma, key_heads, alpha, shared_key)
    columns = head_layout.columns(kernels, gamma, query, key)
    for child, leaf in module.scaled:
        yield leaf.position, columns[child].for_leaf(len(leaf.shape), head_layout.stack_axis)


def _scaled(old: Float[Array, "..."], factor: Float[Array, "..."]) -> Float[Array, "..."]:
    """Multiplies in float32 or wider and rounds once; weights with factor 1 keep every bit."""
    wide = jnp.float64 if old.dtype == jnp.float64 else jnp.float32
    factor = placed_like(factor, old)
    new = (old.astype(wide) * factor.astype(wide)).astype(old.dtype)
    # Selected, not multiplied by 1: that may flush denormals. "exact" can grow beyond the dtype.
    return jnp.where((factor == 1) | ~jnp.isfinite(new), old, new)


def merge_max_logits(a: ArrayTree, b: ArrayTree) -> ArrayTree:
    """Merges the max logits of two micro-batches: the maximum of each pair of numbers.

    Gradients are added, max logits are not: a sum of maxima is no maximum. NaN stays NaN.

    Args:
      a: Max logits of one micro-batch, or of several already merged.
      b: Max logits of another: same structure and shapes.

    Returns:
      Max logits of both together, in the same structure, sharded as `a`.

    Raises:
      ValueError: if paths, shapes or containers differ, with each of them.

    Example:
      >>> import jax.numpy as jnp
      >>> import muonclip_jax as mc
      >>> mc.merge_max_logits({"attn": jnp.array([1.0, 2.0])}, {"attn": jnp.array([3.0, 0.0])})
      {'attn': Array([3., 2.], dtype=float32)}
    """
    shapes_a, shapes_b = map(_shapes, (a, b))
    pairs = {path: (shapes_a.get(path), shapes_b.get(path)) for path in shapes_a | shapes_b}
    faults = [
        (path, f"{x or 'absent'} in the first, {y or 'absent'} in the second.")
        for path, (x, y) in sorted(pairs.items())
        if x != y
    ]
    if not faults and jax.tree.structure(a) != jax.tree.structure(b):
        first, second = map(_containers, (a, b))
        faults = [("", f"containers {first} in the first, {second} in the second.")]
    if faults:
        head = "merge_max_logits: the two differ in paths or shapes."
        raise ValueError("\n".join([head, *fold_faults(faults), _IF_MERGED]))
    return jax.tree.map(lambda x, y: jnp.maximum(x, placed_like(y, x)), a, b)


def _containers(tree: ArrayTree) -> str:
    """Returns the types of the containers of a pytree, each once."""
    nodes: dict[str, None] = {}

    def note(node: Any) -> bool:
        nodes[type(node).__name__] = None
        return False

    jax.tree.leaves(tree, is_leaf=note)
    arrays = {type(x).__name__ for x in jax.tree.leaves(tree)}
    return ", ".join(name for name in nodes if name not in arrays)


def _shapes(max_logits: ArrayTree) -> dict[str, str]:
    """Returns the shape of each array of a pytree, as text, by its path."""
    flat = jax.tree_util.tree_leaves_with_path(max_logits)
    return {path_string(path): str(jnp.shape(x)) for path, x in flat}


def _is_infinite(threshold: Any) -> bool:
    """Returns whether the threshold is the number infinity, known before tracing."""
    is_number = isinstance(threshold, (int, float, np.generic))
    return is_number and not isinstance(threshold, bool) and math.isinf(threshold)


def layout_rule(value: Any) -> Exception | None:
    """Requires a head layout, a tuple of head layouts, or an analysis."""
    if isinstance(value, Analysis) or layouts_of(value):
        return None
    return TypeError(f"a head layout or a tuple of head layouts, got {shown(value)}")


def _max_logits_rule(value: Any) -> Exception | None:
    """Requires a pytree, not an array."""
    if not isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return None
    return TypeError(
        "the pytree of what the model sowed, such as the second result of "
        f'`model.apply(..., mutable=["intermediates"])`; got the array {shown(value)}'
    )


def _ignore_rule(value: Any) -> Exception | None:
    """Requires one pattern or several."""
    patterns = (value,) if isinstance(value, str) else value
    if isinstance(patterns, Sequence) and all(isinstance(p, str) for p in patterns):
        return None
    return TypeError(f"a pattern or a sequence of patterns, got {shown(value)}")


def _ever_clipped_rule(value: Any) -> Exception | None:
    """Requires the result of `heads_ever_clipped`, or None."""
    if value is None or isinstance(value, Mapping):
        return None
    return TypeError(f"the result of heads_ever_clipped, or None; got {shown(value)}")


CLIP_RULES = {"layout": layout_rule, "ignore": _ignore_rule}
_RULES = CLIP_RULES | {
    "max_logits": _max_logits_rule,
    "where": functools.partial(flag, array=True),
    "ever_clipped": _ever_clipped_rule,
}

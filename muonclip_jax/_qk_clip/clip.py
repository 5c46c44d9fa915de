"""QK-clip: shrinks the query and key weights of each head whose attention logits grew too large.

    γ_h = min(1, τ / S_h);    W_q,h ← γ_hᵃ W_q,h;    W_k,h ← γ_h¹⁻ᵃ W_k,h

after the update of the optimizer, with S_h the largest logit of head h in the forward pass (Kimi
K2, arXiv 2507.20534, algorithm 1). With a negative S that formula makes NaN, and with an infinite
one it destroys the head; here γ is τ / S where S > τ and finite, and otherwise 1.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from muonclip_jax._common.resharding import placed_like, unsharded
from muonclip_jax._common.settings import check_settings, flag, shown
from muonclip_jax._common.types import ArrayTree, Scalar
from muonclip_jax._qk_clip.clipped_heads import stuck
from muonclip_jax._qk_clip.faults import check_survey
from muonclip_jax._qk_clip.head_layout import Layout
from muonclip_jax._qk_clip.multi_head import MultiHeadLayout
from muonclip_jax._qk_clip.sites import Site, survey


class QKClipInfo(NamedTuple):
    """What a clip saw and did. Arrays, so that it can leave a jitted function.

    On a mesh they are replicated, so that every process can read them.

    Attributes:
      max_logits: Largest logit by module path, `[*stack, heads]`, float32.
      gamma: Factor on the logits by module path, `[*stack, heads]`, float32 in (0, 1].
      max_logit: Largest of all `max_logits`; NaN if one is. -inf if there are none.
      min_gamma: Smallest of all `gamma`. 1 if there are none.
      clipped_heads: Number of heads with a `gamma` below 1, int32.
      clipped_fraction: The same as a part of all heads.
      nonfinite_heads: Number of heads whose largest logit is NaN or +inf, left alone, int32.
      skipped_modules: Number of modules left out under `strict=False`, int32.
      bound_modules: Number of modules whose max logits are an upper bound, not exact, int32.
      stuck_heads: Number of heads that were clipped before and are more than 10 % above the
        threshold all the same, int32; None unless `qk_clip` is called with `ever_clipped`. A number
        that stays above 0 shows that the clip does not reach the logits.
    """

    max_logits: dict[str, Float[Array, "..."]]
    gamma: dict[str, Float[Array, "..."]]
    max_logit: Float[Array, ""]
    min_gamma: Float[Array, ""]
    clipped_heads: Int[Array, ""]
    clipped_fraction: Float[Array, ""]
    nonfinite_heads: Int[Array, ""]
    skipped_modules: Int[Array, ""]
    bound_modules: Int[Array, ""]
    stuck_heads: Int[Array, ""] | None = None


def qk_clip(
    params: ArrayTree,
    max_logits: ArrayTree,
    layout: Layout | tuple[Layout, ...] = MultiHeadLayout(),
    *,
    threshold: Scalar = 100.0,
    alpha: Scalar = 0.5,
    shared_key: str = "query",
    where: bool | Bool[Array, ""] = True,
    strict: bool = True,
    ignore: str | Sequence[str] = (),
    ever_clipped: Mapping[str, Bool[Array, "*stack heads"]] | None = None,
) -> tuple[ArrayTree, QKClipInfo]:
    """Scales down the queries and keys of heads whose largest logit is above the threshold.

    Call it once per step, on the parameters after the update, with the statistics of the forward
    pass before it. It keeps no state. A head that is not clipped keeps every bit of its weights.

    Args:
      params: The parameters, in any containers, with or without a root key `params`.
      max_logits: The statistics, as `sow_max_logits` of `linen` and `nnx` leave them: at the path
        of each attention module, `max_logits`: an array or a tuple of `[*stack, ..., heads]`.
        All axes but stacks of layers and heads are reduced with the maximum. What is called
        `max_logits_bound` is an upper bound, which may clip early and is counted.
      layout: Where queries and keys are. Of several, each module is taken by the first that fits.
      threshold: τ, in units of a logit. Infinity never clips, and still fills the info.
      alpha: Share of the query in γ, in [0, 1].
      shared_key: What happens where query heads share a key head, with g the smallest γ of them
        and a = alpha. `"query"`: queries γ, the key stays, alpha is unused. `"group"`: gᵃ and g¹⁻ᵃ.
        `"min"`: γᵃ and g¹⁻ᵃ. `"exact"`: γ / g¹⁻ᵃ and g¹⁻ᵃ, so that queries of calm heads grow.
      where: False changes nothing and reports γ = 1: for a step that was skipped.
      strict: Whether a module without max logits, or the reverse, is an error. False skips it with
        one warning, and counts it.
      ignore: Patterns (`fnmatch`) of `/`-joined paths of attention modules to leave out, such as
        frozen ones: `"encoder/*"`. One that matches nothing is an error. Modules whose queries and
        keys are hidden by `optax.masked` or `optax.partition` are left out without it.
      ever_clipped: What `heads_ever_clipped` returned at the step before, for `stuck_heads`.

    Returns:
      The parameters, in the same containers, shapes and dtypes; and what was seen and done.

    Raises:
      ValueError: if modules and statistics do not fit, naming all of them; or a setting is wrong.
      TypeError: if a setting is of a wrong kind.

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
    layouts = layout if isinstance(layout, tuple) else (layout,)
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    found = survey(params, max_logits, layouts, ignore)
    sites, skipped = check_survey(found, strict=strict, watching=_is_infinite(threshold))
    largest = _largest(sites)
    gamma = {path: unsharded(_gamma(s, threshold, where)) for path, s in largest.items()}
    leaves, treedef = jax.tree.flatten(params)
    for site in sites:
        factors = site.layout.factors(gamma[site.name], site.kernels, alpha, shared_key)
        for child, leaf in site.scaled:
            factor = site.layout.leaf_factor(factors[child], leaf)
            leaves[leaf.position] = _scaled(jnp.asarray(leaves[leaf.position]), factor)
    bounds = sum(site.is_bound for site in sites)
    in_vain = None if ever_clipped is None else stuck(gamma, ever_clipped)
    return treedef.unflatten(leaves), _info(largest, gamma, in_vain, skipped, bounds)


def merge_max_logits(a: ArrayTree, b: ArrayTree) -> ArrayTree:
    """Joins the statistics of two micro-batches: the maximum of each pair of numbers.

    Never add them up, as is right for gradients: a sum of maxima is no maximum. NaN stays NaN.

    Args:
      a: Statistics of one micro-batch, or of several already joined.
      b: Statistics of another: same structure and shapes.

    Returns:
      Statistics of both together, in that structure, sharded as `a`.

    Example:
      >>> import jax.numpy as jnp
      >>> import muonclip_jax as mc
      >>> mc.merge_max_logits({"attn": jnp.array([1.0, 2.0])}, {"attn": jnp.array([3.0, 0.0])})
      {'attn': Array([3., 2.], dtype=float32)}
    """
    return jax.tree.map(lambda x, y: jnp.maximum(x, placed_like(y, x)), a, b)


def _largest(sites: Sequence[Site]) -> dict[str, Float[Array, "*stack heads"]]:
    """Reduces max logits to `[*stack, heads]`, all modules of one leading shape at a time.

    The results are unsharded: they are one number per head, and every kernel may need any of them.
    """
    groups = defaultdict(list)
    for site in sites:
        for entry in site.statistics:
            x = jnp.moveaxis(entry, site.stat_axes, range(-site.stack, 0)).astype(jnp.float32)
            leading = x.shape[: -site.stack - 1]
            mesh, spec = (typed := jax.typeof(x).sharding).mesh, typed.spec
            alone = any(spec[len(leading) + 1 :])  # no reshape joins a sharded stack
            placement = mesh, spec[: len(leading) + 1]
            groups[leading, placement, site.name if alone else None].append((site.name, x))
    largest: dict[str, jax.Array] = {}
    for (leading, _, alone), members in groups.items():
        names, arrays = zip(*members, strict=True)
        for name, x in zip(names, _maxima(arrays, len(leading), join=alone is None), strict=True):
            largest[name] = jnp.maximum(largest.get(name, x), x)
    return {site.name: unsharded(largest[site.name]) for site in sites}


def _maxima(
    arrays: Sequence[Float[Array, "..."]], leading: int, *, join: bool
) -> list[Float[Array, "*stack heads"]]:
    """Reduces `[*leading, heads, *stack]`, by one reduction if the arrays can be joined."""
    axes = tuple(range(leading))
    if not join:
        maxima = [unsharded(jnp.max(x, axis=axes, initial=-jnp.inf)) for x in arrays]
        return [jnp.moveaxis(x, 0, -1) for x in maxima]
    # One reduction, and so one all-reduce where the batch is sharded, for the whole model.
    parts = math.gcd(*(x.shape[leading] for x in arrays)) or 1
    joined = jnp.concatenate([_split(x, leading, parts) for x in arrays], axis=-1)
    maxima = unsharded(jnp.max(joined, axis=axes, initial=-jnp.inf))
    ends = np.cumsum([math.prod(x.shape[leading:]) // parts for x in arrays])
    pieces = jnp.split(maxima, ends[:-1], axis=-1)
    shapes = [x.shape[leading:] for x in arrays]
    return [
        jnp.moveaxis(x.reshape(parts, heads // parts, *stack).reshape(heads, *stack), 0, -1)
        for x, (heads, *stack) in zip(pieces, shapes, strict=True)
    ]


def _split(x: Float[Array, "..."], axis: int, parts: int) -> Float[Array, "..."]:
    """Splits heads, at `axis`, into `[parts, rest]`, with all that is behind them in the rest.

    Sharded heads are sharded along the parts, a number that all modules have: joined along the
    rest, nothing moves between devices.
    """
    before, (heads, *behind) = x.shape[:axis], x.shape[axis:]
    x = x.reshape(*before, parts, heads // parts, *behind)
    return x.reshape(*before, parts, heads // parts * math.prod(behind))


def _gamma(
    s: Float[Array, "*stack heads"], threshold: Scalar, where: bool | Bool[Array, ""]
) -> Float[Array, "*stack heads"]:
    """Gives τ / S where S is over τ and finite, otherwise exactly 1."""
    tau = jnp.asarray(threshold, jnp.float32)
    over = (s > tau) & ~_nonfinite(s) & where
    # Both sides are 1 where unused, so that nothing there divides by zero or infinity.
    ratio = jnp.where(over, tau, 1) / jnp.where(over, s, 1)
    # The smallest normal number: a gamma that underflows to 0 would end the head for ever.
    return jnp.where(over, jnp.maximum(ratio, jnp.finfo(jnp.float32).tiny), 1)


def _is_infinite(threshold: Any) -> bool:
    """Returns whether the threshold is the number infinity, known before tracing."""
    is_number = isinstance(threshold, (int, float, np.generic))
    return is_number and not isinstance(threshold, bool) and math.isinf(threshold)


def _nonfinite(s: Float[Array, "*stack heads"]) -> Bool[Array, "*stack heads"]:
    """Marks NaN and +inf, which say nothing about weights; -inf is a head that is all masked."""
    return jnp.isnan(s) | (s == jnp.inf)


def _scaled(old: Float[Array, "..."], factor: Float[Array, "..."]) -> Float[Array, "..."]:
    """Multiplies in float32 or wider, rounds once, and leaves alone what has factor 1."""
    wide = jnp.float64 if old.dtype == jnp.float64 else jnp.float32
    factor = placed_like(factor, old)
    new = (old.astype(wide) * factor.astype(wide)).astype(old.dtype)
    # Selected, not multiplied by 1: that may flush denormals. "exact" can grow beyond the dtype.
    return jnp.where((factor == 1) | ~jnp.isfinite(new), old, new)


def _info(
    largest: dict[str, Float[Array, "..."]],
    gamma: dict[str, Float[Array, "..."]],
    in_vain: dict[str, Bool[Array, "..."]] | None,
    skipped: int,
    bounds: int,
) -> QKClipInfo:
    """Sums up, after the one reduction over the batch."""
    s, g = _joined(largest.values()), _joined(gamma.values())
    clipped = jnp.sum(g < 1, dtype=jnp.int32)
    return QKClipInfo(
        max_logits=largest,
        gamma=gamma,
        max_logit=jnp.max(s, initial=-jnp.inf),
        min_gamma=jnp.min(g, initial=1),
        clipped_heads=clipped,
        clipped_fraction=clipped.astype(jnp.float32) / max(g.size, 1),
        nonfinite_heads=jnp.sum(_nonfinite(s), dtype=jnp.int32),
        skipped_modules=jnp.int32(skipped),
        bound_modules=jnp.int32(bounds),
        stuck_heads=None
        if in_vain is None
        else jnp.sum(_joined(in_vain.values()), dtype=jnp.int32),
    )


def _joined(arrays: Iterable[Shaped[Array, "..."]]) -> Float[Array, " n"]:
    """Joins all numbers of unsharded arrays."""
    return jnp.concatenate([jnp.zeros(0, jnp.float32), *(x.reshape(-1) for x in arrays)])


def layout_rule(value: Any) -> Exception | None:
    """Requires a head layout or a tuple of them."""
    layouts = value if isinstance(value, tuple) and value else (value,)
    if all(isinstance(layout, Layout) for layout in layouts):
        return None
    return TypeError(f"a layout or a tuple of layouts, got {shown(value)}")


def _ignore_rule(value: Any) -> Exception | None:
    """Requires one pattern or several."""
    patterns = (value,) if isinstance(value, str) else value
    if isinstance(patterns, Sequence) and all(isinstance(p, str) for p in patterns):
        return None
    return TypeError(f"a pattern or a sequence of patterns, got {shown(value)}")


def _ever_clipped_rule(value: Any) -> Exception | None:
    """Requires what `heads_ever_clipped` returns, or None."""
    if value is None or isinstance(value, Mapping):
        return None
    return TypeError(f"what heads_ever_clipped returned, or None; got {shown(value)}")


CLIP_RULES = {"layout": layout_rule, "ignore": _ignore_rule}
_RULES = CLIP_RULES | {
    "where": functools.partial(flag, array=True),
    "ever_clipped": _ever_clipped_rule,
}

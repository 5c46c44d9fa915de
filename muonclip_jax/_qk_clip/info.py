"""The report of a clip: its numbers, scalars for a logger, and heads over several steps."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from muonclip_jax._common.folding import fold_faults
from muonclip_jax._qk_clip.head_factors import is_nonfinite
from muonclip_jax._qk_clip.report import describe, is_concrete

_PER_HEAD = ("max_logits", "gamma")
# A clip puts a head at the threshold, and one update moves a logit by a few percent.
_STUCK = 1.1


class QKClipInfo(NamedTuple):
    """The report of one clip: arrays, which a jitted function can return.

    On a mesh they are replicated, so that every process can read them. `print(info)` prints the
    largest logit, the number of clipped heads, and a table of modules.

    Attributes:
      max_logits: Largest logit by module path, `[*stack, heads]`, float32.
      gamma: Factor on the logits by module path, `[*stack, heads]`, float32 in (0, 1].
      max_logit: Largest of all `max_logits`; NaN if one is. -inf if there are none.
      min_gamma: Smallest of all `gamma`. 1 if there are none.
      clipped_heads: Number of heads with a `gamma` below 1, int32.
      clipped_fraction: `clipped_heads` divided by the number of heads.
      nonfinite_heads: Number of heads whose largest logit is NaN or +inf, int32. They are not
        scaled.
      skipped_modules: Number of modules skipped under `strict=False`, int32.
      bound_modules: Number of modules whose max logits are an upper bound, not exact, int32.
      stuck_heads: Number of heads that were clipped at an earlier step and are more than 10 % above
        the threshold now, int32; None unless `qk_clip` is called with `ever_clipped`. A number
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

    def __str__(self) -> str:
        return describe(self) if is_concrete(self) else repr(self)


def clip_info(
    max_logits: Mapping[str, Float[Array, "..."]],
    gamma: Mapping[str, Float[Array, "..."]],
    ever_clipped: Mapping[str, Bool[Array, "..."]] | None,
    *,
    skipped_modules: int,
    bound_modules: int,
) -> QKClipInfo:
    """Counts heads, after the reduction over the batch, so that no scalar needs another one.

    Args:
      max_logits: Largest logit by module path, `[*stack, heads]`.
      gamma: Factor on the logits, equally.
      ever_clipped: Result of `heads_ever_clipped` at the step before, or None.
      skipped_modules: Number of modules that were skipped.
      bound_modules: Number of modules with an upper bound.

    Returns:
      The report.

    Raises:
      ValueError: if the heads of `ever_clipped` are not the heads of `gamma`.
    """
    s, g = _all_heads(max_logits), _all_heads(gamma)
    clipped = jnp.sum(g < 1, dtype=jnp.int32)
    stuck = None
    if ever_clipped is not None:
        _check_same_heads("qk_clip: ever_clipped", gamma, ever_clipped)
        again = {path: (x < 1 / _STUCK) & ever_clipped[path] for path, x in gamma.items()}
        stuck = jnp.sum(_all_heads(again), dtype=jnp.int32)
    return QKClipInfo(
        max_logits=dict(max_logits),
        gamma=dict(gamma),
        max_logit=jnp.max(s, initial=-jnp.inf),
        min_gamma=jnp.min(g, initial=1),
        clipped_heads=clipped,
        clipped_fraction=clipped.astype(jnp.float32) / max(g.size, 1),
        nonfinite_heads=jnp.sum(is_nonfinite(s), dtype=jnp.int32),
        skipped_modules=jnp.int32(skipped_modules),
        bound_modules=jnp.int32(bound_modules),
        stuck_heads=stuck,
    )


def qk_clip_metrics(
    info: QKClipInfo, ever_clipped: Mapping[str, Bool[Array, "*stack heads"]] | None = None
) -> dict[str, Shaped[Array, "*steps"]]:
    """Names the scalars of a clip for a logger.

    Args:
      info: Report of `qk_clip`.
      ever_clipped: Result of `heads_ever_clipped`, or None.

    Returns:
      All scalars of `info`, 0-d arrays, under `qk_clip/<name>`; with an axis of steps if a scan
      stacked the infos. `qk_clip/stuck_heads` only if `qk_clip` was called with `ever_clipped`.
      With `ever_clipped`, `qk_clip/ever_clipped_fraction` too: the fraction of heads ever clipped.
      Numbers per head stay in `info`.

    Example:
      >>> import jax.numpy as jnp
      >>> import muonclip_jax as mc
      >>> kernel = jnp.ones((4, 2, 8))
      >>> params = {"attn": {"query": {"kernel": kernel}, "key": {"kernel": kernel}}}
      >>> _, info = mc.qk_clip(params, {"attn": {"max_logits": jnp.array([400.0, 7.0])}})
      >>> float(mc.qk_clip_metrics(info)["qk_clip/max_logit"])
      400.0
    """
    scalars = {name: value for name, value in info._asdict().items() if name not in _PER_HEAD}
    if info.stuck_heads is None:
        del scalars["stuck_heads"]
    if ever_clipped is not None:
        count = sum((jnp.sum(x, dtype=jnp.float32) for x in ever_clipped.values()), jnp.float32(0))
        heads = sum(x.size for x in ever_clipped.values())
        scalars["ever_clipped_fraction"] = count / max(heads, 1)
    return {f"qk_clip/{name}": value for name, value in scalars.items()}


def heads_ever_clipped(
    info: QKClipInfo, before: Mapping[str, Bool[Array, "*stack heads"]] | None = None
) -> dict[str, Bool[Array, "*stack heads"]]:
    """Marks the heads that this clip or an earlier one has scaled.

    Keep the result beside the parameters, inside or outside of the jitted step, and pass it at the
    next step, here and as `ever_clipped` of `qk_clip`. It is a plain pytree of booleans, for a
    checkpoint too. Outside of `jit` it is asynchronous.

    A carry of `jax.lax.scan` cannot start with None. Start it with all False: call this function on
    the shapes of an info, from `jax.eval_shape`.

    Args:
      info: Report of `qk_clip`. If a scan over steps stacked it, its scalars have an axis too, and
        all its steps count. Inside `jax.vmap`, each member counts for itself; outside, an axis of
        members is an axis of steps. Shapes in place of arrays give False for every head.
      before: Result of this function at the step before; None at the first.

    Returns:
      True for each head that was ever clipped, by module path: `[*stack, heads]`.

    Raises:
      ValueError: if `before` has other modules or shapes than `info`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import muonclip_jax as mc
      >>> kernel = jnp.ones((4, 2, 8))
      >>> params = {"attn": {"query": {"kernel": kernel}, "key": {"kernel": kernel}}}
      >>> steps = {"attn": {"max_logits": jnp.array([[400.0, 7.0], [50.0, 7.0]])}}  # two steps
      >>> def step(carry, stats):
      ...     params, ever = carry
      ...     params, info = mc.qk_clip(params, stats, ever_clipped=ever)
      ...     return (params, mc.heads_ever_clipped(info, ever)), info.stuck_heads
      >>> _, shapes = jax.eval_shape(mc.qk_clip, params, jax.tree.map(lambda x: x[0], steps))
      >>> start = params, mc.heads_ever_clipped(shapes)
      >>> (params, ever), stuck = jax.lax.scan(step, start, steps)
      >>> ever["attn"].tolist()
      [True, False]

    References:
      Kimi K2, arXiv 2507.20534, appendix D: 12.7 percent of the heads were ever clipped.
    """
    if isinstance(info.max_logit, jax.ShapeDtypeStruct):
        return {path: jnp.zeros(gamma.shape, bool) for path, gamma in info.gamma.items()}
    steps = tuple(range(jnp.ndim(info.max_logit)))
    clipped = {path: jnp.any(gamma < 1, axis=steps) for path, gamma in info.gamma.items()}
    if before is None:
        return clipped
    _check_same_heads("heads_ever_clipped", clipped, before)
    return {path: x | before[path] for path, x in clipped.items()}


def _all_heads(arrays: Mapping[str, Shaped[Array, "..."]]) -> Shaped[Array, " n"]:
    """Joins the numbers of all heads of all modules, which are unsharded."""
    return jnp.concatenate([jnp.zeros(0, jnp.float32), *(x.reshape(-1) for x in arrays.values())])


def _check_same_heads(caller: str, now: Mapping[str, Array], before: Mapping[str, Array]) -> None:
    """Raises ValueError with each path whose shape is not the same in both mappings."""
    new, old = ({path: jnp.shape(x) for path, x in tree.items()} for tree in (now, before))
    differing = sorted(path for path in new | old if new.get(path) != old.get(path))
    if differing:
        faults = (
            (path, f"got {old.get(path, 'absent')}, expected {new.get(path, 'absent')}.")
            for path in differing
        )
        head = (
            f"{caller}: the heads are not the heads of this model. Start again with None; in a "
            "scan, with heads_ever_clipped of the shapes of an info."
        )
        raise ValueError("\n".join([head, *fold_faults(faults)]))

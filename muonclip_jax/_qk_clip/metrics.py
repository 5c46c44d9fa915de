"""What a clip did, for people: flat scalars for any logger, and heads that were ever clipped."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from muonclip_jax._qk_clip.clip import QKClipInfo
from muonclip_jax._qk_clip.clipped_heads import check_same_heads

_PER_HEAD = ("max_logits", "gamma")


def qk_clip_metrics(
    info: QKClipInfo, ever_clipped: Mapping[str, Bool[Array, "*stack heads"]] | None = None
) -> dict[str, Shaped[Array, "*steps"]]:
    """Names the scalars of a clip for a logger.

    Args:
      info: What `qk_clip` returned beside the parameters.
      ever_clipped: What `heads_ever_clipped` returned, if it is kept.

    Returns:
      All scalars of `info`, 0-d arrays, under `qk_clip/<name>`; with an axis of steps where a
      scan stacked it. `qk_clip/stuck_heads` only if `qk_clip` was called with `ever_clipped`.
      Numbers per head stay in `info`. With
      `ever_clipped`, `qk_clip/ever_clipped_fraction` too: the fraction of heads ever clipped.

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
    """Marks the heads that this clip or one before it has scaled.

    Keep the result beside the parameters, inside or outside of the jitted step, and pass it at the
    next step, here and as `ever_clipped` of `qk_clip`. It is a plain pytree of booleans, for a
    checkpoint too. On the host it does not wait for the device.

    Args:
      info: What `qk_clip` returned beside the parameters. Where a scan over steps stacked it, its
        scalars have an axis too, and all its steps count. Inside `jax.vmap`, each member counts
        for itself; outside, an axis of members is an axis of steps.
      before: What this function returned at the step before; None at the first.

    Returns:
      True for each head that was ever clipped, by module path: `[*stack, heads]`.

    Raises:
      ValueError: if `before` is of other modules or shapes than `info`.

    Example:
      >>> import jax.numpy as jnp
      >>> import muonclip_jax as mc
      >>> kernel = jnp.ones((4, 2, 8))
      >>> params = {"attn": {"query": {"kernel": kernel}, "key": {"kernel": kernel}}}
      >>> ever = None
      >>> for maxima in ([400.0, 7.0], [50.0, 7.0]):
      ...     _, info = mc.qk_clip(params, {"attn": {"max_logits": jnp.array(maxima)}})
      ...     ever = mc.heads_ever_clipped(info, ever)
      >>> ever["attn"].tolist()
      [True, False]

    References:
      Kimi K2, arXiv 2507.20534, appendix D, counts the heads so: 12.7 percent.
    """
    steps = tuple(range(jnp.ndim(info.max_logit)))
    clipped = {path: jnp.any(gamma < 1, axis=steps) for path, gamma in info.gamma.items()}
    if before is None:
        return clipped
    check_same_heads("heads_ever_clipped", clipped, before)
    return {path: x | before[path] for path, x in clipped.items()}

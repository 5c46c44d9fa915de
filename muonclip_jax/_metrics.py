"""Flat dictionaries of scalars, for any logger."""

from jaxtyping import Array, Shaped

from muonclip_jax._qk_clip import QKClipInfo

_PER_HEAD = ("max_logits", "gamma")


def qk_clip_metrics(info: QKClipInfo) -> dict[str, Shaped[Array, ""]]:
    """Names the scalars of a clip for a logger.

    Args:
      info: What `qk_clip` returned beside the parameters.

    Returns:
      All scalars of `info`, 0-d arrays, under `qk_clip/<name>`. Numbers per head stay in `info`.

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
    return {f"qk_clip/{name}": value for name, value in scalars.items()}

"""The settings of a run: arguments of `install`, and MaxText's config for the clip."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import muonclip_jax as mc

WITHOUT = "or train without the clip: install(qk_clip=False) or --no-qk-clip"


class Settings(NamedTuple):
    """The arguments of `install`."""

    qk_clip: bool
    threshold: float | int | None
    alpha: float | int
    shared_key: str
    include_routers: bool
    muon: Mapping[str, Any]


class Replaced:
    """A config of MaxText, which is read-only, with some settings replaced."""

    def __init__(self, config: Any, **settings: Any):
        vars(self).update(settings, _config=config)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_config"], name)


def check(config: Any, alpha: float | int = 0.5) -> None:
    """Raises for a config of MaxText under which the clip does not bound the logits.

    Args:
      config: The config, any object with its attributes.
      alpha: See `mc.qk_clip`.

    Raises:
      ValueError: with the setting and what to do.
    """
    if config.attn_logits_soft_cap:
        raise ValueError(
            f"attn_logits_soft_cap={config.attn_logits_soft_cap}: MaxText records logits after the "
            f"soft cap, where none exceeds it. Set attn_logits_soft_cap=0.0, {WITHOUT}."
        )
    if config.use_qk_norm and config.attention_type != "mla":
        raise ValueError(
            "use_qk_norm=true: queries and keys are normalized after their projections, so that "
            f"scaling the projections does not lower a logit. Set use_qk_norm=false, {WITHOUT}."
        )
    if config.trainable_parameters_mask or config.lora.enable_lora:
        raise ValueError(
            "trainable_parameters_mask or lora.enable_lora: the clip would change frozen "
            f"parameters. Train all parameters, {WITHOUT}."
        )
    if config.fused_qkv:
        raise ValueError(
            "fused_qkv=true: each shard of the kernel has queries, keys and values of its own, so "
            f"that the order of the heads depends on the mesh. Set fused_qkv=false, {WITHOUT}."
        )
    if config.share_kv_projections and alpha != 1:
        raise ValueError(
            "share_kv_projections=true: the kernel of the keys makes the values too, so that it "
            f"cannot be scaled. Scale the queries alone with install(alpha=1), {WITHOUT}."
        )


def head_layout(config: Any) -> mc.MLALayout | mc.MultiHeadLayout:
    """Returns the head layout of the attention of a config of MaxText.

    Args:
      config: The config, any object with its attributes.

    Returns:
      The layout of its decoder layers, scanned or not.
    """
    if config.attention_type == "mla":
        return mc.MLALayout(
            nope_dim=config.qk_nope_head_dim,
            rope_dim=config.qk_rope_head_dim,
            value_dim=config.v_head_dim,
            query="wq_b" if config.q_lora_rank else "query",
            key_value="wkv_b",
            stack_axis=config.param_scan_axis,
        )
    return mc.MultiHeadLayout(stack_axis=config.param_scan_axis)

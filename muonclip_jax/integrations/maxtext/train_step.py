"""The clip in MaxText's train step."""

import functools
from collections.abc import Callable
from typing import Any

import jax

import muonclip_jax as mc
from muonclip_jax.integrations.maxtext.attributes import replaced
from muonclip_jax.integrations.maxtext.max_logits import accumulate_maxima, at_attention
from muonclip_jax.integrations.maxtext.settings import (
    WITHOUT,
    Replaced,
    Settings,
    check,
    head_layout,
)


def clipping(train: Any, settings: Settings) -> Callable[..., Any]:
    """Wraps `train_step`, which calls `apply_qk_clip_nnx` if `use_qk_clip` is true.

    Args:
      train: The module of MaxText.
      settings: The arguments of `install`.

    Returns:
      The function, which clips and adds `mc.qk_clip_metrics` to the metrics.
    """
    step, accumulate = train.train_step, train.gradient_accumulation_loss_and_grad

    @functools.wraps(step)
    def train_step(model: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        infos: list[mc.QKClipInfo] = []

        def clip(state: Any, intermediate_outputs: Any, config: Any) -> Any:
            infos.append(_clip(state, intermediate_outputs, config, settings))
            return state

        check(config, settings.alpha)
        # Reading the config, MaxText raises for use_qk_clip=true with attention other than MLA.
        config = Replaced(config, use_qk_clip=True)
        maxima = functools.partial(accumulate_maxima, accumulate)
        with (
            replaced(train.qk_clip_utils, "apply_qk_clip_nnx", clip),
            replaced(train, "gradient_accumulation_loss_and_grad", maxima),
        ):
            state, metrics = step(model, config, *args, **kwargs)
        if len(infos) != 1:
            raise RuntimeError(f"MaxText's train_step clipped {len(infos)} times, not once.")
        metrics["scalar"] |= mc.qk_clip_metrics(infos[0])
        return state, metrics

    return train_step


def _clip(state: Any, intermediates: Any, config: Any, settings: Settings) -> mc.QKClipInfo:
    """Clips the model of a train state in place."""
    from flax import nnx

    threshold = config.qk_clip_threshold if settings.threshold is None else settings.threshold
    try:
        params, info = mc.qk_clip(
            nnx.state(state.model, nnx.Param),
            at_attention(intermediates),
            head_layout(config),
            threshold=threshold,
            alpha=settings.alpha,
            shared_key=settings.shared_key,
            where=_is_updated(state) if config.skip_step_on_spikes else True,
        )
    except ValueError as error:
        error.add_note(f"In MaxText: choose another model, {WITHOUT}.")
        raise
    nnx.update(state.model, params)
    return info


def _is_updated(state: Any) -> Any:
    """Returns whether `skip_step_on_spikes` let the optimizer update, a boolean array."""
    from flax import nnx

    found = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(state.optimizer)))
    (is_skipped,) = (leaf for path, leaf in found if "is_skipped" in jax.tree_util.keystr(path))
    return ~is_skipped

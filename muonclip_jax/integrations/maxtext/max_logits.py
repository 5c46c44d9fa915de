"""The max logits of MaxText's attention: recorded, merged over micro-batches, at their module."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

_MICRO_BATCH = "muonclip_jax_micro_batch"


def recording(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `AttentionOp.__call__`, so that in training it records its max logits.

    Args:
      call: The method.

    Returns:
      The method, which raises ValueError if its kernel cannot record them.
    """
    signature = inspect.signature(call)

    @functools.wraps(call)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        if bound.arguments["model_mode"] != "train":
            return call(self, *args, **kwargs)
        bound.arguments["record_max_logits"] = True
        try:
            result = call(*bound.args, **bound.kwargs)
        except NotImplementedError as error:
            raise _no_max_logits(self, f" ({error})") from error
        if not hasattr(self, "max_logits"):
            raise _no_max_logits(self, "")
        return result

    return wrapped


def _no_max_logits(attention_op: Any, why: str) -> ValueError:
    return ValueError(
        f"attention={attention_op.attention_kernel!r} records no max logits here{why}. Set "
        "attention=dot_product, or on a TPU attention=flash use_tokamax_splash=true "
        "use_jax_splash=false context_parallel_strategy=all_gather, or train without the clip: "
        "install(qk_clip=False) or --no-qk-clip."
    )


def at_attention(tree: Any) -> Any:
    """Moves what each `attention_op` recorded to the module whose kernels it belongs to.

    Args:
      tree: Intermediates of MaxText, nested dictionaries.

    Returns:
      New dictionaries, without `attention_op`.
    """
    if not isinstance(tree, Mapping):
        return tree
    tree = {name: at_attention(item) for name, item in tree.items()}
    recorded = tree.pop("attention_op", {})
    return tree | recorded


def accumulate_maxima(
    accumulate: Callable[..., Any], _loss_fn: Any, config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Calls `gradient_accumulation_loss_and_grad`, with maxima in place of sums of max logits.

    MaxText adds up what the loss returns for each micro-batch. Here micro-batch i of n returns its
    max logits S_i as row i of n rows, the others zero, so that the sum holds all of them exactly:

        max_i S_i = max over rows of Σ_i e_i S_iᵀ

    Args:
      accumulate: The function of MaxText.
      _loss_fn: Its loss of a model, a config, a batch and other arguments: the loss and a
        dictionary.
      config: The config.
      *args: The other arguments of `accumulate`.
      **kwargs: The other arguments of `accumulate`.

    Returns:
      The result of `accumulate`: loss, dictionary and gradients.
    """
    n = config.gradient_accumulation_steps

    @functools.wraps(_loss_fn)  # MaxText reads its signature
    def loss_fn(model: Any, config: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        data = dict(data)
        row = jnp.arange(n) == data.pop(_MICRO_BATCH)[0]
        loss, aux = _loss_fn(model, config, data, *args, **kwargs)
        return loss, map_max_logits(
            lambda s: jnp.where(jnp.expand_dims(row, range(1, 1 + s.ndim)), s, 0), aux
        )

    bound = inspect.signature(accumulate).bind(loss_fn, config, *args, **kwargs)
    data = bound.arguments["data"]
    batch = jax.tree.leaves(data)[0].shape[0]
    # MaxText reshapes the batch to (batch / n, n): micro-batch i has every n-th example from i on.
    bound.arguments["data"] = {**data, _MICRO_BATCH: jnp.arange(batch) % n}
    loss, aux, grads = accumulate(*bound.args, **bound.kwargs)
    return loss, map_max_logits(lambda s: jnp.max(s, axis=0), aux), grads


def map_max_logits(function: Callable[[Any], Any], tree: Any) -> Any:
    """Applies a function to each array under the name `max_logits`.

    Args:
      function: Function of an array.
      tree: Nested dictionaries.

    Returns:
      New dictionaries; everything else in them is unchanged.
    """
    if not isinstance(tree, Mapping):
        return tree
    return {
        name: jax.tree.map(function, item)
        if name == "max_logits"
        else map_max_logits(function, item)
        for name, item in tree.items()
    }

"""Attention with the max logit of each head.

out   = softmax(scale * q . k + bias) v         as `jax.nn.dot_product_attention`
max_h = max over i, j that may attend of  scale * q_i . k_j + bias_ij        (Kimi K2, section 2.1)
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from muonclip_jax._attention.max_logit import (
    check_arguments,
    max_attention_logit,
    scale_with_four_axes,
)
from muonclip_jax._attention.shared_keys import with_query_heads
from muonclip_jax._attention.splash import MASKED, splash_attention
from muonclip_jax._attention.visible import Window
from muonclip_jax._common.settings import check_choice
from muonclip_jax._common.types import Scalar

Lengths: TypeAlias = Integer[Array, " batch"]
# A function passed as `max_logit`, and the result of each method: output, residual (or None), max
# logits.
Plugin: TypeAlias = Callable[..., tuple[Array, Array]]
Result: TypeAlias = tuple[Array, Array | None, Array]

# Added to a log-sum-exp, relative to it. The residual of jax.nn has the dtype of the keys; in
# bfloat16 it is rounded, down by up to 2^-8. In float32 the order of a sum matters: rows were below
# the maximum by up to 2^-20.8 (`test_attention.py`).
_ROUNDING = {"bfloat16": 2.0**-7, "float32": 2.0**-18}


class _Call(NamedTuple):
    """The arguments of one call: arrays with four axes, the scale a number."""

    query: Float[Array, "batch t heads width"]
    key: Float[Array, "batch s key_heads width"]
    value: Float[Array, "batch s key_heads value_width"]
    bias: Float[Array, "#batch #heads #t #s"] | None
    mask: Bool[Array, "#batch #heads #t #s"] | None
    options: dict[str, Any]
    implementation: str | None
    return_residual: bool


def dot_product_attention(
    query: Float[Array, "*batch t heads width"],
    key: Float[Array, "*batch s key_heads width"],
    value: Float[Array, "*batch s key_heads value_width"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    *,
    scale: Scalar | Float[Array, "..."] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Lengths | None = None,
    key_value_seq_lengths: Lengths | None = None,
    local_window_size: Window | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    max_logit: str | Plugin = "exact",
) -> tuple[Any, Float[Array, "*batch heads"]]:
    """Computes attention as `jax.nn` does, and the max logit of each head.

    All arguments but `max_logit` are arguments of `jax.nn.dot_product_attention`, in its order and
    with its meaning. The output and its gradients are equal to `jax.nn`; the max logits have no
    gradient. A max logit is the largest input of the softmax: after scale and bias, over pairs that
    may attend. This function has no soft cap: max logits are taken before a soft cap.

    Args:
      query: Queries, `[batch, t, heads, width]` or without the batch. Head h uses key head
        `h // (heads // key_heads)`.
      key: Keys, with the number of axes, the width and the dtype of `query`.
      value: Values, one for each key. Unlike in `jax.nn` their width may differ, as in MLA: the
        narrower arrays are padded with zeros, and the output is sliced.
      bias: Added after the scale; up to four axes, each full or 1: `[batch, heads, t, s]`.
      mask: True where a pair may attend; axes like `bias`.
      scale: Factor on `q . k`: a number or an array, see `max_attention_logit`. None is
        `width ** -0.5`, the width of the queries.
      is_causal: Whether query i sees only keys j <= i.
      query_seq_lengths: Number of queries of each row without padding, int32 `[batch]`.
      key_value_seq_lengths: The same for keys and values.
      local_window_size: `(left, right)`: query i sees only keys i - left <= j <= i + right. One
        number sets both. None is no limit.
      implementation: As in `jax.nn`: None, `"xla"` or `"cudnn"`.
      return_residual: Whether the output is a pair, with the log-sum-exp of each query.
      max_logit: Source of the max logits.
        `"exact"`: one more q . k, by `max_attention_logit`. The output keeps every bit.
        `"lse_bound"`: an upper bound, from the log-sum-exp of `jax.nn`, rounded up. It is too
        large by at most the log of the number of keys that a query sees; sow it under the name
        `max_logits_bound`. No further product, but XLA computes the exponentials twice, and the
        last bits of the output may differ. It bounds the logits as `jax.nn` computes them, in the
        default precision. Not in float16.
        `"tokamax"`: row maxima from the splash attention kernel of tokamax, which then computes
        the output as well. For TPUs; on several, inside `jax.shard_map(..., check_vma=False)`.
        Without `bias`, `mask` and `implementation`, and for lengths t and s that are multiples of
        128. Queries are scaled in their own dtype, which rounds bfloat16 unless the scale is a
        power of two. The output of a query that sees no key is zero.
        A function: called as `f(query, key, value, bias, mask, scale=, is_causal=,
        query_seq_lengths=, key_value_seq_lengths=, local_window_size=)` with arrays of four axes,
        it returns the output and max logits `[batch, heads]`: the signed maximum after scale and
        bias, without masked pairs, before any soft cap, in natural units (some kernels use base 2),
        and never a constant estimate.

    Returns:
      `(out, max_logits)`: output, or output and residual; and float32 `[batch, heads]`, -inf for a
      fully masked head. Without a batch in `query`, both have no batch.

    Raises:
      ValueError: if shapes do not fit together, or `max_logit` is unknown or cannot do this.
      TypeError: if `mask` is not boolean.
      ImportError: if tokamax, or its splash attention kernel, is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import muonclip_jax as mc
      >>> x = jnp.array([3.0, -4.0]).reshape(1, 2, 1, 1)
      >>> out, max_logits = mc.dot_product_attention(x, x, x, is_causal=True)
      >>> out.shape, max_logits
      ((1, 2, 1, 1), Array([[16.]], dtype=float32))

    References:
      Kimi K2, arXiv 2507.20534, section 2.1, definition of S_max.
      FlashAttention-2, arXiv 2307.08691, section 3.1, definition of the log-sum-exp.
    """
    attend = _method(max_logit)
    batched = jnp.ndim(query) != 3
    query, key, value = (_with_four_axes(x, least=3) for x in (query, key, value))
    bias, mask = (None if x is None else _with_four_axes(x) for x in (bias, mask))
    lengths = (query_seq_lengths, key_value_seq_lengths)
    others = {"window": local_window_size, "scale": scale, "is_causal": is_causal}
    check_arguments("dot_product_attention", query, key, bias, mask, lengths, **others)
    _check_value(key, value)
    options = {
        # As jax.nn has it: `width ** -0.5` may differ by the last bit.
        "scale": 1 / math.sqrt(query.shape[-1]) if scale is None else scale_with_four_axes(scale),
        "is_causal": is_causal,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
        "local_window_size": local_window_size,
    }
    call = _Call(query, key, value, bias, mask, options, implementation, return_residual)
    out, residual, max_logits = attend(call)
    result = (out, residual, jax.lax.stop_gradient(max_logits).astype(jnp.float32))
    out, residual, max_logits = result if batched else jax.tree.map(lambda x: x[0], result)
    return ((out, residual) if return_residual else out), max_logits


def _method(max_logit: Any) -> Callable[[_Call], Result]:
    """Returns the function that computes output and max logits."""
    if callable(max_logit):
        plugin: Any = max_logit
        return functools.partial(_plugged, plugin)
    check_choice("dot_product_attention", "max_logit", max_logit, tuple(_METHODS))
    return _METHODS[max_logit]


def _exact(call: _Call) -> Result:
    """Computes the logits a second time, blockwise."""
    out, residual = _jax_nn(call, call.return_residual)
    arrays = {"bias": call.bias, "mask": call.mask}
    return out, residual, max_attention_logit(call.query, call.key, **arrays, **call.options)


def _lse_bound(call: _Call) -> Result:
    """Bounds the maximum by the log-sum-exp of `jax.nn`, which has the dtype of the keys."""
    if call.key.dtype == jnp.float16:
        raise ValueError(
            'dot_product_attention: max_logit="lse_bound" does not work in float16, in which the '
            'log-sum-exp overflows. Use bfloat16, or max_logit="exact".'
        )
    out, lse = _jax_nn(call, return_residual=True)
    wide = lse.astype(jnp.float32)
    # Up by one unit in the last place, at least: rounded to bfloat16 it can be below the maximum.
    bound = wide + jnp.abs(wide) * _ROUNDING.get(call.key.dtype.name, _ROUNDING["float32"])
    # A masked logit is MASKED there, and so is the log-sum-exp of a row of nothing else.
    bound = jnp.where(wide < MASKED / 2, -jnp.inf, bound)
    return out, lse, jnp.max(bound, axis=1)


def _tokamax(call: _Call) -> Result:
    """Takes output and row maxima from one kernel."""
    if np.ndim(call.options["scale"]):
        raise ValueError(
            'dot_product_attention: max_logit="tokamax" needs a number as scale, got an array. '
            "Multiply the queries by it and pass scale=1.0."
        )
    arrays = (call.query, call.key, call.value, call.bias, call.mask)
    return splash_attention(*arrays, implementation=call.implementation, **call.options)


def _plugged(function: Plugin, call: _Call) -> Result:
    """Calls the user's function and checks the shapes of what it returns."""
    if call.implementation is not None or call.return_residual:
        raise ValueError(
            "dot_product_attention: implementation and return_residual do not reach a function "
            "passed as max_logit. Leave them out, and bind its options with functools.partial."
        )
    result = function(call.query, call.key, call.value, call.bias, call.mask, **call.options)
    expected = ((*call.query.shape[:-1], call.value.shape[-1]), call.query.shape[:3:2])
    got = tuple(map(np.shape, result)) if isinstance(result, tuple) else type(result).__name__
    if got != expected:
        raise ValueError(
            f"dot_product_attention: the function passed as max_logit returned {got}, expected a "
            f"tuple of the output {expected[0]} and the max logits {expected[1]}."
        )
    out, max_logits = result
    return out, None, max_logits


def _jax_nn(call: _Call, return_residual: bool) -> tuple[Array, Any]:
    """Computes attention and, if wanted, log-sum-exp; `jax.nn` supports one width only."""
    own, theirs = call.query.shape[-1], call.value.shape[-1]
    q, k, v = (_widened(x, max(own, theirs)) for x in (call.query, call.key, call.value))
    scale = call.options["scale"]
    k, v = (with_query_heads(x, q) for x in (k, v))
    if np.ndim(scale) and scale.shape[1] == call.key.shape[2]:
        scale = with_query_heads(scale, q, axis=-3)
    elif np.ndim(scale) and scale.shape[1] not in (1, k.shape[2]):
        # A factor for each query head; jax.nn supports one for each key head only.
        k, v = (jnp.repeat(x, scale.shape[1] // x.shape[2], axis=2) for x in (k, v))
    attend: Any = jax.nn.dot_product_attention
    result = attend(
        *(q, k, v, call.bias, call.mask),
        implementation=call.implementation,
        return_residual=return_residual,
        **call.options | {"scale": scale},
    )
    out, residual = result if return_residual else (result, None)
    return (out[..., :theirs] if theirs < own else out), residual


def _widened(x: Float[Array, "b s k h"], width: int) -> Float[Array, "b s k {width}"]:
    """Pads the last axis with zeros, which change no product."""
    missing = width - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * 3 + [(0, missing)]) if missing else x


def _with_four_axes(x: Any, least: int = 0) -> Array:
    """Adds leading axes of size 1, as `jax.nn` does; fewer than `least` axes raise later."""
    x = jnp.asarray(x)
    return x.reshape((1,) * (4 - x.ndim) + x.shape) if least <= x.ndim < 4 else x


def _check_value(key: Array, value: Array) -> None:
    """Raises unless there is one value for each key."""
    if value.ndim != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"dot_product_attention: value {value.shape} and key {key.shape} differ before the "
            "last axis; there must be one value for each key."
        )


_METHODS: dict[str, Callable[[_Call], Result]] = {
    "exact": _exact,
    "lse_bound": _lse_bound,
    "tokamax": _tokamax,
}

"""Common parts of the attention functions for `flax.linen` and for `flax.nnx`."""

import functools
import numbers
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from muonclip_jax._attention.attention import dot_product_attention
from muonclip_jax._attention.max_logit import max_attention_logit

# Suffix of the name of max logits that are an upper bound and not exact.
BOUND = "_bound"

# Source of the max logits: a name, or a function; see `dot_product_attention`.
MaxLogit: TypeAlias = str | Callable[..., Any]

# Attributes of an attention module that hold its soft cap, with a code that uses the name.
SOFT_CAPS = (
    "attn_logits_soft_cap",  # Flax, examples/gemma/modules.py; MaxText, layers/attentions.py
    "attn_logit_softcapping",  # Hugging Face Transformers, models/gemma2/modeling_gemma2.py
    "logits_soft_cap",  # tokamax, ops/attention/api.py, of dot_product_attention
    "atten_logit_cap",  # praxis, layers/attentions.py
    "attn_soft_cap",  # gidd-easydel, model/configuration_gidd.py
    "logit_cap",  # sglang-jax, layers/radix_attention.py
)


def attend_and_sow(
    query: Float[Array, "*batch t heads width"],
    key: Float[Array, "*batch s key_heads width"],
    value: Float[Array, "*batch s key_heads value_width"],
    bias: Float[Array, "..."] | None,
    mask: Shaped[Array, "..."] | None,
    *,
    flax_attention: Callable[[], Array],
    sow: Callable[..., bool] | None,
    is_causal: bool = False,
    block_size: int,
    max_logit: MaxLogit,
    implementation: str | None,
    **only_flax: Any,
) -> Float[Array, "*batch t heads value_width"]:
    """Computes attention, and sows the max logit of each head.

    Args:
      query: Queries, in the dtype of the computation.
      key: Keys.
      value: Values.
      bias: Added to the logits; axes in front may be missing.
      mask: Not 0 where a pair may attend; likewise.
      flax_attention: Returns the output of Flax's own function.
      sow: Stores max logits. None if they would not be kept.
      is_causal: Whether query i sees only keys j <= i.
      block_size: Of `max_attention_logit`.
      max_logit: Of `dot_product_attention`.
      implementation: Of `dot_product_attention`.
      only_flax: Arguments that only Flax's own function supports, by name. None is unset.

    Returns:
      The attention output.

    Raises:
      ValueError: if one of `only_flax` is set and another function computes the output.
    """
    if max_logit == "exact" and implementation is None:
        if sow is not None:
            sow(_exact(query, key, bias, mask, is_causal=is_causal, block_size=block_size))
        return flax_attention()
    _check_unset(only_flax, max_logit, implementation)
    batch = query.shape[:-3]
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    bias, mask = _bias_and_mask(bias, mask, batch)
    options = {"is_causal": is_causal, "implementation": implementation, "max_logit": max_logit}
    if sow is None:
        out = _output(q, k, v, bias, mask, **options)
    else:
        out, largest = dot_product_attention(q, k, v, bias, mask, **options)
        sow(largest, name=f"max_logits{BOUND}" if max_logit == "lse_bound" else "max_logits")
    return out.reshape(*batch, *out.shape[-3:])


@functools.partial(jax.jit, static_argnames=("is_causal", "implementation", "max_logit"))
def _output(
    query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None, **options: Any
) -> Float[Array, "batch t heads value_width"]:
    """Computes attention alone, under jit, so that XLA removes max logits that are not kept."""
    return dot_product_attention(query, key, value, bias, mask, **options)[0]


def check_kind(name: str, module: Any, kind: type, other: str) -> None:
    """Raises for a module of the other API of Flax.

    Args:
      name: Of the function that was called.
      module: What it was called with.
      kind: The class of the modules that it accepts.
      other: The same function for modules of the other API.
    """
    if not isinstance(module, kind):
        api = ".".join(kind.__module__.split(".")[:2])
        raise TypeError(
            f"{name}: got a {type(module).__name__}, expected a module of {api}. For the other API "
            f"of Flax, use {other}."
        )


def check_sown_before_soft_cap(module: Any, name: str) -> None:
    """Raises for a module with a soft cap: its max logits may be computed after the cap."""
    if found := _soft_cap(module):
        raise ValueError(
            f"sow_max_logits: {name} has {found}. After a soft cap no logit is above the cap, and "
            "the clip would never act. Sow the max logits before the cap, such as "
            "max_attention_logit(query, key), and pass before_soft_cap=True."
        )


def check_no_soft_cap(module: Any, name: str) -> None:
    """Raises for a module with a soft cap, which `attention_fn` does not apply."""
    if found := _soft_cap(module):
        raise ValueError(
            f"attention_fn: {name} has {found}, and attention_fn applies no soft cap. Leave the "
            "cap out, or compute the attention in the module and sow the logits before the cap: "
            "sow_max_logits(..., before_soft_cap=True)."
        )


def _soft_cap(module: Any) -> str:
    """Returns the soft cap of a module as text; empty if there is none."""
    for name in SOFT_CAPS:
        cap = getattr(module, name, None)
        # In the codes with these names, a number that is not positive switches the cap off.
        if not (cap is None or (isinstance(cap, numbers.Real) and cap <= 0)):
            return f"{name}={cap!r}"
    return ""


def _check_unset(
    only_flax: dict[str, Any], max_logit: MaxLogit, implementation: str | None
) -> None:
    """Raises for arguments that only Flax's own attention supports."""
    found = ", ".join(f"{name}={x!r}" for name, x in only_flax.items() if x is not None)
    if found:
        raise ValueError(
            f"attention_fn: max_logit={max_logit!r} with implementation={implementation!r} does "
            f"not support {found}. Leave that out, or use max_logit='exact' with "
            "implementation=None, which is Flax's own attention."
        )


def _exact(
    query: Array, key: Array, bias: Array | None, mask: Array | None, **settings: Any
) -> Float[Array, "flat_batch heads"]:
    """Computes max logits under Flax's conventions: any batch axes, masks of any dtype."""
    batch = query.shape[:-3]
    query, key = (x.reshape(-1, *x.shape[-3:]) for x in (query, key))
    bias, mask = _bias_and_mask(bias, mask, batch)
    return max_attention_logit(query, key, bias=bias, mask=mask, **settings)


def _bias_and_mask(
    bias: Float[Array, "..."] | None, mask: Shaped[Array, "..."] | None, batch: tuple[int, ...]
) -> tuple[Float[Array, "b n t s"] | None, Bool[Array, "bm nm tm sm"] | None]:
    """Reshapes both to four axes, and casts the mask to bool."""
    return (
        None if bias is None else _flat_batch(bias, batch),
        # `nn.make_causal_mask` returns float32 ones and zeros.
        None if mask is None else _flat_batch(mask, batch).astype(bool),
    )


def _flat_batch(x: Array, batch: tuple[int, ...]) -> Shaped[Array, "flat_batch heads t s"]:
    """Flattens the batch axes; heads, t and s keep size 1 if they broadcast."""
    x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
    if any(size != 1 for size in x.shape[:-3]):
        x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
    return x.reshape(-1, *x.shape[-3:])

"""Max logits of `flax.linen` modules."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Bool, Float, Shaped

from muonclip_jax._attention.flax_attention import (
    MaxLogit,
    attend_and_sow,
    check_kind,
    check_no_soft_cap,
    check_sown_before_soft_cap,
)
from muonclip_jax._attention.shared_keys import with_query_heads


def sow_max_logits(
    module: nn.Module,
    max_logits: Float[Array, "*batch heads"],
    *,
    name: str = "max_logits",
    collection: str = "intermediates",
    before_soft_cap: bool = False,
) -> bool:
    """Stores the max logits of an attention module for `qk_clip`.

    Call it in the attention module, the parent of the query and key modules. It has no gradient.
    `nn.scan` and `nn.vmap` around it need `"intermediates"` in their `variable_axes`; without it,
    Flax stores nothing.

    Args:
      module: The attention module.
      max_logits: One number per example and head, from `max_attention_logit`.
      name: Leaf name; `stat` of the layout.
      collection: Collection to store them in. `init` drops `intermediates` and keeps any other.
      before_soft_cap: Whether `max_logits` of a module with a soft cap are taken before the cap.

    Returns:
      Whether they were stored: False if the collection is not mutable.

    Raises:
      ValueError: if the module has a soft cap and `before_soft_cap` is not set.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import muonclip_jax as mc
      >>> class Attention(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         query = nn.DenseGeneral((2, 8), name="query")(x)
      ...         key = nn.DenseGeneral((2, 8), name="key")(x)
      ...         mc.linen.sow_max_logits(self, mc.max_attention_logit(query, key))
      ...         return jax.nn.dot_product_attention(query, key, key)
      >>> x = jnp.ones((3, 5, 4))
      >>> variables = Attention().init(jax.random.key(0), x)
      >>> _, state = Attention().apply(variables, x, mutable=["intermediates"])
      >>> state["intermediates"]["max_logits"][0].shape
      (3, 2)

    References:
      Kimi K2, arXiv 2507.20534, section 2.1, definition of S_max.
    """
    check_kind("linen.sow_max_logits", module, nn.Module, "mc.nnx.sow_max_logits")
    if not before_soft_cap:
        check_sown_before_soft_cap(module, _name(module))
    return module.sow(collection, name, jax.lax.stop_gradient(max_logits))


def attention_fn(
    query: Float[Array, "*batch t heads width"],
    key: Float[Array, "*batch s key_heads width"],
    value: Float[Array, "*batch s key_heads value_width"],
    bias: Float[Array, "..."] | None = None,
    mask: Shaped[Array, "..."] | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: nn.Module | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    qk_attn_weights_einsum: Callable[..., Array] | None = None,
    attn_weights_value_einsum: Callable[..., Array] | None = None,
    *,
    is_causal: bool = False,
    block_size: int = 512,
    max_logit: MaxLogit = "exact",
    implementation: str | None = None,
) -> Float[Array, "*batch t heads value_width"]:
    """Computes attention as Flax does, and sows the max logit of each head.

    For `nn.MultiHeadDotProductAttention(attention_fn=attention_fn)`, **called with**
    `sow_weights=True`: only then does Flax pass its module, and without it nothing is sown. The
    output is equal to `nn.dot_product_attention`, bit for bit, and `attention_weights` are not
    sown. If `intermediates` is not mutable, as in evaluation, no max logit is computed.

    Args:
      query: Queries, after any rotation.
      key: Keys. Fewer heads than queries are shared: query head h uses key head
        `h // (heads // key_heads)`.
      value: Values, one head for each of the keys.
      bias: Added to the logits; broadcasts to `[*batch, heads, t, s]`. Part of the logits.
      mask: True, or not 0, where a pair may attend; broadcasts like `bias`. Masked pairs do not
        count.
      broadcast_dropout: As in Flax.
      dropout_rng: As in Flax. Dropout does not change the max logits.
      dropout_rate: As in Flax.
      deterministic: As in Flax.
      dtype: As in Flax.
      precision: As in Flax; max logits are always exact.
      module: The attention module; None sows nothing.
      force_fp32_for_softmax: As in Flax.
      einsum_dot_general: As in Flax.
      qk_attn_weights_einsum: As in Flax.
      attn_weights_value_einsum: As in Flax.
      is_causal: Whether query i sees only keys j <= i. Kernels need less work for it than for a
        mask. Set this and the next arguments with `functools.partial`.
      block_size: Of `max_attention_logit`.
      max_logit: As in `dot_product_attention`. All but `"exact"` compute the output too, and do
        not support dropout. An upper bound is sown as `max_logits_bound`.
      implementation: As in `jax.nn.dot_product_attention`, which computes the output unless None.

    Returns:
      The attention output.

    Raises:
      ValueError: if the module has a soft cap, or for arguments that `max_logit` or
        `implementation` does not support.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import muonclip_jax as mc
      >>> attn = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=mc.linen.attention_fn)
      >>> x = jnp.ones((3, 5, 4))
      >>> variables = attn.init(jax.random.key(0), x)
      >>> _, state = attn.apply(variables, x, sow_weights=True, mutable=["intermediates"])
      >>> state["intermediates"]["max_logits"][0].shape
      (3, 2)

    References:
      Flax, `flax/linen/attention.py`, function `dot_product_attention`.
    """
    sow = None
    if module is not None:
        check_kind("linen.attention_fn", module, nn.Module, "mc.nnx.attention_fn")
        check_no_soft_cap(module, _name(module))
        if module.is_mutable_collection("intermediates"):
            sow = functools.partial(sow_max_logits, module)
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
    hooks = {
        "precision": precision,
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }

    def flax_attention():
        group = query.shape[-2] // key.shape[-2]
        return nn.dot_product_attention(
            query,
            # Flax requires equal numbers of key heads and query heads.
            with_query_heads(key, query, repeat=True) if group > 1 else key,
            with_query_heads(value, query, repeat=True) if group > 1 else value,
            bias=bias,
            mask=_causal_mask(mask, query, key) if is_causal else mask,
            broadcast_dropout=broadcast_dropout,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            dtype=dtype,
            module=None,
            force_fp32_for_softmax=force_fp32_for_softmax,
            **hooks,
        )

    return attend_and_sow(
        query,
        key,
        value,
        bias,
        mask,
        flax_attention=flax_attention,
        sow=sow,
        is_causal=is_causal,
        block_size=block_size,
        max_logit=max_logit,
        implementation=implementation,
        dropout_rate=None if deterministic or not dropout_rate else dropout_rate,
        **hooks,
    )


def _causal_mask(
    mask: Shaped[Array, "..."] | None,
    query: Float[Array, "*batch t heads width"],
    key: Float[Array, "*batch s key_heads width"],
) -> Bool[Array, "..."]:
    """Adds causality to a mask: Flax's function has no argument for it."""
    causal = jnp.tri(query.shape[-3], key.shape[-3], dtype=bool)
    if mask is None:
        return jnp.expand_dims(causal, range(query.ndim - 2))
    return jnp.expand_dims(causal, range(mask.ndim - 2)) & (mask != 0)


def _name(module: nn.Module) -> str:
    """Returns class and path of a module."""
    return f"{type(module).__name__} at {'/'.join(module.path) or '(root)'!r}"

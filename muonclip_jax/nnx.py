"""Max logits of `flax.nnx` modules. Flax 0.12.6 or later is needed."""

import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
from flax import nnx
from flax.nnx.nn import dtypes
from jaxtyping import Array, Float, Shaped

from muonclip_jax._attention.flax_attention import (
    MaxLogit,
    attend_and_sow,
    check_kind,
    check_no_soft_cap,
    check_sown_before_soft_cap,
)
from muonclip_jax._attention.shared_keys import with_query_heads


class MaxLogits(nnx.Intermediate):
    """The max logits of one module: a tuple with one entry for each of its calls.

    `nnx.capture(model, MaxLogits)` collects them, at the path of each module. Pass them to
    `qk_clip` with `nnx.state(model, nnx.Param)`, and the parameters that it returns to
    `nnx.update`. This is a subclass of `nnx.Intermediate`: to capture both, name this first.

    Inside of `nnx.value_and_grad`, capture in the function that is differentiated and return the
    max logits with `has_aux=True`. `nnx.jit` and `nnx.remat` work inside and outside of a capture.

    Layers that `nnx.scan` or `nnx.vmap` stacks on axis 0 have stacked max logits. If axes are set
    by type, give this type the axis of the layers: `nnx.StateAxes({(nnx.Param, MaxLogits): 0, ...:
    nnx.Carry})`. With `nnx.vmap` over the batch alone, give it the axis of the batch.
    `jax.lax.scan` drops everything that is sown inside: capture in its body, return the max logits
    with its outputs, and put them at the path of the layers, `{"layers": stats}`.

    Example:
      >>> import jax.numpy as jnp
      >>> import muonclip_jax as mc
      >>> from flax import nnx
      >>> class Model(nnx.Module):
      ...     def __init__(self, rngs):
      ...         @nnx.split_rngs(splits=3)
      ...         @nnx.vmap
      ...         def stack(rngs):
      ...             return nnx.MultiHeadAttention(
      ...                 num_heads=2, in_features=4, decode=False, rngs=rngs,
      ...                 attention_fn=mc.nnx.attention_fn)
      ...         self.layers = stack(rngs)
      ...     def __call__(self, x):
      ...         @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
      ...         def body(x, layer):
      ...             return layer(x, sow_weights=True)
      ...         return body(x, self.layers)
      >>> model = Model(nnx.Rngs(0))
      >>> out, stats = nnx.capture(model, mc.nnx.MaxLogits)(jnp.ones((1, 5, 4)))
      >>> params, info = mc.qk_clip(nnx.state(model, nnx.Param), stats, threshold=100.0)
      >>> nnx.update(model, params)
      >>> info.gamma["layers"].shape
      (3, 2)
    """


def sow_max_logits(
    module: nnx.Module,
    max_logits: Float[Array, "*batch heads"],
    *,
    name: str = "max_logits",
    before_soft_cap: bool = False,
) -> bool:
    """Passes the max logits of an attention module to the `nnx.capture` around it.

    Call it in the attention module, the parent of the query and key modules. It has no gradient.
    Without a capture of `MaxLogits` it stores nothing.

    Args:
      module: The attention module.
      max_logits: One number per example and head, from `max_attention_logit`.
      name: Leaf name; `stat` of the layout.
      before_soft_cap: Whether `max_logits` of a module with a soft cap are taken before the cap.

    Returns:
      Whether they were captured.

    Raises:
      ImportError: if Flax is older than 0.12.6, which has no `nnx.capture`.
      ValueError: if the module has a soft cap and `before_soft_cap` is not set.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import muonclip_jax as mc
      >>> from flax import nnx
      >>> class Attention(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.query = nnx.LinearGeneral(4, (2, 8), rngs=rngs)
      ...         self.key = nnx.LinearGeneral(4, (2, 8), rngs=rngs)
      ...     def __call__(self, x):
      ...         query, key = self.query(x), self.key(x)
      ...         mc.nnx.sow_max_logits(self, mc.max_attention_logit(query, key))
      ...         return jax.nn.dot_product_attention(query, key, key)
      >>> model, x = Attention(nnx.Rngs(0)), jnp.ones((3, 5, 4))
      >>> out, stats = nnx.capture(model, mc.nnx.MaxLogits)(x)
      >>> stats["max_logits"][0].shape
      (3, 2)

    References:
      Kimi K2, arXiv 2507.20534, section 2.1, definition of S_max.
    """
    _check_flax("nnx.sow_max_logits")
    check_kind("nnx.sow_max_logits", module, nnx.Module, "mc.linen.sow_max_logits")
    if not before_soft_cap:
        check_sown_before_soft_cap(module, type(module).__name__)
    if not _is_captured(module):
        return False
    return module.sow(MaxLogits, name, jax.lax.stop_gradient(max_logits))


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
    module: nnx.Module | None = None,
    promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
    is_causal: bool = False,
    *,
    block_size: int = 512,
    max_logit: MaxLogit = "exact",
    implementation: str | None = None,
    **others: Any,
) -> Float[Array, "*batch t heads value_width"]:
    """Computes attention as Flax does, and sows the max logit of each head.

    For `nnx.MultiHeadAttention(attention_fn=attention_fn)`, **called with** `sow_weights=True`:
    only then does Flax pass its module, and without it nothing is sown. The output is equal to
    `nnx.dot_product_attention`, bit for bit, and `attention_weights` are not sown. Without a
    capture of `MaxLogits`, as in evaluation, no max logit is computed.

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
      promote_dtype: As in Flax.
      is_causal: As in Flax. Masked pairs do not count.
      block_size: Of `max_attention_logit`. Set this and the next two with `functools.partial`.
      max_logit: As in `dot_product_attention`. All but `"exact"` compute the output too, and do
        not support dropout. An upper bound is sown as `max_logits_bound`.
      implementation: As in `jax.nn.dot_product_attention`, which computes the output unless None.
      others: Arguments of later versions of Flax, passed on to Flax's function.

    Returns:
      The attention output.

    Raises:
      ImportError: if a module is passed and Flax is older than 0.12.6.
      ValueError: if the module has a soft cap, or for arguments that `max_logit` or
        `implementation` does not support.

    Example:
      >>> import jax.numpy as jnp
      >>> import muonclip_jax as mc
      >>> from flax import nnx
      >>> attn = nnx.MultiHeadAttention(num_heads=2, in_features=4, decode=False, rngs=nnx.Rngs(0),
      ...                               attention_fn=mc.nnx.attention_fn)
      >>> _, stats = nnx.capture(attn, mc.nnx.MaxLogits)(jnp.ones((3, 5, 4)), sow_weights=True)
      >>> stats["max_logits"][0].shape
      (3, 2)

    References:
      Flax, `flax/nnx/nn/attention.py`, function `dot_product_attention`.
    """
    sow = None
    if module is not None:
        _check_flax("nnx.attention_fn")
        check_kind("nnx.attention_fn", module, nnx.Module, "mc.linen.attention_fn")
        check_no_soft_cap(module, type(module).__name__)
        if _is_captured(module):
            sow = functools.partial(sow_max_logits, module)

    def flax_attention():
        return nnx.dot_product_attention(
            query,
            with_query_heads(key, query),
            with_query_heads(value, query),
            bias=bias,
            mask=mask,
            broadcast_dropout=broadcast_dropout,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            dtype=dtype,
            precision=precision,
            module=None,
            promote_dtype=promote_dtype,
            is_causal=is_causal,
            **others,
        )

    q, k, v = promote_dtype((query, key, value), dtype=dtype)
    return attend_and_sow(
        q,
        k,
        v,
        bias,
        mask,
        flax_attention=flax_attention,
        sow=sow,
        is_causal=is_causal,
        block_size=block_size,
        max_logit=max_logit,
        implementation=implementation,
        dropout_rate=None if deterministic or not dropout_rate else dropout_rate,
        precision=precision,
        **others,
    )


def _check_flax(caller: str) -> None:
    """Raises if Flax has no `nnx.capture`: max logits would be dropped, and nothing clipped."""
    if not hasattr(nnx, "capture"):
        raise ImportError(
            f"{caller}: Flax {flax.__version__} has no nnx.capture, which collects the max logits;"
            " expected Flax 0.12.6 or later. Run pip install 'flax>=0.12.6'; or, with this version,"
            " call module.sow(nnx.Intermediate, 'max_logits', max_logits) and after the forward"
            " pass nnx.pop(model, nnx.Intermediate)."
        )


def _is_captured(module: nnx.Module) -> bool:
    """Returns whether `MaxLogits` is captured; without it `Module.sow` would warn and store."""
    # `nnx.capture` collects in this attribute, and `Module.sow` reads it.
    return any(type(variable) is MaxLogits for variable in getattr(module, "__captures__", ()))

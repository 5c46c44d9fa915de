"""A transformer with grouped-query attention: RoPE, RMSNorm, SwiGLU, no QK-norm.

`layers.py` lists the axis letters. The layers are one scanned block, so each of their parameters
has a leading axis L.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import muonclip_jax as mc
from examples.language_model.models.layers import (
    MLP,
    VOCABULARY,
    embed,
    head,
    linear,
    rotate,
    shard_sequences,
    stack,
    zeros_init,
)
from examples.language_model.models.logical_axes import constrain


class Attention(nn.Module):
    """Causal attention in which N / K query heads share a key head; sows its max logits.

    Attributes:
      heads: Query heads, N.
      kv_heads: Key and value heads, K; divides N.
      head_dim: Width of a head, H; even, as RoPE rotates pairs.
      dtype: Of the computation.
      max_logit: `"exact"`, or `"lse_bound"` for the upper bound that flash attention returns.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: Any = jnp.float32
    max_logit: str = "exact"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B T D] to [B T D]."""

        def project(heads, axis, name):
            axes = ("embed", axis, "head_dim")
            return linear((heads, self.head_dim), axes, name=name, dtype=self.dtype)(x)

        query = rotate(project(self.heads, "heads", "query"))  # [B T N H]
        key = rotate(project(self.kv_heads, "kv_heads", "key"))  # [B T K H]
        value = project(self.kv_heads, "kv_heads", "value")  # [B T K H]
        mixed, max_logits = mc.dot_product_attention(
            query, key, value, is_causal=True, max_logit=self.max_logit
        )  # [B T N H], [B N]
        name = "max_logits" if self.max_logit == "exact" else "max_logits_bound"
        mc.linen.sow_max_logits(self, max_logits, name=name)
        out = linear(
            x.shape[-1],
            ("heads", "head_dim", "embed"),
            name="out",
            dtype=self.dtype,
            axis=(-2, -1),
            init=zeros_init,
        )
        return out(mixed)


class Block(nn.Module):
    """Attention, then the MLP: each reads the normalized residual stream and adds to it.

    Attributes:
      heads: Query heads, N.
      kv_heads: Key and value heads, K.
      head_dim: Width of a head, H.
      hidden: Hidden units of the MLP, F.
      dtype: Of the computation.
      max_logit: See `Attention`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    dtype: Any = jnp.float32
    max_logit: str = "exact"

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps [B T D] to [B T D], with the signature of `nn.scan`."""
        x = constrain(x, "batch", None, None)
        sizes = (self.heads, self.kv_heads, self.head_dim)
        attention = Attention(*sizes, self.dtype, self.max_logit, name="attn")
        x = x + attention(nn.RMSNorm(dtype=self.dtype, name="attn_norm")(x))
        mlp = MLP(self.hidden, self.dtype, name="mlp")
        return x + mlp(nn.RMSNorm(dtype=self.dtype, name="mlp_norm")(x)), None


class GQA(nn.Module):
    """The model, from bytes to the logits of the next byte.

    Attributes:
      layers: Blocks, L.
      width: Of the residual stream, D.
      heads: Query heads, N.
      kv_heads: Key and value heads, K.
      head_dim: Width of a head, H.
      hidden: Hidden units of the MLP, F.
      vocabulary: V.
      dtype: Of the computation; parameters, logits and max logits are float32.
      max_logit: See `Attention`.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int = VOCABULARY
    dtype: Any = jnp.float32
    max_logit: str = "exact"

    @property
    def layout(self) -> mc.MultiHeadLayout:
        """The head layout of QK-clip."""
        return mc.MultiHeadLayout(value="value")

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """Maps byte values [B T] to logits [B T V]."""
        x = shard_sequences(embed(self.vocabulary, self.width, self.dtype)(text))
        heads = (self.heads, self.kv_heads, self.head_dim)
        rest = (self.hidden, self.dtype, self.max_logit)
        x, _ = stack(Block, self.layers)(*heads, *rest, name="blocks")(x, None)
        x = constrain(x, "batch", None, None)
        return head(self.vocabulary)(nn.RMSNorm(name="final_norm")(x))

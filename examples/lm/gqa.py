"""A transformer with grouped-query attention: RoPE, RMSNorm, SwiGLU, no QK-norm.

Axis letters are those of `layers.py`. The layers are one scanned block, so each of their parameters
has a leading axis L.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import muonclip_jax as mc
from lm.layers import MLP, VOCABULARY, embed, head, linear, rotate, stack, to_sequences, zeros_init
from lm.rules import constrain


class Attention(nn.Module):
    """Causal attention in which N / K query heads share a key head; sows its largest logits.

    Attributes:
      heads: Query heads, N.
      kv_heads: Key and value heads, K; divides N.
      head_dim: Width of a head, H; even, as RoPE turns pairs.
      dtype: To compute in.
      max_logit: `"exact"`, or `"lse_bound"` for the upper bound that flash attention gives.
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
      hidden: Width inside the MLP, F.
      dtype: To compute in.
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
        """Maps [B T D] to [B T D], in the form that `nn.scan` wants."""
        x = constrain(x, "batch", None, None)
        sizes = (self.heads, self.kv_heads, self.head_dim)
        attention = Attention(*sizes, self.dtype, self.max_logit, name="attn")
        x = x + attention(nn.RMSNorm(dtype=self.dtype, name="attn_norm")(x))
        mlp = MLP(self.hidden, self.dtype, name="mlp")
        return x + mlp(nn.RMSNorm(dtype=self.dtype, name="mlp_norm")(x)), None


class GQA(nn.Module):
    """The whole model, bytes in and logits of the next byte out.

    Attributes:
      layers: Blocks, L.
      width: Of the residual stream, D.
      heads: Query heads, N.
      kv_heads: Key and value heads, K.
      head_dim: Width of a head, H.
      hidden: Width inside the MLP, F.
      vocabulary: V.
      dtype: To compute in; parameters, logits and the largest logits are float32.
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
        """Where QK-clip finds the heads."""
        return mc.MultiHeadLayout()

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """Maps byte values [B T] to logits [B T V]."""
        x = to_sequences(embed(self.vocabulary, self.width, self.dtype)(text))
        heads = (self.heads, self.kv_heads, self.head_dim)
        how = (self.hidden, self.dtype, self.max_logit)
        x, _ = stack(Block, self.layers)(*heads, *how, name="blocks")(x, None)
        x = constrain(x, "batch", None, None)
        return head(self.vocabulary)(nn.RMSNorm(name="final_norm")(x))

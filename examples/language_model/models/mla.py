"""A transformer with multi-head latent attention, as in DeepSeek-V3 and Kimi K2.

    c = norm(W_kva x),   k = (W_kb c, rotated(W_r x)),   v = W_vb c,   q = W_qb norm(W_qa x),

where the last columns of each query head are rotated too.
DeepSeek-V2, arXiv 2405.04434, equations 9 to 19, without the reformulation for inference.
`layers.py` lists the axis letters. Every kernel is flat, [inputs, N times the columns of a head]:
the matrix that Muon orthogonalizes.
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
from examples.language_model.models.presets import Latent


def layout_of(sizes: Latent) -> mc.MLALayout:
    """Returns the head layout of QK-clip."""
    return mc.MLALayout(
        nope_dim=sizes.nope,
        rope_dim=sizes.rope,
        value_dim=sizes.value,
        kernel="inputs (heads head_dim)",
    )


class LatentAttention(nn.Module):
    """Causal attention through two latent vectors per position; sows its max logits.

    Attributes:
      sizes: Of the attention.
      dtype: Of the computation.
    """

    sizes: Latent
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B T D] to [B T D]."""
        (b, t, d), s = x.shape, self.sizes

        def latent(rank, name):
            c = linear(rank, ("embed", "latent"), name=f"{name}_a", dtype=self.dtype)(x)
            return nn.RMSNorm(dtype=self.dtype, name=f"{name}_norm")(c)

        def heads(c, columns, name):
            axes = ("latent", "heads")
            flat = linear(s.heads * columns, axes, name=f"{name}_b", dtype=self.dtype)(c)
            flat = constrain(flat, "batch", None, "heads")
            return flat.reshape(b, t, s.heads, columns)

        query = heads(latent(s.q_rank, "q"), s.nope + s.rope, "q")
        key, value = jnp.split(heads(latent(s.kv_rank, "kv"), s.nope + s.value, "kv"), [s.nope], -1)
        k_rope = linear(s.rope, ("embed", "rope"), name="k_rope", dtype=self.dtype)(x)
        k_rope = rotate(k_rope[:, :, None], s.rotary_base)  # [B T 1 rope]
        key = jnp.concatenate([key, jnp.broadcast_to(k_rope, (b, t, s.heads, s.rope))], axis=-1)
        q_nope, q_rope = jnp.split(query, [s.nope], axis=-1)
        query = jnp.concatenate([q_nope, rotate(q_rope, s.rotary_base)], axis=-1)
        mixed, max_logits = mc.dot_product_attention(query, key, value, is_causal=True)
        mc.linen.sow_max_logits(self, max_logits)
        out = linear(d, ("heads", "embed"), name="out", dtype=self.dtype, init=zeros_init)
        return out(mixed.reshape(b, t, s.heads * s.value))


class Block(nn.Module):
    """Attention, then the MLP: each reads the normalized residual stream and adds to it.

    Attributes:
      attention: Sizes of the attention.
      hidden: Hidden units of the MLP, F.
      dtype: Of the computation.
    """

    attention: Latent
    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps [B T D] to [B T D], with the signature of `nn.scan`."""
        x = constrain(x, "batch", None, None)
        attention = LatentAttention(self.attention, self.dtype, name="attn")
        x = x + attention(nn.RMSNorm(dtype=self.dtype, name="attn_norm")(x))
        mlp = MLP(self.hidden, self.dtype, name="mlp")
        return x + mlp(nn.RMSNorm(dtype=self.dtype, name="mlp_norm")(x)), None


class MLA(nn.Module):
    """The model, from tokens to the logits of the next token.

    Attributes:
      layers: Blocks, L.
      width: Of the residual stream, D.
      attention: Sizes of the attention.
      hidden: Hidden units of the MLP, F.
      vocabulary: V.
      dtype: Of the computation; parameters, logits and max logits are float32.
    """

    layers: int
    width: int
    attention: Latent
    hidden: int
    vocabulary: int = VOCABULARY
    dtype: Any = jnp.float32

    @property
    def layout(self) -> mc.MLALayout:
        """The head layout of QK-clip."""
        return layout_of(self.attention)

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """Maps tokens [B T] to logits [B T V]."""
        x = shard_sequences(embed(self.vocabulary, self.width, self.dtype)(text))
        blocks = stack(Block, self.layers)(self.attention, self.hidden, self.dtype, name="blocks")
        x, _ = blocks(x, None)
        x = constrain(x, "batch", None, None)
        return head(self.vocabulary)(nn.RMSNorm(name="final_norm")(x))

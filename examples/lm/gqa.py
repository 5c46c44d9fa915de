"""A byte-level transformer with grouped-query attention: RoPE, RMSNorm, SwiGLU, no QK-norm.

Axis letters: B batch, T position, V byte value, D width, N query heads, K key and value heads,
H head width, F hidden width of the MLP, L layer. The layers are one scanned block, so each of
their parameters has a leading axis L.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

import muonclip_jax as mc

VOCABULARY = 256  # every byte value, V
ROTARY_BASE = 10_000.0  # Su et al. 2021, arXiv 2104.09864, section 3.2.2: theta_i = 10000^(-2i/d)

# Unit rows: at first the residual stream is the embedding alone, and RMSNorm then changes little.
_embed_init = nn.initializers.normal(1.0)
_zeros = nn.initializers.zeros_init()  # each residual branch, and the head, starts as nothing


def rotate(x: jax.Array) -> jax.Array:
    """Turns the pair (x[h], x[h + H/2]) at position t by the angle t · base^(-2h/H).

    Args:
      x: Queries or keys, [B T N H].

    Returns:
      The same shape. Inner products now depend on the distance of two positions only.
    """
    _, length, _, width = x.shape
    frequency = ROTARY_BASE ** (-jnp.arange(0, width, 2) / width)
    angle = (jnp.arange(length)[:, None] * frequency[None, :])[None, :, None, :]  # [1 T 1 H/2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class Attention(nn.Module):
    """Causal attention in which N / K query heads share a key head; sows its largest logits.

    Attributes:
      heads: Query heads, N.
      kv_heads: Key and value heads, K; divides N.
      head_dim: Width of a head, H; even, as RoPE turns pairs.
    """

    heads: int
    kv_heads: int
    head_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B T D] to [B T D]."""

        def project(heads, name):
            return nn.DenseGeneral((heads, self.head_dim), use_bias=False, name=name)(x)

        query = rotate(project(self.heads, "query"))  # [B T N H]
        key = rotate(project(self.kv_heads, "key"))  # [B T K H]
        value = project(self.kv_heads, "value")  # [B T K H]
        mc.linen.sow_max_logits(self, mc.max_attention_logit(query, key, is_causal=True))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)  # [B T N H]
        out = nn.DenseGeneral(
            x.shape[-1], axis=(-2, -1), use_bias=False, kernel_init=_zeros, name="out"
        )
        return out(mixed)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)).

    Attributes:
      hidden: Width between, F.
    """

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B T D] to [B T D]."""
        gate = nn.Dense(self.hidden, use_bias=False, name="gate")(x)
        up = nn.Dense(self.hidden, use_bias=False, name="up")(x)
        down = nn.Dense(x.shape[-1], use_bias=False, kernel_init=_zeros, name="down")
        return down(nn.silu(gate) * up)


class Block(nn.Module):
    """Attention, then the MLP: each reads the normalised residual stream and adds to it.

    Attributes:
      heads: Query heads, N.
      kv_heads: Key and value heads, K.
      head_dim: Width of a head, H.
      hidden: Width inside the MLP, F.
    """

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps [B T D] to [B T D], in the form that `nn.scan` wants."""
        attention = Attention(self.heads, self.kv_heads, self.head_dim, name="attn")
        x = x + attention(nn.RMSNorm(name="attn_norm")(x))
        x = x + MLP(self.hidden, name="mlp")(nn.RMSNorm(name="mlp_norm")(x))
        return x, None


class GQA(nn.Module):
    """The whole model, bytes in and logits of the next byte out.

    Attributes:
      layers: Blocks, L.
      width: Of the residual stream, D.
      heads: Query heads, N.
      kv_heads: Key and value heads, K.
      head_dim: Width of a head, H.
      hidden: Width inside the MLP, F.
    """

    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 384

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """Maps byte values [B T] to logits [B T V]."""
        x = nn.Embed(VOCABULARY, self.width, embedding_init=_embed_init, name="embed")(text)
        # Recomputes what is cheap; the products with weights, most of the work, are kept.
        kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False, policy=kept),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        sizes = (self.heads, self.kv_heads, self.head_dim, self.hidden)
        x, _ = blocks(*sizes, name="blocks")(x, None)
        x = nn.RMSNorm(name="final_norm")(x)
        return nn.Dense(VOCABULARY, use_bias=False, kernel_init=_zeros, name="lm_head")(x)

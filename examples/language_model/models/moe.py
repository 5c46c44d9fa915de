"""Multi-head latent attention and a mixture of experts, as in DeepSeek-V3 and Kimi K2.

    s_e = sigmoid(w_e · x),   y = shared(x) + scale · Σ s_e expert_e(x) / Σ s_e

where both sums are over the K experts with the largest s_e + b_e.

DeepSeek-V3, arXiv 2412.19437, equations 12 to 16. The bias b balances the load without a loss term;
`training.step` updates it. In each sequence every expert has a fixed number of slots, which tokens
fill in order of position. Therefore all arrays have static shapes, and the experts are one batched
product, which is sharded over the experts with one all-to-all before it and one after it. Tokens
beyond the capacity skip the routed experts, and a metric reports their share. `jax.lax.ragged_dot`
needs no slots, but without a kernel for it, as on CPU, it multiplies every token by every expert,
and the compiler cannot shard the sort before it.

`layers.py` lists the axis letters; also K chosen experts of a token, C slots of an expert.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import muonclip_jax as mc
from examples.language_model.models import mla
from examples.language_model.models.layers import (
    MLP,
    VOCABULARY,
    embed,
    head,
    linear,
    shard_sequences,
    stack,
    zeros_init,
)
from examples.language_model.models.logical_axes import constrain
from examples.language_model.models.presets import Latent, Routed

experts_init = nn.initializers.lecun_normal(batch_axis=(0,))


def find_slots(chosen: jax.Array, experts: int, capacity: int) -> jax.Array:
    """Assigns the tokens of a sequence to the slots of their experts, in order of position.

    Args:
      chosen: Experts of each token, [T K].
      experts: E.
      capacity: Slots of an expert, C.

    Returns:
      Indices [T K]: e C + c for slot c of expert e; E C, which is no slot, if e is full.
    """
    asks = jax.nn.one_hot(chosen, experts, dtype=jnp.int32).sum(1)  # [T E], 0 or 1
    queue = jnp.take_along_axis(jnp.cumsum(asks, axis=0) - asks, chosen, axis=1)  # [T K]
    return jnp.where(queue < capacity, chosen * capacity + queue, experts * capacity)


def into_slots(x: jax.Array, slots: jax.Array, count: int) -> jax.Array:
    """Copies tokens [T D] to their slots [T K], [count D]; an empty slot is zero."""
    length, chosen = slots.shape
    tokens = jnp.repeat(jnp.arange(length), chosen)
    tokens = jnp.full(count, length).at[slots.ravel()].set(tokens, mode="drop")
    return x.at[tokens].get(mode="fill", fill_value=0)


def out_of_slots(y: jax.Array, slots: jax.Array) -> jax.Array:
    """Copies slots [E·C D] back to tokens [T K D]; a token without a slot gets zero."""
    return y.at[slots].get(mode="fill", fill_value=0)


class Experts(nn.Module):
    """One MLP for each expert, applied to its slots.

    Attributes:
      hidden: Hidden units, F.
      dtype: Of the computation.
    """

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B E C D] to [B E C D]."""
        _, experts, _, width = x.shape
        inner, outer = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")

        def kernel(name, axes, init, *shape):
            boxed = nn.with_logical_partitioning(init, axes)
            return jnp.asarray(self.param(name, boxed, (experts, *shape)), self.dtype)

        gate, up = (kernel(n, inner, experts_init, width, self.hidden) for n in ("gate", "up"))
        down = kernel("down", outer, zeros_init, self.hidden, width)
        hidden = nn.silu(jnp.einsum("becd,edf->becf", x, gate))
        hidden = hidden * jnp.einsum("becd,edf->becf", x, up)
        hidden = constrain(hidden, "expert_batch", "experts", None, "mlp")
        y = jnp.einsum("becf,efd->becd", hidden, down)
        return constrain(y, "expert_batch", "experts", None, None)


class Mixture(nn.Module):
    """Routed and shared experts; sows the load of each routed expert.

    Attributes:
      sizes: Of the mixture.
      dtype: Of the computation; the router is float32.
    """

    sizes: Routed
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B T D] to [B T D]."""
        (b, t, d), s = x.shape, self.sizes
        capacity = min(t, math.ceil(s.capacity * t * s.chosen / s.experts))  # C
        chosen, gates = self._route(x)
        slots = jax.vmap(find_slots, (0, None, None))(chosen, s.experts, capacity)
        self._sow_loads(chosen, slots == s.experts * capacity)
        y = jax.vmap(into_slots, (0, 0, None))(x, slots, s.experts * capacity)
        # If the experts are sharded, these constraints are the two all-to-alls.
        y = constrain(y.reshape(b, s.experts, capacity, d), "batch", None, None, None)
        y = constrain(y, "expert_batch", "experts", None, None)
        y = Experts(s.hidden, self.dtype, name="experts")(y)
        y = constrain(y, "batch", None, None, None)
        y = y.reshape(b, s.experts * capacity, d)
        y = jnp.einsum("btkd,btk->btd", jax.vmap(out_of_slots)(y, slots), gates.astype(y.dtype))
        return y + MLP(s.shared * s.hidden, self.dtype, name="shared")(x)

    def _route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the chosen experts [B T K] and their gates [B T K], float32."""
        experts = self.sizes.experts
        router = linear(experts, ("embed", "router"), name="router", dtype=jnp.float32)
        scores = nn.sigmoid(router(x))
        # Not a parameter: the train step updates it, and the gates do not depend on it.
        bias = self.variable("balance", "routed", jnp.zeros, (experts,)).value
        _, chosen = jax.lax.top_k(scores + bias[None, None], self.sizes.chosen)
        gates = jnp.take_along_axis(scores, chosen, axis=-1)
        return chosen, self.sizes.scale * gates / gates.sum(-1, keepdims=True)

    def _sow_loads(self, chosen: jax.Array, full: jax.Array) -> None:
        """Sows the numbers of tokens routed to each expert, and of dropped ones: [2 E]."""
        asks = jax.nn.one_hot(chosen, self.sizes.experts)  # [B T K E]
        loads = jnp.stack([asks.sum((0, 1, 2)), (asks * full[..., None]).sum((0, 1, 2))])
        self.sow("loads", "routed", loads, init_fn=lambda: 0.0, reduce_fn=jnp.add)


class Block(nn.Module):
    """Attention, then the mixture: each reads the normalized residual stream and adds to it.

    Attributes:
      attention: Sizes of the attention.
      routed: Sizes of the mixture.
      dtype: Of the computation.
    """

    attention: Latent
    routed: Routed
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps [B T D] to [B T D], with the signature of `nn.scan`."""
        x = constrain(x, "batch", None, None)
        attention = mla.LatentAttention(self.attention, self.dtype, name="attn")
        x = x + attention(nn.RMSNorm(dtype=self.dtype, name="attn_norm")(x))
        mixture = Mixture(self.routed, self.dtype, name="moe")
        return x + mixture(nn.RMSNorm(dtype=self.dtype, name="moe_norm")(x)), None


class MoE(nn.Module):
    """The model, from tokens to the logits of the next token.

    Attributes:
      dense_layers: Blocks with an MLP, which come first.
      moe_layers: Blocks with a mixture of experts.
      width: Of the residual stream, D.
      attention: Sizes of the attention.
      hidden: Hidden units of the MLP of a dense block, F.
      routed: Sizes of the mixture.
      vocabulary: V.
      keep_products: See `layers.stack`.
      dtype: Of the computation; parameters, router, logits and max logits are float32.
    """

    dense_layers: int
    moe_layers: int
    width: int
    attention: Latent
    hidden: int
    routed: Routed
    vocabulary: int = VOCABULARY
    keep_products: bool = True
    dtype: Any = jnp.float32

    @property
    def layout(self) -> mc.MLALayout:
        """The head layout of QK-clip."""
        return mla.layout_of(self.attention)

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """Maps tokens [B T] to logits [B T V]."""
        x = shard_sequences(embed(self.vocabulary, self.width, self.dtype)(text))
        dense = stack(mla.Block, self.dense_layers, self.keep_products)
        x, _ = dense(self.attention, self.hidden, self.dtype, name="dense_blocks")(x, None)
        moe = stack(Block, self.moe_layers, self.keep_products)
        x, _ = moe(self.attention, self.routed, self.dtype, name="moe_blocks")(x, None)
        x = constrain(x, "batch", None, None)
        return head(self.vocabulary)(nn.RMSNorm(name="final_norm")(x))

"""Multi-head latent attention and a mixture of experts, as in DeepSeek-V3 and Kimi K2.

    s_e = sigmoid(w_e · x),   y = shared(x) + scale · Σ s_e expert_e(x) / Σ s_e

where both sums go over the K experts with the largest s_e + b_e.

DeepSeek-V3, arXiv 2412.19437, equations 12 to 16; b balances the load without a loss, moved by
`step.py`. Each sequence gives each expert so many slots, in the order of its positions. So every
array has a fixed size, and the work is one product batched over experts, which a mesh divides by
experts with one all-to-all on the way in and one on the way back. The price: what is above the
capacity passes the routed experts by, and the metrics say how much that is. `jax.lax.ragged_dot`
needs no slots, but where there is no kernel for it, as on CPU, it multiplies every row by every
expert, and the compiler cannot divide the sort before it among devices.

Axis letters are those of `layers.py`; K chosen experts of a token, C slots of an expert.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import muonclip_jax as mc
from lm import mla
from lm.layers import MLP, VOCABULARY, embed, head, linear, stack, to_sequences, zeros_init
from lm.presets import Latent, Routed
from lm.rules import constrain

experts_init = nn.initializers.lecun_normal(batch_axis=(0,))


def find_slots(chosen: jax.Array, experts: int, capacity: int) -> jax.Array:
    """Numbers the slots that the tokens of a sequence get, first come first served.

    Args:
      chosen: Experts of each token, [T K].
      experts: E.
      capacity: Slots of an expert, C.

    Returns:
      Numbers [T K]: e C + c for slot c of expert e, and E C, which is none, where e is full.
    """
    asks = jax.nn.one_hot(chosen, experts, dtype=jnp.int32).sum(1)  # [T E], 0 or 1
    queue = jnp.take_along_axis(jnp.cumsum(asks, axis=0) - asks, chosen, axis=1)  # [T K]
    return jnp.where(queue < capacity, chosen * capacity + queue, experts * capacity)


def into_slots(x: jax.Array, slots: jax.Array, count: int) -> jax.Array:
    """Copies tokens [T D] to their slots [T K] of `count`; an empty slot is zero."""
    length, chosen = slots.shape
    tokens = jnp.repeat(jnp.arange(length), chosen)
    tokens = jnp.full(count, length).at[slots.ravel()].set(tokens, mode="drop")
    return x.at[tokens].get(mode="fill", fill_value=0)


def out_of_slots(y: jax.Array, slots: jax.Array) -> jax.Array:
    """Copies from slots [E·C D] back to tokens [T K D]; a token without a slot gets zero."""
    return y.at[slots].get(mode="fill", fill_value=0)


class Experts(nn.Module):
    """One MLP for each expert, on its own slots.

    Attributes:
      hidden: Width between, F.
      dtype: To compute in.
    """

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B E C D] to [B E C D]."""
        _, experts, _, width = x.shape
        into, back = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")

        def kernel(name, axes, init, *sides):
            boxed = nn.with_logical_partitioning(init, axes)
            return jnp.asarray(self.param(name, boxed, (experts, *sides)), self.dtype)

        gate, up = (kernel(n, into, experts_init, width, self.hidden) for n in ("gate", "up"))
        down = kernel("down", back, zeros_init, self.hidden, width)
        hidden = nn.silu(jnp.einsum("becd,edf->becf", x, gate))
        hidden = hidden * jnp.einsum("becd,edf->becf", x, up)
        hidden = constrain(hidden, "expert_batch", "experts", None, "mlp")
        y = jnp.einsum("becf,efd->becd", hidden, down)
        return constrain(y, "expert_batch", "experts", None, None)


class Mixture(nn.Module):
    """Routed experts and shared ones; sows how many tokens each routed one got.

    Attributes:
      sizes: Of the mixture.
      dtype: To compute in; the router computes in float32.
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
        # Where a mesh divides the experts, the compiler is told to send the slots to them and back.
        y = constrain(y.reshape(b, s.experts, capacity, d), "batch", None, None, None)
        y = constrain(y, "expert_batch", "experts", None, None)
        y = Experts(s.hidden, self.dtype, name="experts")(y)
        y = constrain(y, "batch", None, None, None)
        y = y.reshape(b, s.experts * capacity, d)
        y = jnp.einsum("btkd,btk->btd", jax.vmap(out_of_slots)(y, slots), gates.astype(y.dtype))
        return y + MLP(s.shared * s.hidden, self.dtype, name="shared")(x)

    def _route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Chooses experts [B T K] and gives their gates [B T K], float32."""
        experts = self.sizes.experts
        router = linear(experts, ("embed", "router"), name="router", dtype=jnp.float32)
        scores = nn.sigmoid(router(x))
        # Not a parameter: the train step moves it, and it has no part in the gates.
        bias = self.variable("balance", "routed", jnp.zeros, (experts,)).value
        _, chosen = jax.lax.top_k(scores + bias[None, None], self.sizes.chosen)
        gates = jnp.take_along_axis(scores, chosen, axis=-1)
        return chosen, self.sizes.scale * gates / gates.sum(-1, keepdims=True)

    def _sow_loads(self, chosen: jax.Array, full: jax.Array) -> None:
        """Stores how many tokens asked for each expert, and how many of them in vain: [2 E]."""
        asks = jax.nn.one_hot(chosen, self.sizes.experts)  # [B T K E]
        loads = jnp.stack([asks.sum((0, 1, 2)), (asks * full[..., None]).sum((0, 1, 2))])
        self.sow("loads", "routed", loads, init_fn=lambda: 0.0, reduce_fn=jnp.add)


class Block(nn.Module):
    """Attention, then the mixture: each reads the normalized residual stream and adds to it.

    Attributes:
      attention: Sizes of the attention.
      routed: Sizes of the mixture.
      dtype: To compute in.
    """

    attention: Latent
    routed: Routed
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps [B T D] to [B T D], in the form that `nn.scan` wants."""
        x = constrain(x, "batch", None, None)
        attention = mla.LatentAttention(self.attention, self.dtype, name="attn")
        x = x + attention(nn.RMSNorm(dtype=self.dtype, name="attn_norm")(x))
        mixture = Mixture(self.routed, self.dtype, name="moe")
        return x + mixture(nn.RMSNorm(dtype=self.dtype, name="moe_norm")(x)), None


class MoE(nn.Module):
    """The whole model, tokens in and logits of the next token out.

    Attributes:
      dense_layers: Blocks with an MLP, which come first.
      moe_layers: Blocks with a mixture of experts.
      width: Of the residual stream, D.
      attention: Sizes of the attention.
      hidden: Width inside the MLP of a dense block, F.
      routed: Sizes of the mixture.
      vocabulary: V.
      keep_products: See `layers.stack`.
      dtype: To compute in; parameters, router, logits and the largest logits are float32.
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
        """Where QK-clip finds the heads."""
        return mla.layout_of(self.attention)

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """Maps tokens [B T] to logits [B T V]."""
        x = to_sequences(embed(self.vocabulary, self.width, self.dtype)(text))
        dense = stack(mla.Block, self.dense_layers, self.keep_products)
        x, _ = dense(self.attention, self.hidden, self.dtype, name="dense_blocks")(x, None)
        moe = stack(Block, self.moe_layers, self.keep_products)
        x, _ = moe(self.attention, self.routed, self.dtype, name="moe_blocks")(x, None)
        x = constrain(x, "batch", None, None)
        return head(self.vocabulary)(nn.RMSNorm(name="final_norm")(x))

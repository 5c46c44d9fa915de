"""Multi-head latent attention in Flax NNX, trained with Muon, with and without QK-clip.

    python examples/mla_in_nnx.py

The task needs sharp attention: each sequence is a random string, twice, and the second half is to
be predicted by looking back. At this learning rate plain Muon drives the attention logits up step
after step; with the clip every head stays near the threshold, and the task is learned as well. Runs
in about a minute on two cores, with Flax 0.12.6 or later.

Axis letters: B batch, T position, V symbol, D width, N heads, H columns of a head; C latent width.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import muonclip_jax as mc

SYMBOLS, HALF = 32, 24  # V, and the length of the string that comes twice
WIDTH, LAYERS, HEADS, LATENT = 64, 2, 4, 32  # D, layers, N, C
NOPE, ROPE, VALUE = 16, 8, 16  # columns of a head: without and with rotation, and of its value
BATCH, STEPS, LEARNING_RATE, THRESHOLD = 32, 300, 0.02, 20.0

LAYOUT = mc.MLALayout(
    nope_dim=NOPE, rope_dim=ROPE, value_dim=VALUE, kernel="inputs (heads head_dim)"
)


def rotate(x: jax.Array) -> jax.Array:
    """Turns the pairs of columns of [B T N H] by angles that grow with the position."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half) / half)  # arXiv 2104.09864, section 3.2.2
    angle = (jnp.arange(x.shape[1])[:, None] * frequency[None])[None, :, None]  # [1 T 1 H/2]
    left, right, sin, cos = x[..., :half], x[..., half:], jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class LatentAttention(nnx.Module):
    """MLA of DeepSeek-V2 (arXiv 2405.04434, section 2.1), without its inference forms."""

    def __init__(self, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.q_a, self.q_norm = linear(WIDTH, LATENT), nnx.RMSNorm(LATENT, rngs=rngs)
        self.q_b = linear(LATENT, HEADS * (NOPE + ROPE))
        self.kv_a, self.kv_norm = linear(WIDTH, LATENT), nnx.RMSNorm(LATENT, rngs=rngs)
        self.kv_b = linear(LATENT, HEADS * (NOPE + VALUE))
        self.k_rope = linear(WIDTH, ROPE)
        self.out = linear(HEADS * VALUE, WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B T D] to [B T D]."""
        b, t, _ = x.shape
        query = self.q_b(self.q_norm(self.q_a(x))).reshape(b, t, HEADS, NOPE + ROPE)
        key_value = self.kv_b(self.kv_norm(self.kv_a(x))).reshape(b, t, HEADS, NOPE + VALUE)
        k_rope = rotate(self.k_rope(x)[:, :, None])  # [B T 1 H], one for all heads
        query = jnp.concatenate([query[..., :NOPE], rotate(query[..., NOPE:])], axis=-1)
        k_rope = jnp.broadcast_to(k_rope, (b, t, HEADS, ROPE))
        key = jnp.concatenate([key_value[..., :NOPE], k_rope], axis=-1)
        # The values are narrower than the keys, which dot_product_attention accepts.
        mixed, max_logits = mc.dot_product_attention(
            query, key, key_value[..., NOPE:], is_causal=True
        )
        mc.nnx.sow_max_logits(self, max_logits)
        return self.out(mixed.reshape(b, t, HEADS * VALUE))


class Block(nnx.Module):
    """Attention, then an MLP, each on the normalized stream."""

    def __init__(self, rngs: nnx.Rngs):
        self.attn_norm, self.attn = nnx.RMSNorm(WIDTH, rngs=rngs), LatentAttention(rngs)
        self.mlp_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B T D] to [B T D]."""
        x = x + self.attn(self.attn_norm(x))
        return x + self.down(nnx.silu(self.up(self.mlp_norm(x))))


class Model(nnx.Module):
    """Symbols [B T] in, logits [B T V] of the next symbol out."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(SYMBOLS, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.lm_head = nnx.Linear(WIDTH, SYMBOLS, use_bias=False, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        """Maps [B T] to [B T V]."""
        x = self.embed(text)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def draw(key: jax.Array) -> jax.Array:
    """Draws strings and repeats them: [B 2·HALF]."""
    text = jax.random.randint(key, (BATCH, HALF), 0, SYMBOLS)
    return jnp.concatenate([text, text], axis=1)


def train(threshold: float, steps: int = STEPS) -> list[dict[str, float]]:
    """Trains from one seed.

    Args:
      threshold: Of QK-clip; infinity only records.
      steps: Optimizer steps.

    Returns:
      The metrics of each step.
    """
    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    tx = mc.muon(LEARNING_RATE, weight_decay=0.1, consistent_rms=0.2)

    def loss_fn(params, text):
        model = nnx.merge(graph, params, rest)
        logits, stats = nnx.capture(model, mc.nnx.MaxLogits)(text[:, :-1])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
        return loss[:, HALF - 1 :].mean(), stats  # what the first half has shown

    @jax.jit
    def step(params, opt_state, key) -> Any:
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, draw(key))
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        params, info = mc.qk_clip(params, stats, LAYOUT, threshold=threshold)
        return params, opt_state, {"loss": loss, **mc.qk_clip_metrics(info)}

    opt_state, history = tx.init(params), []
    for i in range(steps):
        params, opt_state, metrics = step(params, opt_state, jax.random.key(i))
        history.append({name: float(value) for name, value in metrics.items()})
    return history


def main() -> None:
    """Trains both ways and prints them side by side."""
    plain, clipped = train(math.inf), train(THRESHOLD)
    print(f"           without clip            threshold {THRESHOLD:g}")
    print("step     loss  largest logit     loss  largest logit  heads clipped")
    for i in range(STEPS // 10 - 1, STEPS, STEPS // 10):
        a, b = plain[i], clipped[i]
        print(
            f"{i + 1:4}  {a['loss']:7.3f}  {a['qk_clip/max_logit']:13.1f}"
            f"  {b['loss']:7.3f}  {b['qk_clip/max_logit']:13.1f}"
            f"  {b['qk_clip/clipped_heads']:8.0f} of {LAYERS * HEADS}"
        )


if __name__ == "__main__":
    main()

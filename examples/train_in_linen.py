"""A small language model in Flax Linen, trained with Muon, with and without QK-clip.

    python examples/train_in_linen.py

The task needs sharp attention: each sequence is a random string, twice, and the model predicts the
second half by looking back. At this learning rate the attention logits grow step after step with
Muon alone; with the clip every head stays near the threshold, and the model learns the task too.
Runs in about a minute on two cores.

Axis letters: B batch, T position, V symbol, D width, H columns of a head.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import muonclip_jax as mc

SYMBOLS, HALF = 32, 24  # V, and the length of the string
WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 2, 4, 2, 16  # D, layers, heads, heads, H
BATCH, STEPS, LEARNING_RATE, THRESHOLD = 32, 300, 0.02, 20.0


class Attention(nn.Module):
    """Causal grouped-query attention that sows its max logits."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B T D] to [B T D]."""
        query, key, value = (
            nn.DenseGeneral((heads, HEAD_DIM), use_bias=False, name=name)(x)
            for name, heads in (("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS))
        )
        mixed, max_logits = mc.dot_product_attention(query, key, value, is_causal=True)
        mc.linen.sow_max_logits(self, max_logits)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False, name="out")(mixed)


class Block(nn.Module):
    """Attention, then an MLP, each on the normalized stream."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps [B T D] to [B T D], with the signature of `nn.scan`."""
        x = x + Attention(name="attn")(nn.RMSNorm(name="attn_norm")(x))
        up = nn.Dense(4 * WIDTH, use_bias=False, name="up")(nn.RMSNorm(name="mlp_norm")(x))
        return x + nn.Dense(WIDTH, use_bias=False, name="down")(nn.silu(up)), None


class Model(nn.Module):
    """Maps symbols [B T] to the logits [B T V] of the next symbol; the layers are one scan."""

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """Maps [B T] to [B T V]."""
        positions = self.param("positions", nn.initializers.normal(1.0), (2 * HALF, WIDTH))
        x = nn.Embed(SYMBOLS, WIDTH, name="embed")(text) + positions[None, : text.shape[1]]
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0, "intermediates": 0},  # without the second, nothing is sown
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = blocks(name="blocks")(x, None)
        return nn.Dense(SYMBOLS, use_bias=False, name="lm_head")(nn.RMSNorm(name="norm")(x))


def draw(key: jax.Array) -> jax.Array:
    """Draws strings and repeats them: [B 2·HALF]."""
    text = jax.random.randint(key, (BATCH, HALF), 0, SYMBOLS)
    return jnp.concatenate([text, text], axis=1)


def train(threshold: float, steps: int = STEPS) -> list[dict[str, float]]:
    """Trains and returns the metrics of each step; an infinite threshold never clips."""
    model = Model()
    params = model.init(jax.random.key(0), draw(jax.random.key(0)))["params"]
    # The optimizer of Kimi K2 without its clip: `qk_clip` below also returns the metrics.
    tx = mc.muonclip(LEARNING_RATE, threshold=None)

    def loss_fn(params, text):
        logits, sown = model.apply({"params": params}, text[:, :-1], mutable=["intermediates"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
        return loss[:, HALF - 1 :].mean(), sown  # the symbols that the first half determines

    @jax.jit
    def step(params, opt_state, key) -> Any:
        (loss, sown), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, draw(key))
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        params, info = mc.qk_clip(params, sown, threshold=threshold)
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

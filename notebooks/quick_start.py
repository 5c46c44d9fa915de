# %% [markdown]
# # MuonClip in your own Flax model
#
# MuonClip trained Kimi K2 (arXiv 2507.20534). It uses Muon for matrices and AdamW for all other
# parameters. After each step, QK-clip shrinks the query and key weights of attention heads whose
# logits exceed a threshold. Three places of your program change: the attention, the optimizer, and
# one call after the update. The loss also returns the max logits.

# %%
import importlib.util
import subprocess
import sys

# On a GPU or TPU: "muonclip-jax[cuda]" or "muonclip-jax[tpu]"
# Not on PyPI before the first release: until then, run `pip install .` in a clone.
PACKAGE = "muonclip-jax"
if importlib.util.find_spec("muonclip_jax") is None:
    install = [sys.executable, "-m", "pip", "install", "-q", PACKAGE, "matplotlib"]
    subprocess.run(install, check=True)

# %%
import argparse
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import muonclip_jax as mc

SEED = 0
BLUE, ORANGE, GREY = "#2a6f97", "#e36414", "#8d99ae"
plt.rcParams.update({"figure.dpi": 100, "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"axes.titlelocation": "left", "legend.frameon": False})
print(jax.devices())

# %% [markdown]
# ## The model
#
# A small transformer on bytes, with Flax's attention. **Attention:** `attention_fn` computes the
# same output as Flax's function, and sows the max logit of each head. Pass `sow_weights=True`:
# without it, Flax does not pass the module to the function.

# %%
WIDTH, LAYERS, HEADS, LENGTH = 128, 2, 4, 64


class Block(nn.Module):
    """Attention, then an MLP, each on the normalized stream."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps [B T D] to [B T D]."""
        attn = nn.MultiHeadDotProductAttention(
            HEADS, use_bias=False, attention_fn=mc.linen.attention_fn, name="attn"
        )
        x = x + attn(nn.RMSNorm(name="attn_norm")(x), mask=mask, sow_weights=True)
        hidden = nn.Dense(4 * WIDTH, name="up")(nn.RMSNorm(name="mlp_norm")(x))
        return x + nn.Dense(WIDTH, name="down")(nn.silu(hidden))


class Model(nn.Module):
    """Bytes [B T] in, logits [B T 256] of the next byte out."""

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """Maps [B T] to [B T 256]."""
        places = nn.Embed(LENGTH, WIDTH, name="pos_embed")(jnp.arange(text.shape[1]))
        x = nn.Embed(256, WIDTH, name="embed")(text) + places[None]
        for i in range(LAYERS):
            x = Block(name=f"block_{i}")(x, nn.make_causal_mask(text))
        return nn.Dense(256, use_bias=False, name="lm_head")(nn.RMSNorm(name="norm")(x))


model = Model()
params = model.init(jax.random.key(SEED), jnp.zeros((1, LENGTH), jnp.int32))["params"]

# %% [markdown]
# ## Muon or AdamW
#
# Matrices are assigned to Muon. Embeddings, the output head, norms and biases are assigned to
# AdamW. The table prints the reason for each. To change a row, pass `overrides={pattern: None}` for
# AdamW, or `{pattern: mc.MuonDimensionNumbers(...)}` for Muon.

# %%
print(mc.routing_table(params, consistent_rms=0.2))

# %% [markdown]
# ## The train step
#
# **Optimizer:** `mc.muon`, an optax optimizer. With `consistent_rms=0.2`, its updates have the RMS
# of AdamW's updates, so one learning rate works for both. **Clip:** `mc.qk_clip` accepts
# the parameters after the update and the max logits. 100 is the threshold of Kimi K2.

# %%
BATCH, STEPS = 32, 200
schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 20, STEPS)
tx = mc.muon(schedule, weight_decay=0.1, consistent_rms=0.2)


def loss_fn(params, text):
    """Gives the mean loss in nats per byte, and what the heads have sown."""
    logits, sown = model.apply({"params": params}, text[:, :-1], mutable=["intermediates"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
    return losses.mean(), sown


@jax.jit
def train_step(params, opt_state, text):
    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, text)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    params, info = mc.qk_clip(params, stats, threshold=100.0)
    return params, opt_state, {"loss": loss, **mc.qk_clip_metrics(info)}


# %% [markdown]
# ## Train
#
# The data is the source code of a module of Python's standard library. The last tenth is for
# validation.

# %%
source = np.frombuffer(inspect.getsource(argparse).encode(), np.uint8).astype(np.int32)
seen, held_out = np.split(source, [9 * source.size // 10])
rng = np.random.default_rng(SEED)


def draw(text, starts):
    """Cuts [B T+1] pieces out of a text."""
    return text[starts[:, None] + np.arange(LENGTH + 1)]


test = draw(held_out, np.arange(0, held_out.size - LENGTH - 1, LENGTH))
test_loss = jax.jit(lambda params: loss_fn(params, test)[0])
opt_state, history, tested = tx.init(params), [], {0: test_loss(params)}
for i in range(1, STEPS + 1):
    starts = rng.integers(0, seen.size - LENGTH - 1, BATCH)
    params, opt_state, metrics = train_step(params, opt_state, draw(seen, starts))
    history.append(metrics)
    if i % 25 == 0:
        tested[i] = test_loss(params)
history, tested = jax.device_get((history, tested))
print({name: round(float(value), 3) for name, value in history[-1].items()})
print({step: round(float(loss), 3) for step, loss in tested.items()})
assert tested[STEPS] < 2.5

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1.6, 1))
steps = np.arange(1, STEPS + 1)
left.plot(steps, [m["loss"] for m in history], color=BLUE, linewidth=1, label="each batch")
left.plot(tested.keys(), tested.values(), "o-", color=ORANGE, label="held-out text")
left.set(xlabel="step", ylabel="loss, nats per byte", ylim=(0, 6.5))
left.set_title(f"From {tested[0]:.2f} to {tested[STEPS]:.2f} nats per byte on held-out text")
left.legend()
largest = [m["qk_clip/max_logit"] for m in history]
right.plot(steps, largest, color=BLUE)
right.axhline(100, color=GREY, linestyle="dashed", label="threshold")
right.set(xlabel="step", ylabel="largest attention logit of all heads", ylim=(0, 110))
right.set_title(f"Logits up to {max(largest):.0f}: nothing to clip")
right.legend(loc="center right")
plt.show()

# %% [markdown]
# ## Next
#
# In this short training of a small model, max logits stay far below the threshold, and QK-clip does
# not change the weights. The notebook `exploding_logits` shows a training that needs the clip,
# `newton_schulz` shows how Muon changes a matrix, and `sharding` runs a step on eight devices.
# `mc.muonclip(learning_rate)` is Muon and QK-clip as one optimizer. `docs/guides` has a page for
# Flax NNX, for Equinox and Haiku, and for scanned layers. `docs/qk_clip.md` has the layouts of
# other attention modules (grouped, latent, fused).

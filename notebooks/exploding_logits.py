# %% [markdown]
# # Exploding attention logits and QK-clip
#
# Figure 2 of the Kimi K2 report (arXiv 2507.20534) shows two trainings. Under plain Muon the
# largest attention logit exceeds 1000. Under MuonClip it rises to the threshold, stays there for a
# while, and then decreases without clipping. This notebook repeats the rise and the clip with a
# small model, a task that needs sharp attention, and a high learning rate. The decrease does not
# appear in its 400 steps.

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
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import muonclip_jax as mc

SEED = 0
BLUE, ORANGE, RED, GREY = "#2a6f97", "#e36414", "#c1121f", "#8d99ae"
plt.rcParams.update({"figure.dpi": 100, "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"axes.titlelocation": "left", "legend.frameon": False})
print(jax.devices())

# %% [markdown]
# ## The task and the model
#
# Each text is a random string, repeated once. To predict the second half, the model has to attend
# to the same position of the first half. The model has two layers of four heads. Its attention
# modules sow the max logit of each head, because they use `mc.linen.attention_fn`.

# %%
SYMBOLS, HALF, BATCH = 32, 16, 32  # alphabet, length of the string that comes twice, texts a step
WIDTH, LAYERS, HEADS = 64, 2, 4


class Model(nn.Module):
    """Symbols [B T] in, logits [B T V] of the next symbol out."""

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """Adds attention and an MLP to the stream, once a layer."""
        mask = nn.make_causal_mask(text)
        places = nn.Embed(2 * HALF, WIDTH, name="pos_embed")(jnp.arange(text.shape[1]))
        x = nn.Embed(SYMBOLS, WIDTH, name="embed")(text) + places[None]
        for i in range(LAYERS):
            attn = nn.MultiHeadDotProductAttention(
                HEADS, use_bias=False, attention_fn=mc.linen.attention_fn, name=f"attn_{i}"
            )
            x = x + attn(nn.RMSNorm(name=f"attn_norm_{i}")(x), mask=mask, sow_weights=True)
            hidden = nn.Dense(4 * WIDTH, name=f"up_{i}")(nn.RMSNorm(name=f"mlp_norm_{i}")(x))
            x = x + nn.Dense(WIDTH, name=f"down_{i}")(nn.silu(hidden))
        return nn.Dense(SYMBOLS, use_bias=False, name="lm_head")(nn.RMSNorm(name="norm")(x))


model = Model()


def draw(i):
    """Draws the texts of step i, [B 2·HALF]."""
    half = jax.random.randint(jax.random.key(i), (BATCH, HALF), 0, SYMBOLS)
    return jnp.concatenate([half, half], axis=1)


def loss_fn(params, text):
    """Gives the loss on the second half, and what the heads have sown."""
    logits, sown = model.apply({"params": params}, text[:, :-1], mutable=["intermediates"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
    return loss[:, HALF - 1 :].mean(), sown


# %% [markdown]
# ## The train step
#
# QK-clip is one additional line. An infinite threshold never clips, but still records max logits,
# so that both trainings run the same compiled program.

# %%
STEPS, LEARNING_RATE, THRESHOLD = 400, 0.02, 20.0
tx = mc.muon(LEARNING_RATE, weight_decay=0.1, consistent_rms=0.2)


@jax.jit
def train_step(params, opt_state, i, threshold):
    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, draw(i))
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    params, info = mc.qk_clip(params, stats, threshold=threshold)
    return params, opt_state, (loss, info.max_logits, info.gamma)


def train(threshold):
    """Gives the last parameters, then losses [step], largest logits and factors [step, head]."""
    params = model.init(jax.random.key(SEED), draw(0))["params"]
    opt_state, history = tx.init(params), []
    for i in range(STEPS):
        params, opt_state, seen = train_step(params, opt_state, i, threshold)
        history.append(seen)
    losses, max_logits, gammas = zip(*jax.device_get(history), strict=True)
    heads = ([np.concatenate(list(x.values())) for x in xs] for xs in (max_logits, gammas))
    return params, np.array(losses), *map(np.array, heads)


plain_params, plain_loss, plain_logits, _ = train(math.inf)
clipped_params, clipped_loss, clipped_logits, gammas = train(THRESHOLD)
print(f"plain Muon: largest logit {plain_logits.max():.0f}, last {plain_logits[-1].max():.0f}")
print(f"with the clip: largest logit {clipped_logits.max():.1f}")
assert plain_logits.max() > 4 * THRESHOLD
assert clipped_logits.max() < 1.5 * THRESHOLD

# %% [markdown]
# ## Max logits of the heads

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
for axes, logits, title in (
    (left, plain_logits, "Muon: {count} of 8 heads pass {tau:g}, up to {most:.0f}"),
    (right, clipped_logits, "Muon with QK-clip: held at {tau:g}, never above {most:.1f}"),
):
    axes.plot(logits[:, :HEADS], color=BLUE, linewidth=1.2, alpha=0.8)
    axes.plot(logits[:, HEADS:], color=ORANGE, linewidth=1.2, alpha=0.8)
    axes.axhline(THRESHOLD, color=RED, linestyle="dashed", linewidth=1)
    count, most = (logits > THRESHOLD).any(axis=0).sum(), logits.max()
    axes.set_title(title.format(count=count, tau=THRESHOLD, most=most))
    axes.set(xlabel="step", yscale="log")
left.set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
left.minorticks_off()
left.set_ylabel("largest attention logit of a head")
left.plot([], color=BLUE, label="heads of layer 1")
left.plot([], color=ORANGE, label="heads of layer 2")
left.plot([], color=RED, linestyle="dashed", label=f"threshold {THRESHOLD:g}")
left.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## The loss
#
# The clip does not increase the loss here. Both trainings are equal until the first head is
# clipped, and both learn the task. The remaining loss is noise from the high learning rate. The
# bold line is the geometric mean of ten steps.


# %%
def smooth(losses, width=10):
    """Averages the logarithm over some steps."""
    return np.exp(np.convolve(np.log(losses), np.ones(width) / width, mode="valid"))


first = int((gammas < 1).any(axis=1).argmax())
tails = [losses[-100:].mean() for losses in (plain_loss, clipped_loss)]
figure, axes = plt.subplots(figsize=(9, 3.2))
for losses, color, label in (
    (plain_loss, GREY, "Muon"),
    (clipped_loss, BLUE, "Muon with QK-clip"),
):
    axes.plot(losses, color=color, alpha=0.2, linewidth=0.8)
    axes.plot(np.arange(STEPS - 9) + 4.5, smooth(losses), color=color, label=label)
axes.axvline(first, color=RED, linestyle="dashed", linewidth=1, label=f"first clip, step {first}")
axes.set(xlabel="step", ylabel="loss, nats per symbol", yscale="log")
tails = "{:.4f} without and {:.4f} with the clip".format(*tails)
axes.set_title(f"Both learn the task; mean loss of the last 100 steps {tails}")
axes.legend()
plt.show()
np.testing.assert_allclose(plain_loss[: first + 1], clipped_loss[: first + 1], rtol=0.1)

# %% [markdown]
# ## What γ does
#
# If the max logit S of a head exceeds the threshold τ, QK-clip multiplies its query weights and its
# key weights by √γ, with γ = τ / S. The max logit of the same input becomes τ. Left: one clip of
# the exploded model. The first layer has exactly τ. The second layer differs slightly, because its
# input has changed. Right: the product of all γ of a head during the training with the clip. A
# single γ is a few percent below 1.

# %%
text = draw(STEPS)
loss_before, stats = loss_fn(plain_params, text)
once, info = mc.qk_clip(plain_params, stats, threshold=THRESHOLD)
loss_after, stats_after = loss_fn(once, text)
_, info_after = mc.qk_clip(once, stats_after, threshold=math.inf)
before, after, gamma = (
    np.concatenate(list(x.values())) for x in (info.max_logits, info_after.max_logits, info.gamma)
)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
heads = np.arange(before.size)
left.vlines(heads, after, before, color=GREY)
left.plot(heads, before, "o", color=ORANGE, label="before")
left.plot(heads, after, "o", color=BLUE, label="after")
left.axhline(THRESHOLD, color=RED, linestyle="dashed", linewidth=1)
for head in heads:
    left.annotate(f"γ {gamma[head]:.2f}", (head, before[head] + 3), ha="center", fontsize=8)
left.set_xticks(heads, [f"{i // HEADS + 1}.{i % HEADS + 1}" for i in heads])
left.set(xlabel="layer.head", ylabel="largest attention logit of a head")
left.set(xlim=(-0.6, before.size - 0.4), ylim=(0, before.max() * 1.12))
left.set_title(f"One clip; loss {loss_before:.4f} before, {loss_after:.4f} after")
left.legend()
right.plot(np.cumprod(gammas, axis=0)[:, :HEADS], color=BLUE, linewidth=1.2, alpha=0.8)
right.plot(np.cumprod(gammas, axis=0)[:, HEADS:], color=ORANGE, linewidth=1.2, alpha=0.8)
right.set(xlabel="step", ylabel="product of γ so far", yscale="log")
right.plot([], color=BLUE, label="heads of layer 1")
right.plot([], color=ORANGE, label="heads of layer 2")
right.legend(loc="lower left")
clips = gammas[gammas < 1]
right.set_title(f"{clips.size} clips, half of them by less than {1 - np.median(clips):.0%}")
plt.show()
print("first layer after the clip:", np.round(after[:HEADS], 3))
np.testing.assert_allclose(after[:HEADS][before[:HEADS] > THRESHOLD], THRESHOLD, rtol=1e-2)

# %% [markdown]
# # MuonClip for a model that you do not edit
#
# Muon needs the axes of each matrix. QK-clip needs the largest attention logit of each head, and
# the kernels of its queries and keys. `mc.analyze` reads all of it from the program of the model,
# for any names and any framework. `mc.with_max_logits` makes a loss return its max logits. The
# model does not change.

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
# ## Plain JAX, weights stored outputs first
#
# Equinox and PyTorch store a matrix as (outputs, inputs), and one weight holds all heads.

# %%
WIDTH, HEADS, LENGTH, VOCABULARY = 64, 4, 64, 256
HEAD_DIM = WIDTH // HEADS
TEXT = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)  # shapes are enough to analyze


def attend(query, key, value):
    """Causal attention: [B T N H] in and out."""
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) / HEAD_DIM**0.5
    mask = jnp.tri(query.shape[1], dtype=bool)[None, None]
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(mask, logits, -1e30)), value)


def outputs_first(params, text):
    """Maps [B T] to the logits of the next byte."""
    x = params["embedding"]["weight"][text]
    for p in params["layers"]:
        names = ("query_proj", "key_proj", "value_proj")
        qkv = (jnp.reshape(x @ p[n]["weight"].T, (*x.shape[:2], HEADS, HEAD_DIM)) for n in names)
        x = x + attend(*qkv).reshape(x.shape) @ p["output_proj"]["weight"].T
        x = x + jax.nn.gelu(x @ p["mlp_in"]["weight"].T) @ p["mlp_out"]["weight"].T
    return x @ params["unembed"]["weight"].T


def weight(*shape):
    """Returns the shape of a weight: nothing is computed."""
    return {"weight": jax.ShapeDtypeStruct(shape, jnp.float32)}


projections = ("query_proj", "key_proj", "value_proj", "output_proj")
layer = {name: weight(WIDTH, WIDTH) for name in projections}
layer |= {"mlp_in": weight(4 * WIDTH, WIDTH), "mlp_out": weight(WIDTH, 4 * WIDTH)}
shapes = {"embedding": weight(VOCABULARY, WIDTH), "layers": [layer, layer]}
shapes["unembed"] = weight(VOCABULARY, WIDTH)
print(mc.analyze(outputs_first, shapes, TEXT))

# %% [markdown]
# `inputs -> outputs` are axes of one matrix: `-1 -> -2` means stored outputs first. The last table
# lists the parameters whose names suggest another role.
#
# ## Flax, in the style of GPT-2
#
# Queries, keys and values are one kernel `c_attn`, outputs first, and the embedding is the head.


# %%
class Conv1D(nn.Module):
    """A dense layer with the name and the axes that the public port of GPT-2 has."""

    features: int

    @nn.compact
    def __call__(self, x):
        """Maps [... D] to [... F]."""
        init = nn.initializers.normal(0.02)
        kernel = self.param("kernel", init, (self.features, x.shape[-1]))
        return x @ kernel.T + self.param("bias", nn.initializers.zeros, (self.features,))


class Block(nn.Module):
    """Attention, then an MLP."""

    @nn.compact
    def __call__(self, x):
        """Maps [B T D] to [B T D]."""
        qkv = Conv1D(3 * WIDTH, name="c_attn")(nn.LayerNorm(name="ln_1")(x))
        heads = (part.reshape(*x.shape[:2], HEADS, -1) for part in jnp.split(qkv, 3, -1))
        x = x + Conv1D(WIDTH, name="c_proj")(attend(*heads).reshape(x.shape))
        hidden = nn.gelu(Conv1D(4 * WIDTH, name="c_fc")(nn.LayerNorm(name="ln_2")(x)))
        return x + Conv1D(WIDTH, name="mlp_c_proj")(hidden)


class GPT2(nn.Module):
    """Bytes [B T] in, logits [B T 256] of the next byte out."""

    @nn.compact
    def __call__(self, text):
        """Maps [B T] to [B T 256]."""
        embed = nn.Embed(VOCABULARY, WIDTH, name="wte")
        x = embed(text) + nn.Embed(LENGTH, WIDTH, name="wpe")(jnp.arange(text.shape[1]))[None]
        for i in range(2):
            x = Block(name=f"h_{i}")(x)
        return embed.attend(nn.LayerNorm(name="ln_f")(x))


gpt2 = GPT2()
print(mc.analyze(gpt2.apply, jax.eval_shape(gpt2.init, jax.random.key(SEED), TEXT), TEXT))


# %% [markdown]
# ## Flax, in the style of Gemma
#
# Kernels of einsums with the heads in front, keys and values in one array, two query heads for each
# key head, and logits that pass a soft cap.


# %%
class Einsum(nn.Module):
    """One kernel `w` and the product with it."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        """Multiplies."""
        return jnp.einsum(equation, x, self.param("w", nn.initializers.normal(0.1), self.shape))


class Gemma(nn.Module):
    """Bytes [B T] in, logits [B T 256] of the next byte out."""

    @nn.compact
    def __call__(self, text):
        """Maps [B T] to [B T 256]."""
        init = nn.initializers.normal(0.1)
        table = self.param("input_embedding", init, (VOCABULARY, WIDTH))
        x = table[text]
        for i in range(2):
            h = nn.RMSNorm(name=f"pre_attention_norm_{i}")(x)
            q = Einsum((HEADS, WIDTH, HEAD_DIM), name=f"q_einsum_{i}")("btd,ndh->btnh", h)
            kv = Einsum((2, HEADS // 2, WIDTH, HEAD_DIM), name=f"kv_einsum_{i}")
            k, v = kv("btd,cndh->cbtnh", h)
            q = q.reshape(*q.shape[:2], HEADS // 2, 2, HEAD_DIM)
            logits = 50 * jnp.tanh(jnp.einsum("btngh,bsnh->bngts", q, k) / 50)
            mask = jnp.tri(text.shape[1], dtype=bool)[None, None, None]
            mix = jax.nn.softmax(jnp.where(mask, logits, -1e30))
            out = jnp.einsum("bngts,bsnh->btngh", mix, v).reshape(*x.shape[:2], HEADS, HEAD_DIM)
            x = x + Einsum((HEADS, HEAD_DIM, WIDTH), name=f"attn_vec_{i}")("btnh,nhd->btd", out)
            h = nn.RMSNorm(name=f"pre_ffw_norm_{i}")(x)
            gate, up = Einsum((2, 128, WIDTH), name=f"gating_einsum_{i}")("btd,cfd->cbtf", h)
            x = x + Einsum((128, WIDTH), name=f"linear_{i}")("btf,fd->btd", nn.gelu(gate) * up)
        return nn.RMSNorm(name="final_norm")(x) @ table.T


gemma = Gemma()
params = gemma.init(jax.random.key(SEED), jnp.zeros(TEXT.shape, jnp.int32))
analysis = mc.analyze(gemma.apply, params, TEXT)
print(analysis)

# %% [markdown]
# ## Train it, without editing it
#
# `expect` is the number of attention layers of your model; the table above should show the same.
# The analysis replaces a head layout, because it has the axes of the heads. Max logits are taken
# before the soft cap.

# %%
STEPS, BATCH, THRESHOLD = 100, 16, 20.0


def loss_fn(params, text):
    """Returns the mean loss in nats per byte."""
    logits = jnp.asarray(gemma.apply(params, text[:, :-1]))
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


source = np.frombuffer(inspect.getsource(argparse).encode(), np.uint8).astype(np.int32)


def train(threshold):
    """Trains the model; returns the loss and the largest logit of each step."""
    loss_and_stats = mc.with_max_logits(loss_fn, expect=2)
    tx = mc.muonclip(0.02, layout=analysis, threshold=threshold)

    @jax.jit
    def step(params, state, text):
        (loss, stats), grads = jax.value_and_grad(loss_and_stats, has_aux=True)(params, text)
        updates, state = tx.update(grads, state, params, max_logits=stats)
        largest = jnp.max(jnp.stack([x.max() for x in jax.tree.leaves(stats)]))
        return optax.apply_updates(params, updates), state, (loss, largest)

    rng, now, state, history = np.random.default_rng(SEED), params, tx.init(params), []
    for _ in range(STEPS):
        starts = rng.integers(0, source.size - LENGTH - 1, BATCH)
        now, state, line = step(now, state, source[starts[:, None] + np.arange(LENGTH + 1)])
        history.append(line)
    return np.array(jax.device_get(history)).T


clipped, free = train(THRESHOLD), train(float("inf"))
for name, (loss, largest) in {"clipped": clipped, "not clipped": free}.items():
    print(f"{name}: loss {loss[-10:].mean():.2f}, largest logit {largest[-10:].max():.0f}")
assert clipped[1][-10:].max() < 1.5 * THRESHOLD < free[1].max()

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
for (loss, largest), color, label in ((free, GREY, "no clip"), (clipped, BLUE, "QK-clip")):
    left.plot(loss, color=color, label=label)
    right.plot(largest, color=color, label=label)
right.axhline(THRESHOLD, color=ORANGE, linestyle="dashed", label="threshold")
left.set(xlabel="step", ylabel="loss, nats per byte")
right.set(xlabel="step", ylabel="largest attention logit")
left.set_title("The model learns equally well")
right.set_title("and its logits stay at the threshold")
right.legend()
plt.show()

# %% [markdown]
# ## Next
#
# `print(analysis)` before you train: a wrong table is worse than an error. The page
# `docs/program.md` lists what `mc.analyze` cannot read, and what to do then. In a model that you
# can edit, sow the max logits instead, as the notebook `quick_start` does.

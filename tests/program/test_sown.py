"""Training with `with_max_logits` beside training with sown max logits, bit for bit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from tests.support.program_models import TOKENS

# A scale of 1 / 4 is exact, whether it is applied to queries or to logits.
HEADS, WIDTH, COLUMNS, DEPTH, VOCABULARY = 4, 16, 16, 2, 40
THRESHOLD = 2.0


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((HEADS, COLUMNS), name=n)(x) for n in ("query", "key", "value"))
        mc.linen.sow_max_logits(self, mc.max_attention_logit(q, k, is_causal=True))
        logits = jnp.einsum("bthk,bshk->bhts", q * COLUMNS**-0.5, k)
        logits = jnp.where(jnp.tri(x.shape[1], dtype=bool), logits, -1e30)
        out = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(logits), v)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(out)


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        for i in range(DEPTH):
            x = x + Attention(name=f"attn_{i}")(nn.LayerNorm()(x))
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(VOCABULARY)(x)


def loss_of(logits):
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), TOKENS[:, 1:, None], -1)
    return -picked.mean()


def trained(params, loss_fn, layout, numbers):
    """Trains for thirty steps; returns parameters, losses, max logits and clipped heads."""
    tx = mc.muon(0.02, muon_weight_dimension_numbers=numbers)
    grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    # Programs of their own: beside other sums, XLA would round products once.
    update = jax.jit(tx.update)
    clip = jax.jit(lambda p, stats: mc.qk_clip(p, stats, layout, threshold=THRESHOLD))
    state, seen, clipped = tx.init(params), [], 0
    for _ in range(30):
        (loss, stats), grads = grad(params)
        updates, state = update(grads, state, params)
        params, info = clip(optax.apply_updates(params, updates), stats)
        seen.append((loss, {path: info.max_logits[path] for path in sorted(info.max_logits)}))
        clipped += int(info.clipped_heads)
    return params, seen, clipped


@pytest.mark.nightly
def test_training_equals_training_with_sown_max_logits():
    model = Model()
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: 4.0 * x if "query" in str(path) else x, params
    )

    def sown(params):
        logits, state = model.apply({"params": params}, TOKENS, mutable=["intermediates"])
        return loss_of(logits), state["intermediates"]

    def plain(params):
        return loss_of(model.apply({"params": params}, TOKENS))

    analysis = mc.analyze(plain, params)
    numbers = analysis.dimension_numbers
    new = trained(params, mc.with_max_logits(plain, expect=DEPTH), analysis, numbers)
    old = trained(params, sown, mc.MultiHeadLayout(), numbers)
    jax.tree.map(np.testing.assert_array_equal, new, old)
    assert new[-1] > 60

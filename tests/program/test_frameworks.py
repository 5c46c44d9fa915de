"""Models of Linen, NNX, Equinox and Haiku, as their users write them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import muonclip_jax as mc
from tests.support.program_models import TOKENS

KEY = jax.random.key(0)
DEPTH, WIDTH, HEADS, VOCABULARY = 2, 16, 4, 40


def loss_of(logits, tokens):
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)
    return -picked.mean()


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        mask = nn.make_causal_mask(jnp.zeros(x.shape[:2]))
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attn")(h, h, mask=mask)
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x)))), None


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH, name="embed")
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(nn.remat(Block), length=DEPTH, **axes)(name="h")(embed(tokens), None)
        return embed.attend(nn.LayerNorm()(x))


def linen_case():
    model = Linen()
    params = jax.jit(model.init)(KEY, TOKENS)
    expected = {
        "params/embed/embedding": None,
        "params/h/attn/query/kernel": (-3, (-2, -1)),
        "params/h/attn/out/kernel": ((-3, -2), -1),
        "params/h/Dense_0/kernel": (-2, -1),
        "params/h/LayerNorm_0/scale": None,
        "params/h/attn/key/bias": None,
    }
    return lambda p, t: loss_of(model.apply(p, t), t), params, expected, ["h/attn"]


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, rngs=rngs, decode=False)
        self.up = nnx.Linear(WIDTH, 32, rngs=rngs)
        self.down = nnx.Linear(32, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.down(jax.nn.silu(self.up(x)))


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.first, self.second = NNXBlock(rngs), NNXBlock(rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.second(self.first(self.embed(tokens))))


def nnx_case():
    graph, params, rest = nnx.split(NNXModel(nnx.Rngs(0)), nnx.Param, ...)
    expected = {
        "embed/embedding": None,
        "first/attn/query/kernel": (-3, (-2, -1)),
        "second/attn/out/kernel": ((-3, -2), -1),
        "second/down/kernel": (-2, -1),
        "head/kernel": None,
        "first/norm/scale": None,
    }
    fn = lambda p, t: loss_of(nnx.merge(graph, p, rest)(t), t)  # noqa: E731
    return fn, params, expected, ["first/attn", "second/attn"]


def equinox_case():
    eqx: Any = pytest.importorskip("equinox")

    class Model(eqx.Module):
        embed: Any
        attn: list
        mlp: list
        norm: Any
        head: Any

        def __init__(self):
            keys = iter(jax.random.split(KEY, 8))
            self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=next(keys))
            self.attn = [eqx.nn.MultiheadAttention(HEADS, WIDTH, key=next(keys)) for _ in "ab"]
            self.mlp = [eqx.nn.MLP(WIDTH, WIDTH, 32, 1, key=next(keys)) for _ in "ab"]
            self.norm = eqx.nn.LayerNorm(WIDTH)
            self.head = eqx.nn.Linear(WIDTH, VOCABULARY, key=next(keys))

        def __call__(self, tokens):
            x = jax.vmap(self.embed)(tokens)
            for attn, mlp in zip(self.attn, self.mlp, strict=True):
                h = jax.vmap(self.norm)(x)
                x = x + attn(h, h, h, mask=jnp.tri(len(tokens), dtype=bool))
                x = x + jax.vmap(mlp)(x)
            return jax.vmap(self.head)(x)

    params, static = eqx.partition(Model(), eqx.is_inexact_array)
    expected = {
        "embed/weight": None,
        "attn/0/query_proj/weight": (-1, -2),
        "attn/1/output_proj/weight": (-1, -2),
        "mlp/0/layers/0/weight": (-1, -2),
        "head/weight": None,
        "norm/weight": None,
    }
    fn = lambda p, t: loss_of(jax.vmap(eqx.combine(p, static))(t), t)  # noqa: E731
    return fn, params, expected, ["attn/0", "attn/1"]


def haiku_case():
    hk = pytest.importorskip("haiku")

    def forward(tokens):
        x = hk.Embed(VOCABULARY, WIDTH)(tokens)
        for _ in range(DEPTH):
            h = hk.LayerNorm(-1, True, True)(x)
            init = hk.initializers.VarianceScaling(1.0)
            attention = hk.MultiHeadAttention(HEADS, 8, w_init=init, model_size=WIDTH)
            x = x + attention(h, h, h, mask=jnp.tri(tokens.shape[1])[None, None])
            x = x + hk.nets.MLP([32, WIDTH])(x)
        return hk.Linear(VOCABULARY)(x)

    model = hk.without_apply_rng(hk.transform(forward))
    expected = {
        "embed/embeddings": None,
        "multi_head_attention/query/w": (-2, -1),
        "multi_head_attention_1/linear/w": (-2, -1),
        "mlp/linear_0/w": (-2, -1),
        "linear/w": None,
        "layer_norm/scale": None,
    }
    params = jax.jit(model.init)(KEY, TOKENS)
    sites = ["multi_head_attention", "multi_head_attention_1"]
    return lambda p, t: loss_of(model.apply(p, t), t), params, expected, sites


CASES = {"linen": linen_case, "nnx": nnx_case, "equinox": equinox_case, "haiku": haiku_case}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    with jax.numpy_rank_promotion("allow"):
        fn, params, expected, sites = CASES[request.param]()
        return fn, params, expected, sites, mc.analyze(fn, params, TOKENS)


def test_roles(case):
    *_, expected, sites, analysis = case
    assert not [path for path, role in analysis.roles.items() if role.optimizer == "unknown"]
    for path, sides in expected.items():
        role = analysis.roles[path]
        found = tuple(role.dimension_numbers) if role.optimizer == "muon" else None
        assert found == sides, (path, role)
    assert [site.path for site in analysis.attention] == sites
    assert all(site.num_heads == site.num_kv_heads == HEADS for site in analysis.attention)
    assert not any(site.faults for site in analysis.attention)


def test_dimension_numbers_are_accepted_by_muon(case):
    _, params, *_, analysis = case
    tx = mc.muon(0.1, muon_weight_dimension_numbers=analysis.dimension_numbers)
    jax.eval_shape(tx.init, params)
    restored = mc.Analysis.from_json(analysis.to_json(), params)
    assert restored == analysis
    assert not restored.diff(analysis)
    trees = [jax.tree.leaves(a.dimension_numbers) for a in (analysis, restored)]
    assert trees[0] == trees[1] != []


def test_max_logits_and_clip(case):
    fn, params, _, sites, analysis = case
    with_stats = mc.with_max_logits(fn, expect=DEPTH)
    run = jax.jit(jax.value_and_grad(with_stats, has_aux=True))
    (loss, stats), grads = run(params, TOKENS)
    plain = jax.jit(jax.value_and_grad(fn))(params, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, (loss, grads), plain)
    tops = [np.asarray(x).reshape(-1, HEADS).max() for x in jax.tree.leaves(stats)]
    threshold = float(0.5 * max(tops))
    clipped, info = jax.jit(lambda p, s: mc.qk_clip(p, s, analysis, threshold=threshold))(
        params, stats
    )
    assert info.clipped_heads > 0
    # The first attention has the same inputs as before, so its heads are at the threshold.
    (_, after), _ = run(clipped, TOKENS)
    first = info.max_logits[sites[0]].reshape(-1, HEADS)[0]
    (x, *_) = jax.tree.leaves(after)
    top = np.asarray(x[0] if len(sites) == 1 else x).reshape(-1, HEADS).max(0)
    np.testing.assert_allclose(top, np.minimum(first, threshold), rtol=1e-4)


def test_linen_equals_sown_max_logits():
    """The statistic is the one that `sow_max_logits` computes by another product."""

    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            q, k, v = (nn.DenseGeneral((HEADS, 8), name=n)(x) for n in ("query", "key", "value"))
            out, top = mc.dot_product_attention(q, k, v, is_causal=True)
            mc.linen.sow_max_logits(self, top)
            return out.sum()

    x = jax.random.normal(KEY, (2, 6, WIDTH))
    params = Attention().init(KEY, x)
    fn = mc.with_max_logits(lambda p, x: Attention().apply({"params": p["params"]}, x), expect=1)
    _, stats = fn(params, x)
    sown = Attention().apply({"params": params["params"]}, x, mutable=["intermediates"])[1]
    np.testing.assert_allclose(stats["max_logits"], jax.tree.leaves(sown)[0], rtol=1e-6)

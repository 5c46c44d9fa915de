"""Multi-head latent attention: scaled columns, unchanged weights, and new logits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support import reference_mla
from tests.support.attention_cases import draw, same_bits

D, RANK, N, NOPE, ROPE, VALUE = 6, 5, 4, 3, 2, 4
X = draw(99, 2, 7, D)


FLAT, HEADS_FIRST = "inputs (heads head_dim)", "heads inputs head_dim"
BASE = mc.MLALayout(nope_dim=NOPE, rope_dim=ROPE, value_dim=VALUE)


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to write MLA, and the layout that describes it."""

    low_rank: bool = True
    bias: bool = False
    heads: int = N
    layout: mc.MLALayout = BASE

    def module(self, seed, inputs, width):
        kernel = 5 * draw(seed, inputs, self.heads, width)
        bias = draw(seed + 1, self.heads, width)
        if self.layout.kernel == HEADS_FIRST:
            kernel = kernel.swapaxes(0, 1)
        if self.layout.kernel == FLAT:
            kernel, bias = kernel.reshape(inputs, -1), bias.reshape(-1)
        return {"kernel": kernel, "bias": bias} if self.bias else {"kernel": kernel}

    def params(self, seed=0):
        layout = self.layout
        params: dict[str, Any] = {
            "kv_a": {"kernel": draw(seed + 4, D, RANK)},
            "k_rope": {"kernel": draw(seed + 5, D, layout.rope_dim)},
            layout.query: self.module(
                seed, RANK if self.low_rank else D, layout.nope_dim + layout.rope_dim
            ),
            layout.key_value: self.module(seed + 2, RANK, layout.nope_dim + layout.value_dim),
            "q_norm": {"scale": draw(seed + 6, RANK)},
            "out": {"kernel": draw(seed + 7, self.heads, VALUE, D)},
        }
        if self.low_rank:
            params["q_a"] = {"kernel": draw(seed + 8, D, RANK)}
        return params

    def logits(self, params):
        layout = self.layout
        return reference_mla.max_logits(
            X,
            params,
            heads=self.heads,
            nope=layout.nope_dim,
            rope=layout.rope_dim,
            query=layout.query,
            key_value=layout.key_value,
            rope_first=layout.rope_first,
            head_axis=-3 if layout.kernel == HEADS_FIRST else -2,
        )


FORMS = {
    "as Kimi K2": Form(),
    "biases": Form(bias=True),
    "flat": Form(layout=dataclasses.replace(BASE, kernel=FLAT)),
    "flat, biases": Form(bias=True, layout=dataclasses.replace(BASE, kernel=FLAT)),
    "direct query": Form(low_rank=False, layout=dataclasses.replace(BASE, query="q")),
    "direct query, flat, biases": Form(
        low_rank=False, bias=True, layout=dataclasses.replace(BASE, query="q", kernel=FLAT)
    ),
    "rope first": Form(bias=True, layout=dataclasses.replace(BASE, rope_first=True)),
    "rope first, flat": Form(layout=dataclasses.replace(BASE, rope_first=True, kernel=FLAT)),
    "heads first": Form(bias=True, layout=dataclasses.replace(BASE, kernel=HEADS_FIRST)),
    "keys alone": Form(layout=dataclasses.replace(BASE, value_dim=0, key_value="k_b")),
    "no rotary part": Form(layout=dataclasses.replace(BASE, rope_dim=0)),
    "heads equal to columns": Form(heads=NOPE + ROPE, bias=True),
}


def middle_threshold(s):
    """A threshold that half of the heads are above."""
    s = np.sort(s.max(0))
    return float(s[len(s) // 2 - 1 : len(s) // 2 + 1].mean())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_heads_reach_the_threshold_or_keep_their_logits(form, alpha):
    form = FORMS[form]
    params = form.params()
    before = form.logits(params)
    tau = middle_threshold(before)
    stats = {"max_logits": jnp.asarray(before, jnp.float32)}
    new, info = mc.qk_clip(params, stats, form.layout, threshold=tau, alpha=alpha)
    after = form.logits(new).max(0)
    assert info.clipped_heads == np.sum(before.max(0) > tau) > 0
    assert after.max() <= tau * (1 + 1e-5)
    np.testing.assert_allclose(after, np.minimum(before.max(0), tau), rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_values_rotary_key_latents_and_unclipped_heads_keep_their_bits(form):
    form = FORMS[form]
    params, layout = form.params(), form.layout
    below = np.arange(form.heads) % 2 == 0
    stats = {"max_logits": jnp.where(below, -3.0, 400.0)}
    new, _ = mc.qk_clip(params, stats, layout)
    for name in params.keys() - {layout.query, layout.key_value}:
        assert all(new[name][leaf] is params[name][leaf] for leaf in params[name])
    for name in (layout.query, layout.key_value):
        width = layout.nope_dim + (layout.rope_dim if name == layout.query else layout.value_dim)
        for leaf in params[name]:
            axis = 1 if leaf == "kernel" and layout.kernel != HEADS_FIRST else 0
            if layout.kernel == FLAT:
                views = [np.asarray(t[name][leaf]) for t in (params, new)]
                views = [v.reshape(*v.shape[:-1], form.heads, width) for v in views]
            else:
                views = [np.moveaxis(np.asarray(t[name][leaf]), axis, -2) for t in (params, new)]
            old, scaled = views
            assert same_bits(old[..., below, :], scaled[..., below, :])
            if name == layout.key_value:
                assert same_bits(old[..., layout.nope_dim :], scaled[..., layout.nope_dim :])


@pytest.mark.parametrize("rope_first", [False, True])
@pytest.mark.parametrize("alpha", [0.3, 0.5])
def test_factors_are_those_of_the_paper(alpha, rope_first):
    layout = dataclasses.replace(BASE, rope_first=rope_first)
    ones = {
        "q_b": {"kernel": jnp.ones((1, 2, NOPE + ROPE))},
        "kv_b": {"kernel": jnp.ones((1, 2, NOPE + VALUE))},
    }
    new, info = mc.qk_clip(ones, {"max_logits": jnp.asarray([400.0, 1.0])}, layout, alpha=alpha)
    query, key_value = new["q_b"]["kernel"][0, 0], new["kv_b"]["kernel"][0, 0]
    expected = [0.25**alpha] * NOPE + [0.25] * ROPE
    expected = expected[NOPE:] + expected[:NOPE] if rope_first else expected
    np.testing.assert_allclose(query, expected, rtol=2e-7)
    np.testing.assert_allclose(key_value, [0.25 ** (1 - alpha)] * NOPE + [1] * VALUE, rtol=2e-7)
    np.testing.assert_array_equal(info.gamma[""], [0.25, 1])


@pytest.mark.parametrize("shared_key", ["query", "group", "exact"])
def test_rules_for_shared_keys_have_no_effect(shared_key):
    params, stats = Form().params(), {"max_logits": jnp.asarray([400.0, 10, 200, 30])}
    expected, _ = mc.qk_clip(params, stats, BASE)
    actual, _ = mc.qk_clip(params, stats, BASE, shared_key=shared_key)
    assert all(map(same_bits, jax.tree.leaves(actual), jax.tree.leaves(expected)))


@pytest.mark.parametrize("stat_axis", [0, -1])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("form", ["biases", "flat, biases", "direct query, flat, biases"])
def test_stacked_layers_equal_single_layers(form, axis, stat_axis):
    form = FORMS[form]
    layers = [form.params(seed) for seed in (0, 20, 40)]
    maxima = [100 + 300 * draw(seed, 2, N) for seed in (1, 2, 3)]
    layout = dataclasses.replace(form.layout, stack_axis=axis, stat_stack_axis=stat_axis)
    stacked = jax.tree.map(lambda *x: jnp.stack(x, axis), *layers)
    new, _ = mc.qk_clip(stacked, {"max_logits": jnp.stack(maxima, stat_axis)}, layout)
    for i, (layer, s) in enumerate(zip(layers, maxima, strict=True)):
        alone, _ = mc.qk_clip(layer, {"max_logits": s}, form.layout)
        for name in (layout.query, layout.key_value):
            for leaf in alone[name]:
                assert same_bits(jnp.take(new[name][leaf], i, axis=axis), alone[name][leaf])


def test_adapters_reach_the_threshold():
    params = Form(low_rank=False).params()
    layout = dataclasses.replace(BASE, query="q_b")
    a, b = draw(1, D, 2), draw(2, 2, N, NOPE + ROPE)
    params["q_b"]["lora"] = {"lora_a": a, "lora_b": b}
    new, _ = mc.qk_clip(params, {"max_logits": jnp.full(N, 400.0)}, layout)
    factor = np.asarray([0.5] * NOPE + [0.25] * ROPE, np.float32)
    assert same_bits(new["q_b"]["lora"]["lora_a"], a)
    np.testing.assert_array_equal(new["q_b"]["lora"]["lora_b"], b * factor[None, None])


# Errors.

NAMES = "query='q_b', key_value='kv_b'"


def text_of(params, stats, layout=BASE):
    with pytest.raises(ValueError, match="qk_clip: ") as error:
        mc.qk_clip(params, stats, layout)
    return str(error.value)


def kernels(query, key_value):
    return {"q_b": {"kernel": np.ones(query)}, "kv_b": {"kernel": np.ones(key_value)}}


def kernels_named(query, key_value):
    q, kv = kernels((5, N * (NOPE + ROPE)), (5, N * (NOPE + VALUE))).values()
    return {query: q, key_value: kv}


@pytest.mark.parametrize(
    ("layout", "query", "key_value", "fault"),
    [
        (
            BASE,
            (5, 4, 6),
            (5, 4, 7),
            "q_b/kernel (5, 4, 6) does not have heads of nope_dim 3 + rope_dim 2 = 5 columns.",
        ),
        (
            BASE,
            (5, 4, 5),
            (5, 4, 6),
            "kv_b/kernel (5, 4, 6) does not have heads of nope_dim 3 + value_dim 4 = 7 columns.",
        ),
        (
            dataclasses.replace(BASE, kernel=FLAT),
            (5, 21),
            (5, 28),
            "q_b/kernel (5, 21) does not have heads of nope_dim 3 + rope_dim 2 = 5 columns.",
        ),
        (BASE, (5, 8, 5), (5, 4, 7), "q_b/kernel (5, 8, 5) has 8 heads, but its max_logits has 4."),
        (
            BASE,
            (5, 4, 5),
            (5, 2, 7),
            "kv_b/kernel (5, 2, 7) has 2 heads, but its max_logits has 4.",
        ),
        (
            dataclasses.replace(BASE, kernel=FLAT),
            (5, 20),
            (5, 56),
            "kv_b/kernel (5, 56) has 8 heads, but its max_logits has 4.",
        ),
    ],
)
def test_wrong_widths_and_heads_raise(layout, query, key_value, fault):
    text = text_of(
        {"attn": kernels(query, key_value)}, {"attn": {"max_logits": jnp.ones(4)}}, layout
    )
    assert text == f"qk_clip: 1 module does not fit the layout {layout}.\n  attn: {fault}"
    assert str(layout).startswith(f"MLALayout({NAMES}")


def test_a_direct_query_raises_with_a_proposal():
    form = FORMS["direct query"]
    text = text_of({"attn": form.params()}, {"attn": {"max_logits": jnp.ones(N)}})
    assert "attn: no module 'q_b'; there are" in text
    assert "Pass layout=mc.MLALayout(query='q', key_value='kv_b', nope_dim=3," in text


@pytest.mark.parametrize(
    ("names", "query", "key_value"),
    [
        (
            "q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj",
            "q_b_proj",
            "kv_b_proj",
        ),
        ("q_norm q_up_proj kv_norm kv_up_proj", "q_up_proj", "kv_up_proj"),
    ],
)
def test_names_of_other_libraries_are_proposed(names, query, key_value):
    params = {name: {"kernel": np.ones((N * VALUE, RANK))} for name in names.split()}
    params |= kernels_named(query, key_value)
    text = text_of({"attn": params}, {"attn": {"max_logits": jnp.ones(N)}})
    assert f"Pass layout=mc.MLALayout(query={query!r}, key_value={key_value!r}," in text


def test_norms_of_latent_vectors_do_not_raise():
    params = {**kernels((5, 4, 5), (5, 4, 7)), "q_norm": {"scale": np.ones(5)}}
    mc.qk_clip(params, {"max_logits": jnp.ones(4)}, BASE)
    strict = dataclasses.replace(BASE, qk_norm=("q_norm",))
    assert "'q_norm' normalizes queries or keys." in text_of(
        params, {"max_logits": jnp.ones(4)}, strict
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"query": "a", "key_value": "a"}, "query and key_value must be two modules"),
        ({"nope_dim": 0}, "nope_dim must be at least 1"),
        ({"rope_dim": -1}, "rope_dim must be at least 0"),
        ({"value_dim": -1}, "value_dim must be at least 0"),
        (
            {"kernel": "inputs 3 heads head_dim"},
            "has '3'; allowed are 'inputs', 'heads', 'head_dim'",
        ),
    ],
)
def test_impossible_layouts_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **settings)


def test_layouts_can_be_static_arguments():
    def f(params, stats, layout):
        return mc.qk_clip(params, stats, layout)

    # A function of this test alone: jit keeps one cache for all who jit the same one.
    clip = jax.jit(f, static_argnums=2)
    clip(Form().params(), {"max_logits": jnp.full(N, 400.0)}, dataclasses.replace(BASE))
    clip(Form().params(), {"max_logits": jnp.full(N, 400.0)}, dataclasses.replace(BASE))
    assert clip._cache_size() == 1

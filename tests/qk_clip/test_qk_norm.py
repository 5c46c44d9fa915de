"""A norm between projection and logits cancels the clip: found by name, declared, or by effect."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc

N, H = 2, 4
STATS = {"attn": {"max_logits": jnp.array([400.0, 7.0])}}
DEFAULT: Any = mc.MultiHeadLayout()
LATENT = mc.MLALayout(nope_dim=2, rope_dim=2, value_dim=2)


def clip(children, layout=DEFAULT, **settings):
    """Clips one attention module that has these children too."""
    kernel = {"kernel": jnp.ones((8, N, H))}
    names = {"value", *layout.modules}
    params = {"attn": {**dict.fromkeys(names, kernel), **children}}
    return mc.qk_clip(params, STATS, layout, **settings)


def assert_clipped_as_without(children, layout=DEFAULT):
    """Checks that the clip leaves the children alone, and that they change nothing."""
    (clipped, _), (expected, _) = clip(children, layout), clip({}, layout)
    chex.assert_trees_all_equal(clipped["attn"], {**expected["attn"], **children})


def norms(*names, leaf="scale"):
    return {name: {leaf: jnp.ones(H)} for name in names}


NAMED = """
q_norm k_norm query_norm key_norm query_ln key_ln qnorm knorm q_layernorm k_layernorm norm_q norm_k
_query_norm _key_norm q_ln k_ln ln_q ln_k query_layernorm key_layernorm q_rms_norm k_rms_norm
QNorm_0 KNorm_0 QKNorm q_rmsnorm rms_k queryNorm norm_added_q norm_added_k img_attn_norm_query
qk_norm qk_layernorm norm_queries keys_norm q_l2norm layernorm_qk qkv_norm QueryRMSNorm
q_bn k_bn q_gn gn_k query_batchnorm KeyGroupNorm_0 bn_query
""".split()
UNNAMED = "RMSNorm_0 LayerNorm_1 norm norm1 ln_1 layer_norm rms rmsnorm attn_norm bn_0".split()
ELSEWHERE = """
q_a_layernorm kv_a_layernorm kv_norm q_a_norm q_lora_norm v_norm value_norm out_norm o_norm pre_norm
input_layernorm post_norm sub_ln inner_attn_ln norm_v normal_init rotary query_scale
""".split()


@pytest.mark.parametrize("name", NAMED)
def test_a_norm_of_queries_or_keys_raises(name):
    with pytest.raises(ValueError, match=f"attn: '{name}' normalizes queries or keys"):
        clip(norms(name))


@pytest.mark.parametrize("name", UNNAMED)
def test_norm_with_an_ambiguous_name_raises_until_declared(name):
    with pytest.raises(ValueError, match=f"attn: '{name}' may normalize queries or keys") as error:
        clip(norms(name))
    assert f"such as qk_norm=('{name}',)" in str(error.value)
    clip(norms(name), mc.MultiHeadLayout(qk_norm=()))
    with pytest.raises(ValueError, match=f"attn: '{name}' normalizes queries or keys"):
        clip(norms(name), mc.MultiHeadLayout(qk_norm=(name,)))


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_norm_of_something_else_is_accepted(name):
    assert_clipped_as_without(norms(name))


@pytest.mark.parametrize(
    ("children", "path"),
    [
        ({"norm": norms("query_norm", "key_norm")}, "norm/query_norm"),
        ({"scale_query": norms("norm")}, "scale_query/norm"),
        ({"attention_core": norms("q_norm")}, "attention_core/q_norm"),
        ({"q_norm_scale": jnp.ones(H)}, "q_norm_scale"),
        ({"query": {"kernel": jnp.ones((8, N, H)), **norms("norm")}}, "query/norm"),
        ({"key": {"kernel": jnp.ones((8, N, H)), **norms("layernorm")}}, "key/layernorm"),
    ],
)
def test_norms_are_found_inside_children(children, path):
    with pytest.raises(ValueError, match=f"attn: '{path}' normalizes queries or keys"):
        clip(children)


def test_scales_of_queries_and_keys_may_be_norms():
    with pytest.raises(ValueError, match="attn: 'q_scale' may normalize"):
        clip({"q_scale": jnp.ones(H), "k_scale": jnp.ones(H)})
    clip({"q_scale": jnp.ones(H)})  # a temperature


@pytest.mark.parametrize("name", ["q_gain", "gamma_k", "qn", "gq", "g_q", "k_g"])
def test_gains_of_queries_and_keys_may_be_norms(name):
    with pytest.raises(ValueError, match=f"attn: '{name}' may normalize"):
        clip({name: jnp.ones(H)})
    clip({name: jnp.ones(H)}, mc.MultiHeadLayout(qk_norm=()))
    clip({name: {"kernel": jnp.ones((8, N, H))}}, mc.MultiHeadLayout())  # a gate of queries


@pytest.mark.parametrize("shape", [(), (N,)])
def test_one_factor_for_each_head_is_a_temperature(shape):
    clip({"qk_scale": jnp.ones(shape)})
    kernel = {"kernel": jnp.ones((3, 8, N, H))}
    attn = {**dict.fromkeys(("query", "key"), kernel), "qk_scale": jnp.ones((3, *shape))}
    stats = {"attn": {"max_logits": jnp.ones((3, N))}}
    mc.qk_clip({"attn": attn}, stats)
    for gains in (jnp.ones((3, H)), jnp.ones((3, N, H))):
        clip({"qk_scale": gains[0]}, mc.MultiHeadLayout(qk_norm=()))
        with pytest.raises(ValueError, match="attn: 'qk_scale' may normalize"):
            clip({"qk_scale": gains[0]})
        with pytest.raises(ValueError, match="attn: 'qk_scale' may normalize"):
            mc.qk_clip({"attn": {**attn, "qk_scale": gains}}, stats)


def test_gains_of_flat_kernels_may_be_norms():
    flat = {"kernel": jnp.ones((8, N * H))}
    layout = mc.MultiHeadLayout(kernel="inputs (heads head_dim)", head_dim=H)
    for gains in (jnp.ones((N, H)), jnp.ones(N * H)):  # sqk of nGPT
        params = {"attn": {"query": flat, "key": flat, "sqk": gains}}
        with pytest.raises(ValueError, match="attn: 'sqk' may normalize"):
            mc.qk_clip(params, STATS, layout)


def test_nested_attention_modules_have_their_own_norms():
    kernel = {"kernel": jnp.ones((8, N, H))}
    inner = {**dict.fromkeys(("query", "key", "value"), kernel), **norms("q_norm")}
    params = {"attn": {**dict.fromkeys(("query", "key", "value"), kernel), "cross": inner}}
    stats = {"attn": {**STATS["attn"], "cross": STATS["attn"]}}
    with pytest.raises(ValueError, match="1 module does not fit") as error:
        mc.qk_clip(params, stats)
    assert "attn/cross: 'q_norm' normalizes" in str(error.value)


def test_all_norms_of_all_layers_are_listed_once():
    kernel = {"kernel": jnp.ones((8, N, H))}
    layer = {**dict.fromkeys(("query", "key", "value"), kernel), **norms("q_norm", "k_norm")}
    params = {f"layers_{i}": layer for i in range(12)}
    stats = {name: STATS["attn"] for name in params}
    with pytest.raises(ValueError, match="12 modules") as error:
        mc.qk_clip(params, stats)
    lines = str(error.value).splitlines()
    assert [line.partition(":")[0] for line in lines[1:3]] == ["  layers_0 and 11 more layers"] * 2
    assert len(lines) == 4


@pytest.mark.parametrize("name", ["q_norm", "kv_norm", "q_a_layernorm", "RMSNorm_0", "norm"])
def test_norms_of_latent_vectors_are_accepted(name):
    assert_clipped_as_without(norms(name), LATENT)


@pytest.mark.parametrize("name", ["k_norm", "qk_norm", "key_layernorm"])
def test_norms_of_keys_of_latent_attention_raise(name):
    with pytest.raises(ValueError, match=f"attn: '{name}' normalizes queries or keys"):
        clip(norms(name), LATENT)


def test_missing_declared_norm_raises():
    with pytest.raises(ValueError, match="attn: no child 'q_nrom', which qk_norm names"):
        clip(norms("q_norm"), mc.MultiHeadLayout(qk_norm=("q_nrom",)))


@pytest.mark.parametrize("name", ["q_norm", "RMSNorm_0"])
def test_watching_accepts_norms(name):
    params, info = clip(norms(name), threshold=float("inf"))
    assert (info.max_logit, info.clipped_heads) == (400, 0)
    np.testing.assert_array_equal(params["attn"]["query"]["kernel"], jnp.ones((8, N, H)))
    with pytest.raises(ValueError, match="normaliz"):
        jax.jit(lambda tau: clip(norms(name), threshold=tau))(float("inf"))


# A clip that does not reach the logits is seen without names.


def run(max_logit, steps=12):
    """Trains one head whose max logit is a function of kernel and step."""
    params = {"attn": {n: {"kernel": jnp.ones((8, 1, H))} for n in ("query", "key")}}
    ever, counts = None, []
    clip = jax.jit(mc.qk_clip)
    for step in range(steps):
        size = jnp.sum(params["attn"]["query"]["kernel"] * params["attn"]["key"]["kernel"])
        stats = {"attn": {"max_logits": max_logit(size / (8 * H), step)[None]}}
        params, info = clip(params, stats, ever_clipped=ever)
        ever = mc.heads_ever_clipped(info, ever)
        counts.append(info.stuck_heads)
    return counts, params


def test_a_head_whose_logits_stay_is_stuck_while_its_weights_shrink():
    counts, params = run(lambda size, step: jnp.float32(130.0))
    assert counts[0] is None
    assert [int(count) for count in counts[1:]] == [1] * 11
    assert float(params["attn"]["query"]["kernel"].max()) < 0.25


def test_a_head_that_the_clip_reaches_is_not_stuck():
    # Starts at 400, and every update makes its logits 5 % larger.
    counts, params = run(lambda size, step: 400 * size * 1.05**step)
    assert [int(count) for count in counts[1:]] == [0] * 11
    assert float(params["attn"]["query"]["kernel"].max()) > 0.35


def test_stuck_heads_are_a_metric_if_counted():
    _, info = clip({})
    assert "qk_clip/stuck_heads" not in mc.qk_clip_metrics(info)
    ever = mc.heads_ever_clipped(info)
    _, info = clip({}, ever_clipped=ever)
    assert mc.qk_clip_metrics(info, ever)["qk_clip/stuck_heads"] == 1
    _, info = clip({}, ever_clipped=ever, where=False)
    assert info.stuck_heads == 0
    with pytest.raises(ValueError, match=r"attn: got \(3,\), expected \(2,\)"):
        clip({}, ever_clipped={"attn": jnp.zeros(3, bool)})


def test_shapes_of_an_info_start_a_scan():
    kernel = {"kernel": jnp.ones((8, N, H))}
    params = {"attn": dict.fromkeys(("query", "key"), kernel)}
    stats = {"attn": {"max_logits": jnp.array([[400.0, 7.0], [50.0, 7.0]])}}

    def step(carry, stats):
        params, ever = carry
        params, info = mc.qk_clip(params, stats, ever_clipped=ever)
        return (params, mc.heads_ever_clipped(info, ever)), info.stuck_heads

    _, shapes = jax.eval_shape(mc.qk_clip, params, jax.tree.map(lambda x: x[0], stats))
    start = mc.heads_ever_clipped(shapes)
    assert start["attn"].tolist() == [False, False]
    (_, ever), stuck = jax.lax.scan(step, (params, start), stats)
    assert ever["attn"].tolist() == [True, False]
    assert np.asarray(stuck).tolist() == [0, 0]


def test_infos_stacked_by_a_scan_count_heads():
    kernel = {"kernel": jnp.ones((3, 8, N, H))}
    params = {"attn": dict.fromkeys(("query", "key"), kernel)}

    def step(params, maxima):
        return mc.qk_clip(params, {"attn": {"max_logits": maxima}})

    maxima = jnp.full((5, 3, N), 7.0).at[1, 2, 0].set(400.0).at[4, 2, 0].set(200.0)
    _, infos = jax.lax.scan(step, params, maxima)
    ever = mc.heads_ever_clipped(infos)
    expected = np.zeros((3, N), bool)
    expected[2, 0] = True
    np.testing.assert_array_equal(ever["attn"], expected)
    before = {"attn": jnp.zeros((3, N), bool).at[0, 1].set(True)}
    assert int(mc.heads_ever_clipped(infos, before)["attn"].sum()) == 2
    fraction = mc.qk_clip_metrics(infos, ever)["qk_clip/ever_clipped_fraction"]
    np.testing.assert_allclose(fraction, 1 / 6, rtol=1e-6)

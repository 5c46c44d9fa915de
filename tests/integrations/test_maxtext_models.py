"""The integration with MaxText on the parameters of MaxText's models."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from muonclip_jax.integrations.maxtext.max_logits import at_attention
from muonclip_jax.integrations.maxtext.settings import check, head_layout
from tests.support import golden_tables
from tests.support.maxtext_stand_in import NOPE, Q_RANK, ROPE, VALUE, D, F, N, config

L, V, E, KV_RANK = 3, 32, 5, 7  # layers, vocabulary, experts, rank of keys and values
Numbers = mc.MuonDimensionNumbers

# Release 0.2.5, models/deepseek.py, scanned over axis 1, and beside each parameter the dimension
# numbers of utils/muon_utils.py with muon_include_routers=false.
DEEPSEEK = {
    "token_embedder/embedding": ((V, D), None),
    "decoder/decoder_norm/scale": ((D,), None),
    "decoder/logits_dense/kernel": ((D, V), None),
    "decoder/moe_layers/pre_self_attention_layer_norm/scale": ((D, L), None),
    "decoder/moe_layers/self_attention/wq_a/kernel": ((D, L, Q_RANK), Numbers((0,), (-1,))),
    "decoder/moe_layers/self_attention/q_norm/scale": ((Q_RANK, L), None),
    "decoder/moe_layers/self_attention/wq_b/kernel": (
        (Q_RANK, L, N, NOPE + ROPE),
        Numbers((0,), (-2, -1)),
    ),
    "decoder/moe_layers/self_attention/wkv_a/kernel": (
        (D, L, KV_RANK + ROPE),
        Numbers((0,), (-1,)),
    ),
    "decoder/moe_layers/self_attention/kv_norm/scale": ((KV_RANK, L), None),
    "decoder/moe_layers/self_attention/wkv_b/kernel": (
        (KV_RANK, L, N, NOPE + VALUE),
        Numbers((0,), (-2, -1)),
    ),
    "decoder/moe_layers/self_attention/out/kernel": ((N, L, VALUE, D), Numbers((0, -2), (-1,))),
    "decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/gate/kernel": ((D, L, E), None),
    "decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wi_0": ((E, L, D, F), Numbers((-2,), (-1,))),
    "decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wo": ((E, L, F, D), Numbers((-2,), (-1,))),
}
ATTENTION = "decoder/moe_layers/self_attention"


def tree(leaves):
    return golden_tables.CONTAINERS["nested dict"](list(leaves.items()))


@pytest.fixture(scope="module")
def deepseek():
    rng = np.random.default_rng(0)
    params = {
        path: rng.normal(size=shape).astype(np.float32) for path, (shape, _) in DEEPSEEK.items()
    }
    return tree(params), tree({path: numbers for path, (_, numbers) in DEEPSEEK.items()})


def test_the_numbers_of_maxtext_keep_layers_apart(deepseek):
    params, numbers = deepseek
    found = {
        row.path: row.optimizer if row.optimizer == "adamw" else tuple(row)[3:6]
        for row in mc.routing_table(params, numbers).rows
    }
    assert found[f"{ATTENTION}/wq_b/kernel"] == (L, Q_RANK, N * (NOPE + ROPE))
    assert found[f"{ATTENTION}/wkv_b/kernel"] == (L, KV_RANK, N * (NOPE + VALUE))
    assert found[f"{ATTENTION}/out/kernel"] == (L, N * VALUE, D)
    assert found["decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wi_0"] == (E * L, D, F)
    for path, (_, given) in DEEPSEEK.items():
        assert (found[path] == "adamw") == (given is None)


def test_the_arguments_of_maxtext_are_ours(deepseek):
    params, numbers = deepseek
    tx = mc.muon(
        learning_rate=lambda step: 1e-3 / (1 + step),
        eps=1e-8,
        mu_dtype=None,
        beta=0.95,
        weight_decay=0.1,
        muon_weight_dimension_numbers=numbers,
        consistent_rms=0.2,
        ns_coeffs=(3.4445, -4.7750, 2.0315),
        ns_steps=5,
        adam_b1=0.9,
        adam_b2=0.95,
        adam_eps_root=0.0,
        adam_weight_decay=0.1,
    )
    updates, _ = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize("wrapped", [False, True], ids=["NNX", "Linen, under params"])
def test_each_layer_and_head_is_clipped_on_its_own(deepseek, wrapped):
    params, _ = deepseek
    max_logits = np.full((L, 2, N), 50.0, np.float32)
    max_logits[1, 0, 2], max_logits[2, 1, 0] = 400.0, -5.0
    stats = at_attention(tree({f"{ATTENTION}/attention_op/max_logits": max_logits}))
    layout = head_layout(config(attention_type="mla"))
    wrap = (lambda p: {"params": p}) if wrapped else (lambda p: p)
    clipped, info = jax.jit(lambda p, s: mc.qk_clip(wrap(p), s, layout))(params, stats)
    expected = np.ones((L, N))
    expected[1, 2] = 0.25
    (gamma,) = info.gamma.values()
    np.testing.assert_array_equal(gamma, expected)
    new = (clipped["params"] if wrapped else clipped)["decoder"]["moe_layers"]["self_attention"]
    old = params["decoder"]["moe_layers"]["self_attention"]
    ratio = new["wq_b"]["kernel"] / old["wq_b"]["kernel"]
    np.testing.assert_allclose(ratio[:, 1, 2, :NOPE], 0.5, rtol=1e-6)
    np.testing.assert_allclose(ratio[:, 1, 2, NOPE:], 0.25, rtol=1e-6)
    ratio = new["wkv_b"]["kernel"] / old["wkv_b"]["kernel"]
    np.testing.assert_allclose(ratio[:, 1, 2, :NOPE], 0.5, rtol=1e-6)
    np.testing.assert_array_equal(ratio[:, 1, 2, NOPE:], 1.0)


LATENT = {"attention_type": "mla", "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
LATENT |= {"v_head_dim": 128}
MODELS = [
    ("maxtext_llama3", {}, {"decoder/layers/self_attention": (3, 32)}),
    ("maxtext_llama3_unscanned", {}, {f"decoder/layers_{i}/self_attention": (32,) for i in (0, 1)}),
    ("maxtext_mixtral", {}, {"decoder/layers/self_attention": (3, 32)}),
    (
        "maxtext_gpt_oss",
        {},
        {f"decoder/layers/layers_{i}/GptOssAttention": (3, 64) for i in (0, 1)},
    ),
    (
        "maxtext_kimi_k2",
        LATENT,
        {f"decoder/{x}_layers/self_attention": (n, 64) for x, n in (("dense", 1), ("moe", 3))},
    ),
    (
        "maxtext_deepseek3",
        LATENT,
        {f"decoder/{x}_layers/self_attention": (n, 128) for x, n in (("dense", 2), ("moe", 3))},
    ),
]


@pytest.mark.parametrize(("model", "settings", "modules"), MODELS, ids=[m[0] for m in MODELS])
def test_the_layout_fits_the_model(model, settings, modules):
    params, layout = golden_tables.read(model).params(), head_layout(config(**settings))
    recorded = {
        f"{path}/attention_op/max_logits": jax.ShapeDtypeStruct((*s[:-1], 2, s[-1]), jnp.float32)
        for path, s in modules.items()
    }
    stats = at_attention(tree(recorded))
    _, info = jax.eval_shape(lambda p, s: mc.qk_clip(p, s, layout), params, stats)
    assert {path: gamma.shape for path, gamma in info.gamma.items()} == modules


def test_a_query_without_low_rank_is_recognized():
    shapes = {f"{ATTENTION}/query/kernel": (D, L, N, NOPE + ROPE)}
    shapes[f"{ATTENTION}/wkv_b/kernel"] = (KV_RANK, L, N, NOPE + VALUE)
    params = tree({path: np.ones(shape, np.float32) for path, shape in shapes.items()})
    stats = tree({f"{ATTENTION}/max_logits": np.full((L, 2, N), 200.0, np.float32)})
    layout = head_layout(config(attention_type="mla", q_lora_rank=0))
    _, info = jax.eval_shape(lambda p, s: mc.qk_clip(p, s, layout), params, stats)
    assert info.gamma[ATTENTION].shape == (L, N)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn_logits_soft_cap": 50.0}, "Set attn_logits_soft_cap=0.0"),
        ({"use_qk_norm": True}, "Set use_qk_norm=false"),
        ({"trainable_parameters_mask": ["mlp"]}, "frozen parameters"),
        ({"lora": types.SimpleNamespace(enable_lora=True)}, "frozen parameters"),
        ({"fused_qkv": True}, "Set fused_qkv=false"),
        ({"share_kv_projections": True}, r"install\(alpha=1\)"),
    ],
)
def test_settings_under_which_the_clip_is_wrong_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        check(config(**settings))
    check(config())
    check(config(use_qk_norm=True, attention_type="mla"))
    check(config(share_kv_projections=True), alpha=1)

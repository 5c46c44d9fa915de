"""The recipes of docs/recipes.md, on trees with the names and shapes that the frameworks have."""

import math
import types

import chex
import jax
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support.pages import run_page

PAGE = "recipes.md"
D, L, N, K, H, F, V, E = 16, 3, 4, 2, 8, 24, 32, 5  # width, layers, heads, key heads, ...
NOPE, ROPE, VALUE, Q_RANK, KV_RANK = 6, 4, 5, 12, 7
Numbers = mc.MuonDimensionNumbers


def tree(shapes):
    """Nested dicts of arrays out of {path: shape}."""
    result, rng = {}, np.random.default_rng(0)
    for path, shape in shapes.items():
        *folders, name = path.split("/")
        place = result
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = rng.normal(size=shape).astype(np.float32)
    return result


def matrices(params, numbers=None, **arguments):
    """By path, "adamw" or the matrices of a leaf: how many, inputs, outputs."""
    rows = mc.routing_table(params, numbers, **arguments).rows
    return {r.path: r.optimizer if r.optimizer == "adamw" else tuple(r)[3:6] for r in rows}


def clipped_heads(params, stats, layout):
    _, info = jax.jit(lambda p, s: mc.qk_clip(p, s, layout))(params, stats)
    return info.clipped_heads


# --- MaxText at commit e591f30 --------------------------------------------------------------------

# models/deepseek.py, layers/attention_mla.py, layers/moe.py; scanned over axis 1, and beside each
# leaf what utils/muon_utils.py, `transform_logic`, gives for it.
MAXTEXT = {
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
    "decoder/moe_layers/DeepSeekMoeBlock_0/shared_experts/wi_0/kernel": (
        (D, L, F),
        Numbers((0,), (-1,)),
    ),
}
ATTENTION = "decoder/moe_layers/self_attention"


@pytest.fixture(scope="module")
def maxtext():
    params = tree({path: shape for path, (shape, _) in MAXTEXT.items()})
    # The router is the one leaf where the page departs from MaxText.
    flat = mc.routing_table(params).rows
    numbers = jax.tree.structure(params).unflatten([MAXTEXT[row.path][1] for row in flat])
    return params, numbers


def test_the_numbers_of_maxtext_keep_layers_apart(maxtext):
    params, numbers = maxtext
    found = matrices(params, numbers)
    assert found[f"{ATTENTION}/wq_b/kernel"] == (L, Q_RANK, N * (NOPE + ROPE))
    assert found[f"{ATTENTION}/wkv_b/kernel"] == (L, KV_RANK, N * (NOPE + VALUE))
    assert found[f"{ATTENTION}/out/kernel"] == (L, N * VALUE, D)
    assert found["decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wi_0"] == (E * L, D, F)
    assert found["decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/gate/kernel"] == "adamw"
    for path, (_, given) in MAXTEXT.items():
        assert (found[path] == "adamw") == (given is None)


def test_by_names_alone_the_layers_of_maxtext_are_a_side_of_the_matrix():
    query = tree({"self_attention/query/kernel": (D, L, N, H), "mlp/wi_0/kernel": (D, L, F)})
    assert matrices(query) == {
        "self_attention/query/kernel": (D, L, N * H),
        "mlp/wi_0/kernel": (D, L, F),
    }


def test_the_arguments_of_maxtext_are_ours(maxtext):
    params, numbers = maxtext
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
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_tree_all_finite(updates)


def maxtext_clip(params, max_logits, q_rank=Q_RANK):
    config = types.SimpleNamespace(
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
        q_lora_rank=q_rank,
        param_scan_axis=1,
        qk_clip_threshold=100.0,
    )
    kept = {"self_attention": {"attention_op": {"max_logits": max_logits}}}
    clip = run_page(PAGE)["maxtext_clip"]
    return jax.jit(lambda p, s: clip(p, s, config))(params, {"decoder": {"moe_layers": kept}})


@pytest.mark.parametrize("wrapped", [False, True], ids=["NNX", "Linen, under params"])
def test_the_clip_for_maxtext_takes_each_layer_and_head_on_its_own(maxtext, wrapped):
    params, _ = maxtext
    max_logits = np.full((L, 2, N), 50.0, np.float32)
    max_logits[1, 0, 2], max_logits[2, 1, 0] = 400.0, -5.0
    clipped, info = maxtext_clip({"params": params} if wrapped else params, max_logits)
    clipped = clipped["params"] if wrapped else clipped
    expected = np.ones((L, N))
    expected[1, 2] = 0.25
    (gamma,) = info.gamma.values()
    np.testing.assert_array_equal(gamma, expected)
    before, after = (t["decoder"]["moe_layers"]["self_attention"] for t in (params, clipped))
    ratio = after["wq_b"]["kernel"] / before["wq_b"]["kernel"]
    np.testing.assert_allclose(ratio[:, 1, 2, :NOPE], 0.5, rtol=1e-6)
    np.testing.assert_allclose(ratio[:, 1, 2, NOPE:], 0.25, rtol=1e-6)
    ratio = after["wkv_b"]["kernel"] / before["wkv_b"]["kernel"]
    np.testing.assert_allclose(ratio[:, 1, 2, :NOPE], 0.5, rtol=1e-6)
    np.testing.assert_array_equal(ratio[:, 1, 2, NOPE:], 1.0)


def test_the_clip_for_maxtext_knows_a_query_without_low_rank():
    shapes = {f"{ATTENTION}/query/kernel": (D, L, N, NOPE + ROPE)}
    shapes[f"{ATTENTION}/wkv_b/kernel"] = (KV_RANK, L, N, NOPE + VALUE)
    _, info = maxtext_clip(tree(shapes), np.full((L, 2, N), 200.0), q_rank=0)
    assert info.clipped_heads == L * N


def test_other_attention_of_maxtext_is_multi_head_on_axis_1():
    shapes = {f"{ATTENTION}/query/kernel": (D, L, N, H), f"{ATTENTION}/key/kernel": (D, L, K, H)}
    stats = {"decoder": {"moe_layers": {"self_attention": {"max_logits": np.full((L, N), 200.0)}}}}
    assert clipped_heads(tree(shapes), stats, mc.MultiHeadLayout(stack_axis=1)) == L * N


# --- Levanter 1.2 at commit 9263f81, haliax 1.4.dev453 --------------------------------------------

# layers/attention.py, `Attention.init`, and models/llama.py, stacked; haliax keeps an array as
# the first child of its name.
LEVANTER = {
    "embeddings/token_embeddings/weight/0": (V, D),
    "transformer/layers/stacked/self_attn/q_proj/weight/0": (L, K, N // K, H, D),
    "transformer/layers/stacked/self_attn/k_proj/weight/0": (L, K, H, D),
    "transformer/layers/stacked/self_attn/v_proj/weight/0": (L, K, H, D),
    "transformer/layers/stacked/self_attn/o_proj/weight/0": (L, D, N, H),
    "transformer/layers/stacked/mlp/gate_proj/weight/0": (L, F, D),
    "transformer/layers/stacked/mlp/up_proj/weight/0": (L, F, D),
    "transformer/layers/stacked/mlp/down_proj/weight/0": (L, D, F),
    "transformer/layers/stacked/input_layernorm/weight/0": (L, D),
    "transformer/norm/weight/0": (D,),
    "lm_head/weight/0": (V, D),
}


@pytest.mark.parametrize("outputs_first", [None, True])
def test_kernels_of_levanter_are_inputs_by_outputs(outputs_first):
    params = tree(LEVANTER)
    found = matrices(params, outputs_first=outputs_first)
    layer = "transformer/layers/stacked"
    assert found == {
        "embeddings/token_embeddings/weight/0": "adamw",
        f"{layer}/self_attn/q_proj/weight/0": (L, D, N * H),
        f"{layer}/self_attn/k_proj/weight/0": (L, D, K * H),
        f"{layer}/self_attn/v_proj/weight/0": (L, D, K * H),
        f"{layer}/self_attn/o_proj/weight/0": (L, N * H, D),
        f"{layer}/mlp/gate_proj/weight/0": (L, D, F),
        f"{layer}/mlp/up_proj/weight/0": (L, D, F),
        f"{layer}/mlp/down_proj/weight/0": (L, F, D),
        f"{layer}/input_layernorm/weight/0": "adamw",
        "transformer/norm/weight/0": "adamw",
        "lm_head/weight/0": "adamw",
    }


def test_the_clip_for_levanter_joins_groups_and_heads():
    weights = tree({"query": (L, K, N // K, H, D), "key": (L, K, H, D)})
    query, key = weights["query"], weights["key"]
    max_logits = np.full((L, 2, N), 50.0)
    max_logits[1, 0, 3] = 400.0  # the second query head of key head 1
    clip = jax.jit(run_page(PAGE)["levanter_clip"])
    new_query, new_key, info = clip(query, key, max_logits)
    expected = np.ones((L, K, N // K))
    expected[1, 1, 1] = 0.25
    np.testing.assert_array_equal(new_query, query * expected[..., None, None])
    np.testing.assert_array_equal(new_key, key)
    assert info.clipped_heads == 1


# --- Loops of one's own ---------------------------------------------------------------------------


def test_the_loops_of_the_page_train_and_see_every_head():
    page = run_page(PAGE)
    metrics = page["metrics"]
    assert 4.0 < metrics["loss"] < 7.0  # random bytes: log 256 is 5.5
    assert math.isfinite(metrics["qk_clip/max_logit"])
    assert metrics["qk_clip/clipped_heads"] == metrics["qk_clip/skipped_modules"] == 0

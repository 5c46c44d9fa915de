"""The recipes of docs/recipes.md, on trees with the names and shapes that the frameworks have."""

import math

import jax
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support.pages import run_page

PAGE = "recipes.md"
D, L, N, K, H, F, V, E = 16, 3, 4, 2, 8, 24, 32, 5  # width, layers, heads, key heads, ...
Q_RANK, KV_RANK = 12, 7


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


# --- EasyDeL 0.3.0 at commit 090a03b --------------------------------------------------------------

# modules/llama, modules/deepseek_v3, layers/linears/_linear.py and _linear_moe.py, layers/norms.
EASYDEL = {
    "model/embed_tokens/embedding": ((V, D), "adamw"),
    "model/layers/0/self_attn/q_proj/kernel": ((D, N * H), (1, D, N * H)),
    "model/layers/0/self_attn/o_proj/kernel": ((N * H, D), (1, N * H, D)),
    "model/layers/0/mlp/gate_proj/kernel": ((D, F), (1, D, F)),
    "model/layers/1/mlp/gate/kernel": ((D, E), "adamw"),
    "model/layers/1/mlp/experts/gate_proj/kernel": ((E, D, F), (E, D, F)),
    "model/layers/0/input_layernorm/kernel": ((D,), "adamw"),
    "model/norm/kernel": ((D,), "adamw"),
    "lm_head/kernel": ((D, V), "adamw"),
}


def test_names_are_enough_for_easydel():
    found = matrices(tree({path: shape for path, (shape, _) in EASYDEL.items()}))
    assert found == {path: expected for path, (_, expected) in EASYDEL.items()}


@pytest.mark.parametrize(
    ("shapes", "layout"),
    [
        (
            {"q_proj/kernel": (D, N * H), "k_proj/kernel": (D, K * H)},
            mc.MultiHeadLayout(
                query="q_proj", key="k_proj", kernel="inputs (heads head_dim)", head_dim=H
            ),
        ),
        (
            {
                "q_b_proj/kernel": (Q_RANK, N * (128 + 64)),
                "kv_b_proj/kernel": (KV_RANK, N * (128 + 128)),
            },
            mc.MLALayout(
                nope_dim=128,
                rope_dim=64,
                value_dim=128,
                query="q_b_proj",
                key_value="kv_b_proj",
                kernel="inputs (heads head_dim)",
            ),
        ),
    ],
    ids=["heads", "latent"],
)
def test_layouts_for_easydel_fit_its_kernels(shapes, layout):
    stats = {"attn": {"max_logits": np.full((2, N), 200.0)}}
    assert clipped_heads({"attn": tree(shapes)}, stats, layout) == N


# --- Loops of one's own ---------------------------------------------------------------------------


def test_the_loops_of_the_page_train_and_see_every_head():
    page = run_page(PAGE)
    metrics = page["metrics"]
    assert 4.0 < metrics["loss"] < 7.0  # random bytes: log 256 is 5.5
    assert math.isfinite(metrics["qk_clip/max_logit"])
    assert metrics["qk_clip/clipped_heads"] == metrics["qk_clip/skipped_modules"] == 0

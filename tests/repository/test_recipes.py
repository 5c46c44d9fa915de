"""The recipes of docs/recipes.md, on trees with the names and shapes that the frameworks have."""

import math

import jax
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support.pages import OPTIONAL, run_page

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


@pytest.mark.parametrize("package", OPTIONAL)
def test_the_loops_of_other_libraries_train_and_see_every_head(package):
    pytest.importorskip(package)
    metrics = run_page(PAGE)[f"{package}_metrics"]
    assert 4.0 < metrics["loss"] < 7.0
    assert math.isfinite(metrics["qk_clip/max_logit"])
    assert metrics["qk_clip/clipped_heads"] == metrics["qk_clip/skipped_modules"] == 0

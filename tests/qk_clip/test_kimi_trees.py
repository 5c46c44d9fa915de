"""Kimi K3 and Kimi Linear: gated MLA without rotary positions beside KDA layers.

64 columns of each query head meet a key that all heads share, as rotary columns do, but nothing is
rotated. For the clip they are `rope_dim`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support import golden_tables
from tests.support.attention_cases import draw, same_bits

FLAT, OUTPUTS_FIRST = "inputs (heads head_dim)", "(heads head_dim) inputs"


def _layout(query, **fields):
    sizes = {"nope_dim": 128, "rope_dim": 64, "value_dim": 128}
    return mc.MLALayout(query=query, key_value="kv_b_proj", **sizes, **fields)


TORCH = {"kernel": OUTPUTS_FIRST, "scaled_leaves": ("weight", "bias")}
# The table, the layout, its latent attention, number of heads, and inputs of the queries.
MODELS = {
    "kimi_k3_dotted": (_layout("q_b_proj", **TORCH), 96, 1536),
    "kimi_k3_port": (_layout("q_b_proj", kernel=FLAT), 96, 1536),
    "kimi_linear_dotted": (_layout("q_proj", **TORCH), 32, 2304),
    "easydel_kimi_linear": (_layout("q_proj", kernel=FLAT), 32, 2304),
}
each_model = pytest.mark.parametrize("name", MODELS)


def _latent_modules(table):
    ends = tuple(f"kv_b_proj{dot}{leaf}" for dot in "./" for leaf in ("weight", "kernel"))
    found = [row.path for row in table.rows if row.path.endswith(ends)]
    return [path.replace(".", "/").rsplit("/", 2)[0] for path in found]


@each_model
def test_the_clip_finds_the_latent_attention_alone(name):
    table, (layout, heads, _) = golden_tables.read(name), MODELS[name]
    modules = _latent_modules(table)
    stats = {
        f"{path}/max_logits": jax.ShapeDtypeStruct((2, heads), jnp.float32) for path in modules
    }
    new, info = jax.eval_shape(lambda p, s: mc.qk_clip(p, s, layout), table.params(), stats)
    assert {*info.gamma} == {*modules}
    assert jax.tree.map(lambda x: x.shape, new) == jax.tree.map(lambda x: x.shape, table.params())


@each_model
def test_per_head_splits_the_latent_attention_alone(name):
    table, (layout, heads, n_in) = golden_tables.read(name), MODELS[name]
    whole = mc.routing_table(table.params(), **table.arguments)
    split = mc.routing_table(table.params(), per_head=layout, **table.arguments)
    changed = {
        after.path: ", ".join(map(str, after.parts))
        for before, after in zip(whole.rows, split.rows, strict=True)
        if before.parts != after.parts
    }
    half = f"{heads} heads x 512 x 128"
    expected = {layout.query: f"{heads} heads x {n_in} x 192", "kv_b_proj": f"{half}, {half}"}
    assert changed == {
        f"{path}/{child}/{layout.scaled_leaves[0]}": shown
        for path in _latent_modules(table)
        for child, shown in expected.items()
    }


@pytest.mark.parametrize("name", ["kimi_k3_dotted", "kimi_linear_dotted"])
def test_per_head_splits_kda_too_where_a_layout_names_it(name):
    table, (layout, heads, _) = golden_tables.read(name), MODELS[name]
    projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    kda = mc.MultiHeadLayout(**projections, head_dim=128, **TORCH)
    split = mc.routing_table(table.params(), per_head=(layout, kda), **table.arguments)
    shown = {row.path: ", ".join(map(str, row.parts)) for row in split.rows}
    of_kda = [path.removesuffix("/A_log") for path in shown if path.endswith("/A_log")]
    assert of_kda
    for path in of_kda:
        assert all(f"{heads} heads x" in shown[f"{path}/{x}/weight"] for x in projections.values())
    half = f"{heads} heads x 512 x 128"
    for path in _latent_modules(table):
        assert shown[f"{path}/kv_b_proj/weight"] == f"{half}, {half}"


# A small model of both kinds of layers.

D, RANK, HEADS, NOPE, SHARED, VALUE = 12, 5, 4, 3, 2, 4
TAU = 30.0


def _params():
    def kernel(seed, *shape, scale=1.0):
        return {"kernel": scale * draw(seed, *shape)}

    latent = {
        "q_a_proj": kernel(0, D, RANK),
        "q_a_layernorm": {"weight": jnp.ones(RANK)},
        "q_b_proj": kernel(1, RANK, HEADS * (NOPE + SHARED), scale=6.0),
        "kv_a_proj_with_mqa": kernel(2, D, RANK + SHARED),
        "kv_a_layernorm": {"weight": jnp.ones(RANK)},
        "kv_b_proj": kernel(3, RANK, HEADS * (NOPE + VALUE), scale=6.0),
        "g_proj": kernel(4, D, HEADS * VALUE),
        "o_proj": kernel(5, HEADS * VALUE, D),
    }
    kda = {name: kernel(6 + i, D, D) for i, name in enumerate(("q_proj", "k_proj", "v_proj"))}
    kda |= {"A_log": draw(9, HEADS), "dt_bias": draw(10, D), "q_conv1d": kernel(11, 4, 1, D)}
    return {"layers": {"0": {"self_attn": kda}, "3": {"self_attn": latent}}}


def _logits(params, x):
    """Max logit of each head in float64: [nope | shared] columns, without rotation and norms."""
    p = {
        name: np.asarray(child["kernel"], np.float64)
        for name, child in params["layers"]["3"]["self_attn"].items()
        if "kernel" in child
    }
    q = (x @ p["q_a_proj"] @ p["q_b_proj"]).reshape(len(x), HEADS, NOPE + SHARED)
    latent = x @ p["kv_a_proj_with_mqa"]
    k = (latent[:, :RANK] @ p["kv_b_proj"]).reshape(len(x), HEADS, NOPE + VALUE)[..., :NOPE]
    own = np.einsum("thn,shn->hts", q[..., :NOPE], k)
    shared = np.einsum("thr,sr->hts", q[..., NOPE:], latent[:, RANK:])
    return np.max(np.tril(own + shared, 0) + np.triu(np.full(len(x), -np.inf), 1), axis=(1, 2))


def test_the_clip_brings_gated_latent_attention_to_the_threshold():
    layout = mc.MLALayout(
        nope_dim=NOPE,
        rope_dim=SHARED,
        value_dim=VALUE,
        query="q_b_proj",
        key_value="kv_b_proj",
        kernel=FLAT,
    )
    params, x = _params(), np.asarray(draw(20, 7, D), np.float64)
    before = _logits(params, x)
    stats = {"layers": {"3": {"self_attn": {"max_logits": jnp.asarray(before, jnp.float32)}}}}
    new, info = mc.qk_clip(params, stats, layout, threshold=TAU)
    assert 0 < info.clipped_heads <= HEADS
    np.testing.assert_allclose(_logits(new, x), np.minimum(before, TAU), rtol=1e-5)
    latent = "layers", "3", "self_attn"
    for path, old in jax.tree_util.tree_leaves_with_path(params):
        names = tuple(key.key for key in path)
        is_clipped = names[:3] == latent and names[3] in ("q_b_proj", "kv_b_proj")
        assert is_clipped or same_bits(_at(new, names), old)


def _at(tree, names):
    for name in names:
        tree = tree[name]
    return tree

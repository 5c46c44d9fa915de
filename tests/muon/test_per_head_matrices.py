"""`per_head` makes matrices of a parameter, by a head layout or by an analysis."""

import jax
import jax.numpy as jnp
import optax
import pytest

import muonclip_jax as mc
from tests.support.per_head_cases import CASES, FLAT
from tests.support.program_models import FAMILIES

# What is printed.


def _kernels(**shapes):
    return {name: {"kernel": jax.ShapeDtypeStruct(s, jnp.float32)} for name, s in shapes.items()}


def _matrices(params, per_head, **settings):
    rows = mc.routing_table(params, per_head=per_head, **settings).rows
    return {row.path: ", ".join(map(str, row.parts)) for row in rows}


def test_the_table_shows_heads():
    params = {"attn": _kernels(q_b=(64, 12 * 128), kv_b=(64, 12 * 192), out=(12 * 64, 64))}
    layout = mc.MLALayout(nope_dim=128, rope_dim=0, value_dim=64, kernel=FLAT)
    table = mc.routing_table(params, per_head=layout)
    row = next(row for row in table.rows if row.path == "attn/q_b/kernel")
    assert (row.num_matrices, row.n_in, row.n_out, row.scale) == (12, 64, 128, 2**0.5)
    assert "12 heads x 64 x 128, 12 heads x 64 x 64  1.414, 1" in str(table)
    assert "1 x 768 x 64" in str(table)


def test_the_table_shows_pairs():
    params = {"attn": _kernels(query=(8, 4, 2), key=(8, 2, 2))}
    found = _matrices(params, mc.MultiHeadLayout(heads_per_matrix=2))
    assert found["attn/query/kernel"] == "2 x 2 heads x 8 x 4"
    assert found["attn/key/kernel"] == "1 x 2 heads x 8 x 4"


# What is left alone.

KDA = {"A_log": jnp.zeros(4), "q_conv1d": {"kernel": jnp.zeros((4, 1, 32))}}
Q_AND_K = _kernels(q_proj=(16, 32), k_proj=(16, 32), v_proj=(16, 32))
HYBRID = mc.MultiHeadLayout(query="q_proj", key="k_proj", value="v_proj", kernel=FLAT, head_dim=8)


def test_linear_attention_of_the_same_names_is_left_whole():
    params = {"0": {"self_attn": {**Q_AND_K, **KDA}}, "1": {"self_attn": Q_AND_K}}
    found = _matrices(params, HYBRID)
    assert found["1/self_attn/q_proj/kernel"] == "4 heads x 16 x 8"
    assert found["0/self_attn/q_proj/kernel"] == "1 x 16 x 32"
    reason = {r.path: r.reason for r in mc.routing_table(params, per_head=HYBRID).rows}
    assert "not per head: 'A_log'" in reason["0/self_attn/q_proj/kernel"]


def test_linear_attention_is_split_if_a_layout_is_for_it_alone():
    latent = _kernels(q_proj=(16, 32), kv_b_proj=(8, 64))
    params = {"0": {"self_attn": {**Q_AND_K, **KDA}}, "1": {"self_attn": latent}}
    mla = mc.MLALayout(
        nope_dim=8, rope_dim=0, value_dim=8, query="q_proj", key_value="kv_b_proj", kernel=FLAT
    )
    assert _matrices(params, mla)["0/self_attn/q_proj/kernel"] == "1 x 16 x 32"
    assert _matrices(params, (mla, HYBRID))["0/self_attn/q_proj/kernel"] == "4 heads x 16 x 8"


def test_an_indexer_is_left_whole():
    """DeepSeek's and GLM-5's sparse attention: the indexer projects the same latent queries."""
    indexer = _kernels(wq_b=(8, 32), wk=(16, 16), weights_proj=(16, 2))
    params = {"attn": {**_kernels(wq_b=(8, 48), wkv_b=(8, 64)), "indexer": indexer}}
    layout = mc.MLALayout(
        nope_dim=8, rope_dim=4, value_dim=8, query="wq_b", key_value="wkv_b", kernel=FLAT
    )
    found = _matrices(params, layout)
    assert found["attn/wq_b/kernel"] == "4 heads x 8 x 12"
    assert found["attn/indexer/wq_b/kernel"] == "1 x 8 x 32"


def test_overrides_and_adamw_win():
    case, fixed = CASES["flat"], mc.MuonDimensionNumbers(-2, -1)
    params = case.tree(lambda kernel: jax.ShapeDtypeStruct(kernel.shape, jnp.float32))
    overrides = {"attn/query/kernel": fixed, "attn/key/kernel": None}
    found = _matrices(params, case.layout, overrides=overrides)
    assert found == {
        "attn/query/kernel": "1 x 6 x 12",
        "attn/key/kernel": "",
        "attn/value/kernel": "2 heads x 6 x 3",
    }


# What does not fit.

BAD = {
    "no module": (
        _kernels(up=(8, 8)),
        mc.MultiHeadLayout(),
        r"per_head matches no parameter: no module has 'query' and 'key'",
    ),
    "width": (
        {"attn": _kernels(query=(8, 10), key=(8, 9))},
        mc.MultiHeadLayout(kernel=FLAT, head_dim=3),
        r"attn: query/kernel \(8, 10\) does not divide into .* with head_dim=3",
    ),
    "latent width": (
        {"attn": _kernels(q_b=(8, 12), kv_b=(8, 13))},
        mc.MLALayout(nope_dim=2, rope_dim=1, value_dim=2, kernel=FLAT),
        r"attn: kv_b/kernel \(8, 13\) does not have heads of nope_dim 2 \+ value_dim 2 = 4 columns",
    ),
    "key heads": (
        {"attn": _kernels(query=(8, 4, 2), key=(8, 3, 2))},
        mc.MultiHeadLayout(),
        r"attn: key/kernel \(8, 3, 2\) has 3 key heads, which do not fit the 4 heads",
    ),
    "rank": (
        {"attn": _kernels(query=(8, 8), key=(8, 8))},
        mc.MultiHeadLayout(),
        r"attn: query/kernel \(8, 8\) has fewer axes than 'inputs heads head_dim'",
    ),
    "stack": (
        {"attn": _kernels(query=(2, 8, 4, 2), key=(8, 4, 2))},
        mc.MultiHeadLayout(),
        r"unequal numbers of stack axes",
    ),
    "value": (
        {"attn": _kernels(query=(8, 4, 2), key=(8, 4, 2))},
        mc.MultiHeadLayout(value="value"),
        r"attn: value='value' is no child",
    ),
    "value width": (
        {"attn": _kernels(query=(8, 8), key=(8, 8), value=(8, 6))},
        mc.MultiHeadLayout(value="value", kernel=FLAT, head_dim=2),
        r"attn: value/kernel \(8, 6\) does not divide into .* with 4 heads, as its keys have",
    ),
    "pairs": (
        {"attn": _kernels(query=(8, 4, 2), key=(8, 1, 2))},
        mc.MultiHeadLayout(heads_per_matrix=2),
        r"attn: key/kernel \(8, 1, 2\) has 1 adjacent heads, .* of heads_per_matrix=2",
    ),
    "pairs in groups": (
        {"attn": _kernels(qkv=(8, 16))},
        mc.FusedQKVLayout(head_dim=2, num_kv_heads=2, order="interleaved", heads_per_matrix=2),
        r"attn: qkv/kernel \(8, 16\) has 2, 1, 1 adjacent heads",
    ),
    "fused": (
        {"attn": _kernels(qkv=(8, 16))},
        mc.FusedQKVLayout(head_dim=2, num_kv_heads=3),
        r"attn: qkv/kernel \(8, 16\) has 8 heads of head_dim 2, expected queries, 3 keys",
    ),
    "gates in a flat kernel": (
        {"attn": _kernels(query=(8, 16), key=(8, 8))},
        mc.MultiHeadLayout(kernel=FLAT, head_dim=2, query_dim=2),
        r"attn: query/kernel \(8, 16\): a flat kernel with query_dim=2 does not show its number",
    ),
    "name of the kernel": (
        {"attn": {"query": {"w": jnp.zeros((8, 4, 2))}, "key": {"w": jnp.zeros((8, 4, 2))}}},
        mc.MultiHeadLayout(),
        r"attn: query has w, expected one 'kernel'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_layout_that_does_not_fit_raises(name):
    params, layout, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        mc.routing_table(params, per_head=layout)
    assert "routing_table: per_head" in str(error.value)
    assert "Pass " in str(error.value)


def test_a_part_without_attention_is_accepted_if_a_mask_hides_the_rest():
    layout, up = mc.MultiHeadLayout(), jax.ShapeDtypeStruct((8, 8), jnp.float32)
    mc.routing_table({"up": up, "attn": optax.MaskedNode()}, per_head=layout)
    with pytest.raises(ValueError, match="per_head matches no parameter"):
        mc.routing_table({"up": up, "bias": None}, per_head=layout)  # Equinox without a bias


@pytest.mark.usefixtures("no_typecheck")
@pytest.mark.parametrize("per_head", ["query", True, (), 3])
def test_muon_takes_layouts_alone(per_head):
    with pytest.raises(TypeError, match="muon: per_head must be a head layout"):
        mc.muon(0.1, per_head=per_head)


# An analysis.


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("gpt_scanned", mc.MultiHeadLayout(query="q", key="k")),
        ("llama", mc.MultiHeadLayout(query="q", key="k")),
        (
            "gemma",
            mc.MultiHeadLayout(
                query="q",
                key="kv",
                kernel="heads inputs head_dim",
                key_kernel="2 heads inputs head_dim",
                split_values=False,
            ),
        ),
        (
            "latent",
            mc.MLALayout(
                nope_dim=8,
                rope_dim=4,
                value_dim=8,
                query="q_b",
                key_value="kv_b",
                split_values=False,
            ),
        ),
        (
            "fused_with_sink",
            mc.FusedQKVLayout(head_dim=8, kernel="inputs 3 heads head_dim", split_values=False),
        ),
    ],
)
def test_an_analysis_splits_queries_and_keys(name, layout):
    family = FAMILIES[name]
    params = family.params()
    with jax.numpy_rank_promotion("allow"):
        analysis = mc.analyze(family.fn, params, *family.args)
    numbers = analysis.dimension_numbers
    by_analysis, by_layout = (
        _matrices(params, one, muon_weight_dimension_numbers=numbers) for one in (analysis, layout)
    )
    assert by_analysis == by_layout
    assert any("heads" in shown for shown in by_layout.values())

"""Roles of attention kernels: heads on an axis of their own, fused axes, and flat projections."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from muonclip_jax._muon.roles.rules import decide
from tests.support.role_checks import roles_of, shapes_of, warnings_of

HEADS = {"query": (64, 4, 16), "key": (64, 2, 16), "value": (64, 2, 16), "out": (4, 16, 64)}
NAMES = [
    "query key value out",
    "q k v o",
    "wq wk wv wo",
    "q_proj k_proj v_proj o_proj",
    "query_proj key_proj value_proj out_proj",
    "to_q to_k to_v to_out",
    "w_q w_k w_v w_o",
    "query_projection key_projection value_projection output_projection",
]


@pytest.mark.every_combination
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("leaf", ["kernel", "w", ""])
def test_attention_kernels_under_common_names(names, leaf):
    renamed = dict(zip(names.split(), HEADS.values(), strict=True))
    tree = {name: {leaf: shape} if leaf else shape for name, shape in renamed.items()}
    found = roles_of({"attn": tree})
    q, k, v, o = (f"attn/{name}/{leaf}".rstrip("/") for name in names.split())
    assert found[q] == found[o] == (1, 64, 64)
    assert found[k] == found[v] == (1, 64, 32)
    assert not warnings_of({"attn": tree})


def test_kernels_of_gemma_have_heads_before_inputs():
    tree = {
        "q_einsum": {"w": (4, 64, 16)},
        "kv_einsum": {"w": (2, 1, 64, 16)},
        "attn_vec_einsum": {"w": (4, 16, 64)},
    }
    assert roles_of({"attn": tree, "norm": {"scale": (64,)}}) == {
        "attn/attn_vec_einsum/w": (1, 64, 64),
        "attn/kv_einsum/w": (2, 64, 16),
        "attn/q_einsum/w": (1, 64, 64),
        "norm/scale": "adamw",
    }
    assert roles_of({"qkv_einsum": {"w": (3, 4, 64, 16)}}) == {"qkv_einsum/w": (3, 64, 64)}


def test_fused_axes_are_a_batch_with_and_without_a_bias():
    for bias in ({}, {"bias": (3, 4, 16)}):
        tree = {"qkv": {"kernel": (64, 3, 4, 16), **bias}}
        assert roles_of(tree)["qkv/kernel"] == (3, 64, 64)


def test_kernels_of_levanter_have_inputs_last():
    layer = {
        "q_proj": {"weight": [(5, 2, 3, 8, 64)]},
        "k_proj": {"weight": [(5, 2, 8, 64)]},
        "o_proj": {"weight": [(5, 64, 6, 8)]},
        "up_proj": {"weight": [(5, 256, 64)]},
        "norm": {"weight": [(5, 64)]},
    }
    expected = {
        "q_proj/weight/0": (5, 64, 48),
        "k_proj/weight/0": (5, 64, 16),
        "o_proj/weight/0": (5, 48, 64),
        "up_proj/weight/0": (5, 64, 256),
        "norm/weight/0": "adamw",
    }
    for outputs_first in (None, True):
        assert roles_of(layer, outputs_first=outputs_first) == dict(sorted(expected.items()))


def test_low_rank_projections_of_latent_attention():
    tree = {
        "wq_a": {"kernel": (64, 24)},
        "wq_b": {"kernel": (24, 4, 32)},
        "wkv_b": {"kernel": (32, 4, 48)},
        "out": {"kernel": (4, 24, 64)},
        "kv_norm": {"scale": (32,)},
        "norm": {"scale": (64,)},
    }
    found = roles_of({"attn": tree})
    assert found["attn/wq_b/kernel"] == (1, 24, 128)
    assert found["attn/wkv_b/kernel"] == (1, 32, 192)
    assert found["attn/out/kernel"] == (1, 96, 64)


def test_flat_stacked_projections_stay_stacks():
    for output in ("out", "proj_attn"):
        tree = {
            name: {"kernel": (3, 8, 8), "bias": (3, 8)}
            for name in ("query", "key", "value", output)
        }
        assert {v for v in roles_of(tree).values() if v != "adamw"} == {(3, 8, 8)}


def test_three_axes_without_evidence_are_doubted():
    assert len(warnings_of({"attn": {"query": {"kernel": (12, 64, 64)}}})) == 1
    assert not warnings_of({"attn": {"query": {"kernel": (64, 4, 16)}}})
    assert not warnings_of({"attn": {"out": {"kernel": (4, 16, 64)}}})
    tree = {"query": {"kernel": (12, 64, 64)}, "out": {"kernel": (4, 16, 32)}}
    assert "fits neither heads" in warnings_of({"attn": tree})[0]


def test_the_head_layout_of_muonclip_decides_ambiguous_shapes():
    kernels = {"attn": {"query": {"kernel": (12, 64, 64)}, "key": {"kernel": (12, 64, 64)}}}
    params = jax.tree.map(lambda s: jnp.ones(s.shape), shapes_of(kernels))
    flat = mc.MultiHeadLayout(kernel="inputs (heads head_dim)", head_dim=16)
    stats = {"attn": {"max_logits": jnp.ones((12, 1, 4))}}
    tx = mc.muonclip(1.0, layout=flat, weight_decay=0.0)
    updates: Any = tx.update(params, tx.init(params), params, max_logits=stats)[0]
    alone = mc.muonclip(1.0, weight_decay=0.0, threshold=None)
    one = {"w": params["attn"]["query"]["kernel"]}
    expected: Any = alone.update(one, alone.init(one), one)[0]
    np.testing.assert_allclose(updates["attn"]["query"]["kernel"], expected["w"], rtol=1e-5)


def test_queries_of_the_size_of_the_embedding_go_to_muon():
    shapes = {("embed",): (8, 16), ("wq",): (16, 16)}
    _, query = decide([*shapes], [*shapes.values()])
    assert (query.numbers, query.doubt) == (mc.MuonDimensionNumbers(-2, -1), "")


def test_norm_of_the_low_rank_does_not_show_the_width():
    tree = {"attn": {"kv_a_layernorm": {"scale": (16,)}, "o_proj": {"kernel": (4, 16, 64)}}}
    assert roles_of(tree)["attn/o_proj/kernel"] == (1, 64, 64)


def test_tiny_blocks_named_as_queries_are_doubted():
    tree = {"q_proj": {"kernel": (512, 4, 4)}, "norm": {"scale": (1024,)}}
    assert len(warnings_of({"blocks": [{"xlstm": tree}]})) == 1

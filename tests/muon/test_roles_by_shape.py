"""Roles by shape: stacks, biases, attention, convolutions, routers, and which side is inputs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from muonclip_jax._muon.roles.kernels import sizes
from muonclip_jax._muon.roles.rules import decide


def shapes_of(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def results(tree, **arguments):
    """Returns, by path, `adamw` or the number of matrices and their sides."""
    table = mc.routing_table(shapes_of(tree), **arguments)
    return {
        row.path: "adamw" if row.optimizer == "adamw" else (row.num_matrices, row.n_in, row.n_out)
        for row in table.rows
    }


def warnings_of(tree, **arguments):
    return mc.routing_table(shapes_of(tree), **arguments).warnings


# Stacks


def test_stacked_vectors_are_recognized_by_the_norm_beside_them():
    layer = {"norm": {"scale": (6, 8)}, "shift": (6, 8), "up": {"kernel": (6, 8, 32)}}
    assert results({"layers": layer, "final_norm": {"scale": (8,)}})["layers/shift"] == "adamw"
    single = {"norm": {"scale": (8,)}, "shift": (6, 8), "up": {"kernel": (8, 32)}}
    assert results({"layer": single})["layer/shift"] == (1, 6, 8)


def test_stacked_vectors_are_recognized_by_the_axis_that_all_share():
    layer = {"w1": (6, 8, 32), "w2": (6, 32, 8), "shift": (6, 8)}
    assert results({"layers": layer})["layers/shift"] == "adamw"
    assert results({"layers": {**layer, "w3": (5, 8, 32)}})["layers/shift"] == (1, 6, 8)


def test_layers_on_axis_1_are_no_side_of_a_matrix():
    tree = {
        "norm": {"scale": (64, 3)},
        "query": {"kernel": (64, 3, 4, 16)},
        "out": {"kernel": (4, 3, 16, 64)},
        "up": {"kernel": (64, 3, 256)},
        "down": {"kernel": (256, 3, 64)},
        "shift": (64, 3),
    }
    expected = {
        "norm/scale": "adamw",
        "query/kernel": (3, 64, 64),
        "out/kernel": (3, 64, 64),
        "up/kernel": (3, 64, 256),
        "down/kernel": (3, 256, 64),
        "shift": "adamw",
    }
    assert results({"layers": tree}) == {f"layers/{k}": v for k, v in sorted(expected.items())}
    without_norm = {k: v for k, v in tree.items() if k not in ("norm", "shift")}
    assert results(without_norm) == {k: expected[k] for k in results(without_norm)}


def test_a_scan_of_a_scan_has_two_stack_axes():
    block = {"norm": {"scale": (2, 3, 8)}, "shift": (2, 3, 8), "up": {"kernel": (2, 3, 8, 32)}}
    found = results({"stages": {"blocks": block, "norm": {"scale": (2, 8)}}})
    assert found["stages/blocks/shift"] == "adamw"
    assert found["stages/blocks/up/kernel"] == (6, 8, 32)


def test_numbered_layers_are_no_stack():
    layer = {"norm": {"scale": (8,)}, "mix": (6, 8)}
    assert results({"layers_0": layer, "layers_1": layer})["layers_1/mix"] == (1, 6, 8)


# Attention

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
    found = results({"attn": tree})
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
    assert results({"attn": tree, "norm": {"scale": (64,)}}) == {
        "attn/attn_vec_einsum/w": (1, 64, 64),
        "attn/kv_einsum/w": (2, 64, 16),
        "attn/q_einsum/w": (1, 64, 64),
        "norm/scale": "adamw",
    }
    assert results({"qkv_einsum": {"w": (3, 4, 64, 16)}}) == {"qkv_einsum/w": (3, 64, 64)}


def test_fused_axes_are_a_batch_with_and_without_a_bias():
    for bias in ({}, {"bias": (3, 4, 16)}):
        tree = {"qkv": {"kernel": (64, 3, 4, 16), **bias}}
        assert results(tree)["qkv/kernel"] == (3, 64, 64)


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
        assert results(layer, outputs_first=outputs_first) == dict(sorted(expected.items()))


def test_low_rank_projections_of_latent_attention():
    tree = {
        "wq_a": {"kernel": (64, 24)},
        "wq_b": {"kernel": (24, 4, 32)},
        "wkv_b": {"kernel": (32, 4, 48)},
        "out": {"kernel": (4, 24, 64)},
        "kv_norm": {"scale": (32,)},
        "norm": {"scale": (64,)},
    }
    found = results({"attn": tree})
    assert found["attn/wq_b/kernel"] == (1, 24, 128)
    assert found["attn/wkv_b/kernel"] == (1, 32, 192)
    assert found["attn/out/kernel"] == (1, 96, 64)


def test_flat_stacked_projections_stay_stacks():
    for output in ("out", "proj_attn"):
        tree = {
            name: {"kernel": (3, 8, 8), "bias": (3, 8)}
            for name in ("query", "key", "value", output)
        }
        assert {v for v in results(tree).values() if v != "adamw"} == {(3, 8, 8)}


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


# Biases and outputs first


def test_a_bias_shows_which_axes_are_outputs():
    def kernel(shape, bias):
        return results({"dense": {"kernel": shape, "bias": bias}})["dense/kernel"]

    assert kernel((8, 32), (32,)) == (1, 8, 32)
    assert kernel((32, 8), (32,)) == (1, 8, 32)
    assert kernel((8, 4, 6), (4, 6)) == (1, 8, 24)
    assert kernel((4, 6, 8), (8,)) == (1, 24, 8)
    assert kernel((3, 8, 32), (3, 32)) == (3, 8, 32)
    assert kernel((3, 32, 8), (3, 32)) == (3, 8, 32)
    assert kernel((3, 8, 4, 6), (3, 4, 6)) == (3, 8, 24)


def test_biases_decide_the_storage_of_equal_names():
    tree = {"a": {"weight": (32, 8), "bias": (32,)}, "b": {"weight": (16, 8)}}
    assert results(tree)["b/weight"] == (1, 8, 16)
    tree["a"]["weight"] = (8, 32)
    assert results(tree)["b/weight"] == (1, 16, 8)


def test_outputs_first_flips_matrices_and_convolutions():
    tree = {"up": {"weight": (32, 8)}, "stack": (3, 32, 8), "conv": {"weight": (16, 8, 3, 3)}}
    assert results(tree, outputs_first=True) == {
        "conv/weight": (1, 72, 16),
        "stack": (3, 8, 32),
        "up/weight": (1, 8, 32),
    }
    assert results(tree, outputs_first=False)["up/weight"] == (1, 32, 8)
    assert not warnings_of(tree, outputs_first=True)


def test_weight_without_evidence_names_outputs_first_as_the_fix():
    (text,) = warnings_of({"up": {"weight": (32, 8)}})
    assert "up/weight (32, 8)" in text
    assert "outputs_first" in text
    assert not warnings_of({"up": {"weight": (32, 8)}}, consistent_rms=0.2)
    assert not warnings_of({"up": {"kernel": (32, 8)}})


def test_outputs_first_against_the_bias_is_doubted():
    tree = {"up": {"kernel": (8, 32), "bias": (32,)}}
    assert results(tree, outputs_first=True)["up/kernel"] == (1, 32, 8)
    assert "bias fits the other axis" in warnings_of(tree, outputs_first=True)[0]


def test_widths_show_outputs_first_under_known_names():
    block = {"up": {"weight": (256, 64)}, "down": {"weight": (64, 256)}, "norm": {"weight": (64,)}}
    found = results({"layers": [block]})
    assert found["layers/0/up/weight"] == (1, 64, 256)
    assert found["layers/0/down/weight"] == (1, 256, 64)


# Convolutions


def test_a_convolution_is_one_matrix():
    assert results({"conv": {"kernel": (3, 3, 16, 32)}}) == {"conv/kernel": (1, 144, 32)}
    assert results({"conv1": {"kernel": (5, 16, 32), "bias": (32,)}})["conv1/kernel"] == (1, 80, 32)
    assert results({"Conv_0": {"kernel": (1, 1, 16, 32)}}) == {"Conv_0/kernel": (1, 16, 32)}
    tree = {"conv": {"weight": (32, 16, 3, 3), "bias": (32, 1, 1)}}
    assert results(tree)["conv/weight"] == (1, 144, 32)


def test_stacked_convolutions_are_a_matrix_each():
    tree = {"conv": {"kernel": (6, 3, 3, 16, 32), "bias": (6, 32)}}
    assert results(tree)["conv/kernel"] == (6, 144, 32)


@pytest.mark.parametrize(
    "shape", [(4, 1, 64), (3, 3, 1, 64), (4, 3, 1, 64), (64, 1, 4), (64, 1, 3, 3), (4, 64)]
)
def test_depthwise_convolutions_go_to_adamw(shape):
    assert results({"conv1d": {"kernel": shape}}) == {"conv1d/kernel": "adamw"}


# Routers


@pytest.mark.parametrize(
    "experts",
    [
        {"wi_0": (4, 8, 16), "wo": (4, 16, 8)},
        {"experts": {"up": (4, 8, 16), "down": (4, 16, 8)}},
        {"w13": (4, 8, 32), "w2": (4, 16, 8)},
        {"mlps": {"up": {"kernel": (4, 8, 16)}, "down": {"kernel": (4, 16, 8)}}},
        {f"expert_{i}": {"up": {"kernel": (8, 16)}} for i in range(4)},
        {"mlps": [{"up": {"kernel": (8, 16)}} for _ in range(4)]},
    ],
)
def test_gate_beside_experts_of_any_name_is_a_router(experts):
    assert results({"ffn": {"gate": {"kernel": (8, 4)}, **experts}})["ffn/gate/kernel"] == "adamw"


def test_gate_of_stacked_layers_is_a_router_only_beside_experts():
    def layers(up):
        tree = {"gate": {"kernel": (3, 8, 16)}, "up": {"kernel": up}, "norm": {"scale": (3, 8)}}
        return results({"layers": tree})["layers/gate/kernel"]

    assert layers((3, 8, 16)) == (3, 8, 16)
    assert layers((3, 16, 8, 24)) == "adamw"


def test_gate_of_heads_is_no_router():
    tree = {"q": (64, 4, 16), "o": (4, 16, 64), "gate": {"kernel": (64, 4)}}
    assert results({"attn": tree})["attn/gate/kernel"] == (1, 64, 4)


def test_gate_alone_is_doubted():
    assert len(warnings_of({"ffn": {"gate": {"kernel": (8, 16)}}})) == 1
    assert not warnings_of({"moe": {"gate": {"kernel": (8, 16)}}})
    tree = {"gate": {"kernel": (8, 16)}, "up": {"kernel": (8, 16)}}
    assert not warnings_of({"ffn": tree})


# Sides


def test_a_side_of_one_goes_to_adamw():
    tree = {"value": {"kernel": (64, 1)}, "gain": {"w": (1, 64)}, "probe_w": (2, 1, 64)}
    assert set(results(tree).values()) == {"adamw"}


@pytest.mark.parametrize(
    ("tree", "doubt"),
    [
        ({"input": {"kernel": (3, 256)}}, "a side of 3"),
        ({"mixture": (16, 4, 8)}, "16 matrices of only 4 x 8"),
        ({"mixture": (64, 32, 48)}, "matrices or heads"),
        ({"wte": (1000, 64), "readout": {"kernel": (64, 1000)}}, "vocabulary"),
        ({"far": {"kernel": (64, 50000)}}, "vocabulary"),
        (
            {
                "critic": {"kernel": (64, 64)},
                "Dense_0": {"kernel": (32, 64), "bias": (64,)},
                "Dense_1": {"kernel": (64, 10), "bias": (10,)},
                "Dense_2": {"kernel": (64, 32), "bias": (32,)},
            },
            "nothing has 10 inputs",
        ),
    ],
)
def test_weak_guesses_are_doubted(tree, doubt):
    (text,) = warnings_of(tree)
    assert doubt in text


@pytest.mark.parametrize(
    "tree",
    [
        {"input": {"kernel": (16, 256)}},
        {"input": {"kernel": (4, 16)}},
        {"lora_a": (256, 4)},
        {"stack": (6, 64, 64)},
        {"wte": (1000, 64), "blocks": {"proj": {"kernel": (64, 1000)}}},
    ],
)
def test_ordinary_matrices_are_not_doubted(tree):
    assert not warnings_of(tree)


@pytest.mark.parametrize(
    ("name", "doubted"), [("Dense_0", False), ("fc_out", True), ("readout", True)]
)
@pytest.mark.parametrize("width", [16, 32])
def test_outputs_of_the_size_of_the_vocabulary_are_heads(name, width, doubted):
    """The width of an RNN may differ from the width of the embedding."""
    shapes = {("Embed_0", "embedding"): (100, 16), (name, "kernel"): (width, 100)}
    head = decide([*shapes], [*shapes.values()])[1]
    assert head.numbers is None
    assert bool(head.doubt) == doubted


def test_queries_of_the_size_of_the_embedding_go_to_muon():
    shapes = {("embed",): (8, 16), ("wq",): (16, 16)}
    _, query = decide([*shapes], [*shapes.values()])
    assert (query.numbers, query.doubt) == (mc.MuonDimensionNumbers(-2, -1), "")


@pytest.mark.parametrize("module", ["encoder", "QNetwork_0", ""])
def test_last_unnamed_layer_of_a_network_is_a_head_and_is_doubted(module):
    layers = {f"Dense_{i}": {"kernel": shape} for i, shape in enumerate([(32, 64), (64, 10)])}
    tree: Any = {module: layers} if module else layers
    assert list(results(tree).values()) == [(1, 32, 64), "adamw"]
    (text,) = warnings_of(tree)
    assert "Dense_1" in text
    assert "To keep AdamW" in text


@pytest.mark.parametrize("sides", [(64, 64), (64, 128)])
def test_last_layer_of_a_network_without_a_head_is_doubted(sides):
    tree = {"Dense_0": {"kernel": (8, 64)}, "Dense_1": {"kernel": sides}}
    (text,) = warnings_of(tree)
    assert text.startswith("Dense_1/kernel")
    assert "may be one" in text
    assert not warnings_of({**tree, "head": {"kernel": (128, 10)}})


@pytest.mark.parametrize(
    "tree",
    [
        {"Conv_1": {"kernel": (3, 3, 32, 64)}, "Dense_1": {"kernel": (256, 10)}},
        {"linear2": {"kernel": (256, 10)}},
        {"Dense_0": {"kernel": (256, 10), "bias": (10,)}},
    ],
)
def test_last_layer_without_the_layers_before_it_is_doubted(tree):
    (text,) = warnings_of(tree)
    assert "output head" in text


@pytest.mark.parametrize(
    "path",
    [("t_embedder", "mlp_0"), ("time_embedding", "linear_1"), ("time_emb_proj",)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_dense_layers_of_time_embeddings_go_to_muon(path, bias):
    shapes = {(*path, "kernel"): (32, 64), **({(*path, "bias"): (64,)} if bias else {})}
    kernel = decide([*shapes], [*shapes.values()])[0]
    assert (kernel.numbers, kernel.doubt) == (mc.MuonDimensionNumbers(-2, -1), "")
    (table,) = decide([("time_embedding", "embedding")], [(1000, 64)])
    assert table.numbers is None


def test_dense_layers_below_other_embeddings_are_doubted():
    assert len(warnings_of({"bbox_embed": {"layers_0": {"kernel": (64, 64)}}})) == 1
    tree = {"embed": {"kernel": (64, 64), "bias": (64,)}}
    assert len(warnings_of(tree)) == 1
    assert not warnings_of({"embed_linear": {"w": (32000, 64)}})


def test_norm_of_the_low_rank_does_not_show_the_width():
    tree = {"attn": {"kv_a_layernorm": {"scale": (16,)}, "o_proj": {"kernel": (4, 16, 64)}}}
    assert results(tree)["attn/o_proj/kernel"] == (1, 64, 64)


def test_plural_weights_are_inputs_first():
    assert not warnings_of({"left_projection": {"weights": (64, 32)}})
    assert len(warnings_of({"left_projection": {"weight": (64, 32)}})) == 1


def test_tiny_blocks_named_as_queries_are_doubted():
    tree = {"q_proj": {"kernel": (512, 4, 4)}, "norm": {"scale": (1024,)}}
    assert len(warnings_of({"blocks": [{"xlstm": tree}]})) == 1


@pytest.mark.parametrize("name", ["output_layer", "final_layer", "last_layer"])
def test_last_layers_are_heads_although_layers_are_blocks(name):
    (head,) = decide([(name, "kernel")], [(64, 1000)])
    assert (head.numbers, head.doubt) == (None, "")


def test_first_convolution_of_gray_images_is_doubted():
    paths = [("Conv_0", "kernel"), ("Conv_1", "kernel")]
    first, _ = decide(paths, [(3, 3, 1, 32), (3, 3, 32, 64)])
    depthwise, _ = decide(paths, [(3, 3, 1, 32), (3, 3, 64, 32)])
    assert (bool(first.doubt), bool(depthwise.doubt)) == (True, False)


def test_an_unstacked_gain_in_the_module_of_stacked_layers_does_not_hide_the_stack():
    shapes = {
        "wq": (3, 64, 4, 16),
        "wk": (3, 64, 2, 16),
        "wo": (3, 4, 16, 64),
        "w_up": (3, 64, 256),
        "attn_norm": (3, 64),
        "out_norm": (64,),
        "proj_in": (32, 64),
    }
    decisions = decide([(name,) for name in shapes], [*shapes.values()])
    numbers = dict(zip(shapes, (d.numbers for d in decisions), strict=True))
    sizes = {name: _sizes_of(shapes[name], n) for name, n in numbers.items() if n}
    assert sizes == {
        "wq": (3, 64, 64),
        "wk": (3, 64, 32),
        "wo": (3, 64, 64),
        "w_up": (3, 64, 256),
        "proj_in": (1, 32, 64),
    }


def _sizes_of(shape, numbers):
    n_in, n_out, batch = sizes(shape, numbers)
    return int(np.prod([n for _, n in batch], dtype=int)), n_in, n_out


@pytest.mark.parametrize("name", ["routing", "route", "expert_gate", "selector"])
def test_a_router_beside_numbered_experts_needs_no_name(name):
    experts = {("moe", f"expert_{i}", "up", "kernel"): (16, 64) for i in range(8)}
    shapes = {("moe", name, "kernel"): (16, 8), **experts}
    first, *others = decide([*shapes], [*shapes.values()])
    assert first.numbers is None
    assert all(d.numbers is not None for d in others)


def test_a_head_inside_of_a_numbered_layer_is_a_head():
    shapes = {
        ("embed_tokens", "weight"): (1000, 64),
        ("layers_61", "shared_head", "head", "weight"): (64, 1000),
    }
    head = decide([*shapes], [*shapes.values()])[1]
    assert head.numbers is None


@pytest.mark.parametrize(
    "path",
    [
        *[("abs_pos",), ("query_pos",), ("pos_h",), ("soft_prompt",), ("slots",), ("obj_query",)],
        *[("detect_tokens",), ("null_kv",), ("user_factors",)],
        *[("position", "kernel"), ("vocab", "kernel")],
    ],
)
def test_tables_that_are_looked_up_or_added_go_to_adamw(path):
    (table,) = decide([path], [(20, 64)])
    assert table.numbers is None


@pytest.mark.parametrize("path", [("experts", "up"), ("layers", "mlp", "w1"), ("down",)])
def test_a_stack_of_one_is_no_table(path):
    (matrix,) = decide([path], [(1, 48, 64)])
    assert matrix.numbers is not None
    (table,) = decide([("added",)], [(1, 48, 64)])
    assert table.numbers is None


@pytest.mark.parametrize(
    "path",
    [("lm_heads", "kernel"), ("mtp_heads", "kernel"), ("medusa_heads", "0", "out", "kernel")],
)
def test_several_heads_are_heads(path):
    shape = (512, 32000) if "0" in path else (4, 512, 32000)
    table, head = decide([("embed", "kernel"), path], [(32000, 512), shape])
    assert (table.numbers, head.numbers, head.doubt) == (None, None, "")


@pytest.mark.parametrize("shape", [(5, 1, 64), (64, 1, 5)])
def test_flat_depthwise_convolutions_with_a_bias_need_no_name(shape):
    bias = (64,) if shape[2] == 64 else (64, 1)
    tree = {"mix": {"weight": shape, "bias": bias}}
    assert results(tree)["mix/weight"] == "adamw"


def test_the_rank_of_an_adapter_shows_how_it_is_stored():
    assert results({"up": {"lora_A": (8, 512), "lora_B": (1024, 8)}}) == {
        "up/lora_A": (1, 512, 8),
        "up/lora_B": (1, 8, 1024),
    }
    assert results({"up": {"lora_a": (512, 8), "lora_b": (8, 1024)}}) == {
        "up/lora_a": (1, 512, 8),
        "up/lora_b": (1, 8, 1024),
    }


@pytest.mark.parametrize("box", ["data_array", "_value", "data", "unboxed", "param"])
def test_boxes_below_a_parameter_do_not_hide_its_name(box):
    tree = {"query": {"kernel": {box: (64, 4, 16)}}, "norm": {"scale": {box: (12, 64)}}}
    assert results(tree) == {
        f"query/kernel/{box}": (1, 64, 64),
        f"norm/scale/{box}": "adamw",
    }


def test_vmapped_layers_with_one_output_are_stacked():
    tree = {"Dense_0": {"kernel": (10, 24, 256), "bias": (10, 256)}}
    tree["Dense_1"] = {"kernel": (10, 256, 1), "bias": (10, 1)}
    assert results({"critic": tree}) == {
        "critic/Dense_0/bias": "adamw",
        "critic/Dense_0/kernel": (10, 24, 256),
        "critic/Dense_1/bias": "adamw",
        "critic/Dense_1/kernel": "adamw",
    }

"""Routers, output heads and tables go to AdamW, also under unusual names."""

from typing import Any

import pytest

import muonclip_jax as mc
from muonclip_jax._muon.roles.rules import decide
from tests.support.role_checks import roles_of, warnings_of

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
    assert roles_of({"ffn": {"gate": {"kernel": (8, 4)}, **experts}})["ffn/gate/kernel"] == "adamw"


def test_gate_of_stacked_layers_is_a_router_only_beside_experts():
    def layers(up):
        tree = {"gate": {"kernel": (3, 8, 16)}, "up": {"kernel": up}, "norm": {"scale": (3, 8)}}
        return roles_of({"layers": tree})["layers/gate/kernel"]

    assert layers((3, 8, 16)) == (3, 8, 16)
    assert layers((3, 16, 8, 24)) == "adamw"


def test_gate_of_heads_is_no_router():
    tree = {"q": (64, 4, 16), "o": (4, 16, 64), "gate": {"kernel": (64, 4)}}
    assert roles_of({"attn": tree})["attn/gate/kernel"] == (1, 64, 4)


def test_gate_alone_is_doubted():
    assert len(warnings_of({"ffn": {"gate": {"kernel": (8, 16)}}})) == 1
    assert not warnings_of({"moe": {"gate": {"kernel": (8, 16)}}})
    tree = {"gate": {"kernel": (8, 16)}, "up": {"kernel": (8, 16)}}
    assert not warnings_of({"ffn": tree})


# Output heads and tables


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


@pytest.mark.parametrize("module", ["encoder", "QNetwork_0", ""])
def test_last_unnamed_layer_of_a_network_is_a_head_and_is_doubted(module):
    layers = {f"Dense_{i}": {"kernel": shape} for i, shape in enumerate([(32, 64), (64, 10)])}
    tree: Any = {module: layers} if module else layers
    assert list(roles_of(tree).values()) == [(1, 32, 64), "adamw"]
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


@pytest.mark.parametrize("name", ["output_layer", "final_layer", "last_layer"])
def test_last_layers_are_heads_although_layers_are_blocks(name):
    (head,) = decide([(name, "kernel")], [(64, 1000)])
    assert (head.numbers, head.doubt) == (None, "")


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

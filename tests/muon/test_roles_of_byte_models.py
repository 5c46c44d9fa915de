"""Models of bytes, whose width or hidden width equals the vocabulary: only heads go to AdamW."""

import pytest

from tests.support.role_checks import roles_of, warnings_of

BYTES = 256
HEADS = [{}, {"lm_head": {"kernel": (BYTES, BYTES)}}]


def kernels(**shapes):
    return {name: {"kernel": shape} for name, shape in shapes.items()}


@pytest.mark.parametrize("head", HEADS, ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["proj", "dense", "linear", "out"])
@pytest.mark.parametrize("module", ["attn", "mix", "blocks_0"])
def test_the_projection_out_of_attention_is_no_head(name, module, head):
    attention = kernels(qkv=(BYTES, 3 * BYTES)) | {name: {"kernel": (BYTES, BYTES)}}
    tree = {"embed": {"embedding": (BYTES, BYTES)}, module: attention, **head}
    assert roles_of(tree)[f"{module}/{name}/kernel"] == (1, BYTES, BYTES)


@pytest.mark.parametrize("head", [{}, {"lm_head": {"kernel": (64, BYTES)}}], ids=["tied", "untied"])
@pytest.mark.parametrize("names", [("fc1", "fc2"), ("linear1", "linear2"), ("up", "down")])
def test_halves_of_an_mlp_are_no_heads(names, head):
    up, down = names
    mlp = {up: {"kernel": (64, BYTES)}, down: {"kernel": (BYTES, 64)}}
    tree = {"embed": {"embedding": (BYTES, 64)}, "ffn": mlp, **head}
    roles = roles_of(tree)
    assert roles[f"ffn/{up}/kernel"] == (1, 64, BYTES)
    assert roles[f"ffn/{down}/kernel"] == (1, BYTES, 64)
    assert not warnings_of(tree)


def test_layers_of_blocks_are_heads_only_without_a_named_head():
    mlp = kernels(Dense_0=(64, BYTES), Dense_1=(BYTES, 64))
    tree = {"embed": {"embedding": (BYTES, 64)}, "blocks_0": {"mlp": mlp}}
    assert len(warnings_of(tree)) == 2
    tree |= kernels(lm_head=(64, BYTES))
    assert roles_of(tree)["blocks_0/mlp/Dense_1/kernel"] == (1, BYTES, 64)
    assert not warnings_of(tree)


def test_a_second_head_without_a_name_is_doubted():
    tree = {"embed": {"embedding": (BYTES, 64)}, **kernels(lm_head=(64, BYTES), proj=(64, BYTES))}
    assert roles_of(tree)["proj/kernel"] == "adamw"
    assert [text.split()[0] for text in warnings_of(tree)] == ["proj/kernel"]

"""Parameters whose names or shapes suggest another role: the parameters beside them decide."""

import pytest

from tests.support.role_checks import roles_of, warnings_of


def doubts_of(tree):
    """Returns the warnings by the path with which they begin."""
    return {text.split(" (")[0]: text for text in warnings_of(tree)}


# Several matrices beside their bias


@pytest.mark.parametrize("name", ["wi", "gate_up_proj"])
@pytest.mark.parametrize("bias", [{}, {"bias": (2, 256)}])
def test_fused_gate_and_up_are_two_matrices_with_and_without_a_bias(name, bias):
    tree = {"mlp": {name: {"kernel": (64, 2, 256), **bias}}}
    assert roles_of(tree)[f"mlp/{name}/kernel"] == (2, 64, 256)
    assert not warnings_of(tree)


def test_fused_kernels_with_a_bias_and_any_name_are_split_by_the_kernel_beside_them():
    mlp = {"wi_kernel": (64, 2, 256), "wi_bias": (2, 256), "x": {"kernel": (64, 2, 256)}}
    mlp |= {"wo_kernel": (256, 64), "y": {"kernel": (64, 2, 256), "bias": (2, 256)}}
    assert {roles_of(mlp)[path] for path in ("wi_kernel", "x/kernel", "y/kernel")} == {(2, 64, 256)}
    fused = {"in_proj": {"kernel": (64, 3, 4, 16), "bias": (3, 4, 16)}}
    for out in ((4, 16, 64), (64, 64)):
        tree = {"attn": {**fused, "out_proj": {"kernel": out}}}
        assert roles_of(tree)["attn/in_proj/kernel"] == (3, 64, 64)


def test_few_outputs_that_nothing_explains_are_doubted_with_both_overrides():
    for shape, one, each in (
        ((64, 2, 256), "-3, (-2, -1)", "-3, -1"),
        ((64, 3, 4, 16), "-4, (-3, -2, -1)", "-4, (-2, -1)"),
    ):
        tree = {"x": {"kernel": shape, "bias": shape[1:]}}
        text = doubts_of(tree)["x/kernel"]
        assert f'"x/kernel": mc.MuonDimensionNumbers({one})' in text
        assert f'"x/kernel": mc.MuonDimensionNumbers({each})' in text


def test_few_outputs_with_the_sizes_of_heads_are_one_matrix():
    gate = {"gating_w": (64, 2, 32), "gating_b": (2, 32)}
    for beside in ({"query_w": (64, 2, 32), "output_w": (2, 32, 64)}, {"back": (2, 32, 64)}):
        tree = {"attention": {**gate, **beside}}
        assert roles_of(tree)["attention/gating_w"] == (1, 64, 64)
        assert not warnings_of(tree)


# A first axis of 1 in a numbered layer


@pytest.mark.parametrize("layer", ["layers_0", "blocks/0", "layers"])
def test_a_first_axis_of_one_in_a_numbered_layer_is_for_broadcasting(layer):
    lead = (5,) if layer == "layers" else ()
    tree = {f"{layer}/norm/scale": (*lead, 64), f"{layer}/modulation": (*lead, 1, 6, 64)}
    tree |= {f"{layer}/q/kernel": (*lead, 64, 64), f"{layer}/I": (*lead, 1, 8, 64)}
    assert roles_of(tree)[f"{layer}/modulation"] == "adamw"
    assert "for broadcasting" in doubts_of(tree)[f"{layer}/I"]
    assert len(doubts_of(tree)) == 1


def test_stacks_of_one_matrix_are_matrices():
    tree = {"layers_0": {"mlp": {"w1": (1, 64, 256), "w2": (1, 256, 64)}, "norm/scale": (64,)}}
    assert roles_of(tree)["layers_0/mlp/w1"] == (1, 64, 256)
    assert roles_of({"layers": {"mix": (1, 64, 256)}})["layers/mix"] == (1, 64, 256)
    unnamed = {"layers_0": {"x": (1, 64, 256), "y": (1, 256, 64)}}
    assert not warnings_of(tree)
    assert "sides of a matrix" in doubts_of(unnamed)["layers_0/x"]

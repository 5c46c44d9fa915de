"""Roles by shape: stacks, biases, convolutions, and which side is inputs."""

import numpy as np
import pytest

from muonclip_jax._muon.roles.kernels import sizes
from muonclip_jax._muon.roles.rules import decide
from tests.support.role_checks import roles_of, warnings_of

# Stacks


def test_stacked_vectors_are_recognized_by_the_norm_beside_them():
    layer = {"norm": {"scale": (6, 8)}, "shift": (6, 8), "up": {"kernel": (6, 8, 32)}}
    assert roles_of({"layers": layer, "final_norm": {"scale": (8,)}})["layers/shift"] == "adamw"
    single = {"norm": {"scale": (8,)}, "shift": (6, 8), "up": {"kernel": (8, 32)}}
    assert roles_of({"layer": single})["layer/shift"] == (1, 6, 8)


def test_stacked_vectors_are_recognized_by_the_axis_that_all_share():
    layer = {"w1": (6, 8, 32), "w2": (6, 32, 8), "shift": (6, 8)}
    assert roles_of({"layers": layer})["layers/shift"] == "adamw"
    assert roles_of({"layers": {**layer, "w3": (5, 8, 32)}})["layers/shift"] == (1, 6, 8)


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
    assert roles_of({"layers": tree}) == {f"layers/{k}": v for k, v in sorted(expected.items())}
    without_norm = {k: v for k, v in tree.items() if k not in ("norm", "shift")}
    assert roles_of(without_norm) == {k: expected[k] for k in roles_of(without_norm)}


def test_a_scan_of_a_scan_has_two_stack_axes():
    block = {"norm": {"scale": (2, 3, 8)}, "shift": (2, 3, 8), "up": {"kernel": (2, 3, 8, 32)}}
    found = roles_of({"stages": {"blocks": block, "norm": {"scale": (2, 8)}}})
    assert found["stages/blocks/shift"] == "adamw"
    assert found["stages/blocks/up/kernel"] == (6, 8, 32)


def test_numbered_layers_are_no_stack():
    layer = {"norm": {"scale": (8,)}, "mix": (6, 8)}
    assert roles_of({"layers_0": layer, "layers_1": layer})["layers_1/mix"] == (1, 6, 8)


# Biases and outputs first


def test_a_bias_shows_which_axes_are_outputs():
    def kernel(shape, bias):
        return roles_of({"dense": {"kernel": shape, "bias": bias}})["dense/kernel"]

    assert kernel((8, 32), (32,)) == (1, 8, 32)
    assert kernel((32, 8), (32,)) == (1, 8, 32)
    assert kernel((8, 4, 6), (4, 6)) == (1, 8, 24)
    assert kernel((4, 6, 8), (8,)) == (1, 24, 8)
    assert kernel((3, 8, 32), (3, 32)) == (3, 8, 32)
    assert kernel((3, 32, 8), (3, 32)) == (3, 8, 32)
    assert kernel((3, 8, 4, 6), (3, 4, 6)) == (3, 8, 24)


def test_biases_decide_the_storage_of_equal_names():
    tree = {"a": {"weight": (32, 8), "bias": (32,)}, "b": {"weight": (16, 8)}}
    assert roles_of(tree)["b/weight"] == (1, 8, 16)
    tree["a"]["weight"] = (8, 32)
    assert roles_of(tree)["b/weight"] == (1, 16, 8)


def test_outputs_first_flips_matrices_and_convolutions():
    tree = {"up": {"weight": (32, 8)}, "stack": (3, 32, 8), "conv": {"weight": (16, 8, 3, 3)}}
    assert roles_of(tree, outputs_first=True) == {
        "conv/weight": (1, 72, 16),
        "stack": (3, 8, 32),
        "up/weight": (1, 8, 32),
    }
    assert roles_of(tree, outputs_first=False)["up/weight"] == (1, 32, 8)
    assert not warnings_of(tree, outputs_first=True)


def test_weight_without_evidence_names_outputs_first_as_the_fix():
    (text,) = warnings_of({"up": {"weight": (32, 8)}})
    assert "up/weight (32, 8)" in text
    assert "outputs_first" in text
    assert not warnings_of({"up": {"weight": (32, 8)}}, consistent_rms=0.2)
    assert not warnings_of({"up": {"kernel": (32, 8)}})


def test_outputs_first_against_the_bias_is_doubted():
    tree = {"up": {"kernel": (8, 32), "bias": (32,)}}
    assert roles_of(tree, outputs_first=True)["up/kernel"] == (1, 32, 8)
    assert "bias fits the other axis" in warnings_of(tree, outputs_first=True)[0]


def test_widths_show_outputs_first_under_known_names():
    block = {"up": {"weight": (256, 64)}, "down": {"weight": (64, 256)}, "norm": {"weight": (64,)}}
    found = roles_of({"layers": [block]})
    assert found["layers/0/up/weight"] == (1, 64, 256)
    assert found["layers/0/down/weight"] == (1, 256, 64)


# Convolutions


def test_a_convolution_is_one_matrix():
    assert roles_of({"conv": {"kernel": (3, 3, 16, 32)}}) == {"conv/kernel": (1, 144, 32)}
    assert roles_of({"conv1": {"kernel": (5, 16, 32), "bias": (32,)}})["conv1/kernel"] == (
        1,
        80,
        32,
    )
    assert roles_of({"Conv_0": {"kernel": (1, 1, 16, 32)}}) == {"Conv_0/kernel": (1, 16, 32)}
    tree = {"conv": {"weight": (32, 16, 3, 3), "bias": (32, 1, 1)}}
    assert roles_of(tree)["conv/weight"] == (1, 144, 32)


def test_stacked_convolutions_are_a_matrix_each():
    tree = {"conv": {"kernel": (6, 3, 3, 16, 32), "bias": (6, 32)}}
    assert roles_of(tree)["conv/kernel"] == (6, 144, 32)


@pytest.mark.parametrize(
    "shape", [(4, 1, 64), (3, 3, 1, 64), (4, 3, 1, 64), (64, 1, 4), (64, 1, 3, 3), (4, 64)]
)
def test_depthwise_convolutions_go_to_adamw(shape):
    assert roles_of({"conv1d": {"kernel": shape}}) == {"conv1d/kernel": "adamw"}


# Sides


def test_a_side_of_one_goes_to_adamw():
    tree = {"value": {"kernel": (64, 1)}, "gain": {"w": (1, 64)}, "probe_w": (2, 1, 64)}
    assert set(roles_of(tree).values()) == {"adamw"}


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


def test_plural_weights_are_inputs_first():
    assert not warnings_of({"left_projection": {"weights": (64, 32)}})
    assert len(warnings_of({"left_projection": {"weight": (64, 32)}})) == 1


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


@pytest.mark.parametrize("shape", [(5, 1, 64), (64, 1, 5)])
def test_flat_depthwise_convolutions_with_a_bias_need_no_name(shape):
    bias = (64,) if shape[2] == 64 else (64, 1)
    tree = {"mix": {"weight": shape, "bias": bias}}
    assert roles_of(tree)["mix/weight"] == "adamw"


def test_the_rank_of_an_adapter_shows_how_it_is_stored():
    assert roles_of({"up": {"lora_A": (8, 512), "lora_B": (1024, 8)}}) == {
        "up/lora_A": (1, 512, 8),
        "up/lora_B": (1, 8, 1024),
    }
    assert roles_of({"up": {"lora_a": (512, 8), "lora_b": (8, 1024)}}) == {
        "up/lora_a": (1, 512, 8),
        "up/lora_b": (1, 8, 1024),
    }


@pytest.mark.parametrize("box", ["data_array", "_value", "data", "unboxed", "param"])
def test_boxes_below_a_parameter_do_not_hide_its_name(box):
    tree = {"query": {"kernel": {box: (64, 4, 16)}}, "norm": {"scale": {box: (12, 64)}}}
    assert roles_of(tree) == {
        f"query/kernel/{box}": (1, 64, 64),
        f"norm/scale/{box}": "adamw",
    }


def test_vmapped_layers_with_one_output_are_stacked():
    tree = {"Dense_0": {"kernel": (10, 24, 256), "bias": (10, 256)}}
    tree["Dense_1"] = {"kernel": (10, 256, 1), "bias": (10, 1)}
    assert roles_of({"critic": tree}) == {
        "critic/Dense_0/bias": "adamw",
        "critic/Dense_0/kernel": (10, 24, 256),
        "critic/Dense_1/bias": "adamw",
        "critic/Dense_1/kernel": "adamw",
    }

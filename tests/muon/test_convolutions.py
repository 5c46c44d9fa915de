"""Convolutions: transposed, pointwise, with weights of their own at each position, in groups."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import muonclip_jax as mc
from tests.support.reference import newton_schulz
from tests.support.role_checks import roles_of, warnings_of

ROWS = [(3.4445, -4.7750, 2.0315)] * 5
IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 16), jnp.float32)
CONVOLUTIONS = {
    "transposed kernel": (nn.ConvTranspose(8, (4, 4), transpose_kernel=True), (1, 256, 8)),
    "transposed": (nn.ConvTranspose(8, (4, 4)), (1, 256, 8)),
    "local": (nn.ConvLocal(8, (3, 3)), (64, 144, 8)),
    "usual": (nn.Conv(8, (3, 3)), (1, 144, 8)),
}


def overrides_in(text):
    """Returns the overrides that a warning prints, by the sentence before each."""
    found = re.findall(r"([^.}]*): overrides=(\{.*?\})\.(?= |$)", text)
    return {when.strip(): eval(code, {"mc": mc}) for when, code in found}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_bias_and_the_program_show_the_outputs_of_a_convolution(name):
    module, matrix = CONVOLUTIONS[name]
    own = f"{type(module).__name__}_0"
    params = jax.eval_shape(module.init, jax.random.key(0), IMAGES)["params"]
    params = {own: params, **{n: jax.ShapeDtypeStruct((8, 8), jnp.float32) for n in ("a", "b")}}
    shapes = jax.tree.map(lambda x: x.shape, params)
    assert roles_of(shapes)[f"{own}/kernel"] == matrix
    analysis = mc.analyze(
        lambda p, x: module.apply({"params": p[own]}, x) @ p["a"] @ p["b"], params, IMAGES
    )
    found = roles_of(shapes, muon_weight_dimension_numbers=analysis)
    assert found[f"{own}/kernel"] == matrix


@pytest.mark.parametrize(
    ("tree", "matrix"),
    [
        ({"conv1_d_transpose": {"w": (4, 8, 16), "b": (8,)}}, (1, 64, 8)),
        ({"conv2_d_transpose": {"w": (4, 4, 8, 16), "b": (8,)}}, (1, 256, 8)),
        ({"ct": {"kernel": (4, 4, 8, 16), "bias": (8,)}}, (1, 256, 8)),
        ({"layers": {"ct": {"kernel": (5, 4, 4, 8, 16), "bias": (5, 8)}}}, (5, 256, 8)),
    ],
)
def test_a_bias_of_the_second_to_last_axis_shows_a_transposed_convolution(tree, matrix):
    assert matrix in roles_of(tree).values()
    assert not warnings_of(tree)


@pytest.mark.parametrize(
    ("name", "tree", "other"),
    [
        ("ConvTranspose_0", {"kernel": (4, 4, 8, 16)}, ((-4, -3, -1), -2)),
        ("conv2_d_transpose_1", {"w": (4, 4, 8, 8), "b": (8,)}, ((-4, -3, -1), -2)),
        ("deconv", {"kernel": (3, 3, 8, 8), "bias": (8,)}, ((-4, -3, -1), -2)),
        ("up_conv", {"kernel": (2, 2, 8, 8), "bias": (8,)}, ((-4, -3, -1), -2)),
        ("ct", {"kernel": (4, 4, 8, 16)}, ((-4, -3, -1), -2)),
        ("conv_transpose", {"weight": (16, 8, 4, 4)}, (-4, (-3, -2, -1))),
    ],
)
def test_transposed_convolutions_without_evidence_warn_with_both_orders(name, tree, other):
    (text,) = warnings_of({name: tree})
    found = [
        numbers
        for when, override in overrides_in(text).items()
        if when.startswith("If it is")
        for numbers in override.values()
    ]
    assert found == [mc.MuonDimensionNumbers(*other)]


def numbered(module, sizes, window=(4, 4), biases=()):
    """Returns kernels (*window, *sizes) in modules of a name and a number, some with a bias."""
    tree = {f"{module}{i}": {"kernel": (*window, *pair)} for i, pair in enumerate(sizes)}
    return {**tree, **{n: {**tree[n], "bias": b} for n, b in biases}}


@pytest.mark.parametrize(
    ("tree", "matrix"),
    [
        (numbered("ConvTranspose_", [(64, 32), (32, 8)]), (1, 1024, 32)),
        (numbered("deconv", [(32, 64), (8, 32)]), (1, 1024, 32)),
        (numbered("upconv", [(64, 64), (64, 32), (32, 16)]), (1, 1024, 64)),
    ],
)
def test_a_series_of_fewer_and_fewer_channels_shows_which_are_outputs(tree, matrix):
    assert not warnings_of({"deconvs": tree})
    assert next(iter(roles_of({"deconvs": tree}).values())) == matrix


@pytest.mark.parametrize(
    "sizes",
    [
        [(64, 32), (64, 32)],  # no chain
        [(64, 32), (32, 64), (64, 32)],  # a chain in both orders
        [(32, 64), (64, 128)],  # may be numbered from its end
    ],
)
def test_a_series_that_shows_no_outputs_warns(sizes):
    for text in warnings_of(numbered("deconv", sizes)):
        assert "no bias shows which of its channels are outputs" in text
    assert len(warnings_of(numbered("deconv", sizes))) == len({*sizes})


@pytest.mark.parametrize(
    ("kernel", "n_out", "matrix"),
    [
        ((4, 4, 32, 64), 32, (1, 1024, 32)),
        ((4, 4, 32, 64), 64, (1, 512, 64)),
        ((4, 4, 64, 64), 32, (1, 1024, 64)),
    ],
)
def test_the_bias_of_another_transposed_convolution_shows_the_outputs(kernel, n_out, matrix):
    shown = {"kernel": (4, 4, 32, 64), "bias": (n_out,)}
    series = {"deconv_0": {"kernel": kernel}, "deconv_1": shown}
    for tree in (series, {"middle": {"deconv": {"kernel": kernel}}, "end": {"up_conv": shown}}):
        assert not warnings_of(tree)
        assert matrix in [roles_of(tree).get(f"{n}/kernel") for n in ("deconv_0", "middle/deconv")]
    unlike = {"kernel": (4, 4, 64, 32), "bias": (n_out,)}  # in the opposite order
    assert "no bias shows" in warnings_of({**series, "deconv_2": unlike})[0]


def test_biases_decide_before_the_sizes_of_a_series():
    up = numbered("deconv", [(64, 32), (32, 12)], biases=[("deconv1", (32,))])  # from its end
    down = {"ct": {"ConvTranspose_0": {"kernel": (4, 4, 32, 64), "bias": (64,)}}}
    assert not warnings_of({**up, **down})
    assert roles_of({**up, **down})["deconv0/kernel"] == (1, 512, 64)


@pytest.mark.parametrize(
    "beside",
    [
        {"conv": {"kernel": (4, 4, 32, 64), "bias": (64,)}},  # not transposed
        {"tconv": {"kernel": (64, 32, 4), "bias": (32,)}},  # the window on the other side
        {"deconv_0": {"kernel": (8,)}},  # no matrix
    ],
)
def test_the_biases_of_unlike_parameters_show_no_outputs(beside):
    found = warnings_of({**beside, "deconv_1": {"kernel": (4, 4, 64, 64)}})
    assert "no bias shows which of its channels are outputs" in str(found)


def test_parameters_of_few_axes_beside_convolutions_have_no_sides():
    assert not warnings_of({"conv": {"kernel": (3, 3, 8, 8), "bias": ()}})
    stacked = {"kernel": (5, 2, 3), "norm": {"scale": (5, 2, 3)}}
    found = roles_of({"conv_0": stacked, "conv_1": {"kernel": (3, 3, 8, 16)}})
    assert found["conv_1/kernel"] == (1, 72, 16)


def test_orders_of_equal_updates_do_not_warn():
    torch = {
        "conv_transpose": {"weight": (16, 8, 4, 4)}
    }  # both orders: one matrix or its transpose
    assert warnings_of(torch, outputs_first=True)
    assert not warnings_of(torch, outputs_first=True, consistent_rms=0.2)
    assert not warnings_of({"deconv": {"kernel": (4, 4, 8, 8)}}, outputs_first=False)


@pytest.mark.parametrize("name", ["up_conv", "upsample_conv", "decode_conv", "conv"])
def test_other_convolutions_with_equal_channels_do_not_warn(name):
    assert not warnings_of({name: {"kernel": (3, 3, 8, 8), "bias": (8,)}})


def test_pointwise_convolutions_with_outputs_first_are_matrices():
    tree = {"conv1": {"weight": (128, 64, 1, 1)}, "conv2": {"weight": (128, 128, 3, 3)}}
    assert roles_of(tree)["conv1/weight"] == (1, 64, 128)
    assert roles_of({"conv": {"weight": (64, 1, 1, 1)}})["conv/weight"] == "adamw"


def test_a_local_convolution_is_a_matrix_for_each_position():
    tree = {"ConvLocal_0": {"kernel": (4, 4, 72, 64)}}
    assert roles_of(tree) == {"ConvLocal_0/kernel": (16, 72, 64)}
    bias = {"conv": {"kernel": (4, 4, 72, 64), "bias": (4, 4, 64)}}
    assert roles_of(bias)["conv/kernel"] == (16, 72, 64)


# Groups


BOTTLENECK = {
    "Conv_0": {"kernel": (1, 1, 64, 128)},
    "Conv_1": {"kernel": (3, 3, 4, 128), "bias": (128,)},
    "Conv_2": {"kernel": (1, 1, 128, 64)},
}


def test_inputs_of_a_fraction_of_the_outputs_before_may_be_groups():
    (text,) = warnings_of(BOTTLENECK)
    assert "Conv_1/kernel" in text
    assert "has 128 outputs, so it may have 32 groups" in text
    first = {"kernel": (8, 8, 4, 64)}  # of images, beside another first convolution
    assert not warnings_of({"Conv_0": first, "Conv_1": first, "Conv_2": {"kernel": (3, 3, 64, 64)}})
    fire = {"Conv_0": {"kernel": (1, 1, 64, 16)}, "Conv_1": {"kernel": (1, 1, 16, 64)}}
    assert not warnings_of({**fire, "Conv_2": {"kernel": (3, 3, 16, 64)}})


@pytest.mark.parametrize(
    ("module", "name", "shapes"),
    [
        ("ConvTranspose_{}", "kernel", [(4, 4, 32, 64), (4, 4, 16, 32)]),
        ("upconv{}", "kernel", [(2, 2, 32, 64), (2, 2, 16, 32)]),
        ("{}", "kernel", [(4, 4, 32, 64), (4, 4, 16, 32)]),
        ("deconv{}", "weight", [(64, 32, 4, 4), (32, 16, 4, 4)]),  # as PyTorch stores it
    ],
)
def test_the_bias_before_shows_that_a_transposed_convolution_has_no_groups(module, name, shapes):
    kernels = {
        module.format(i): {name: shape, "bias": (n_out,)}
        for i, (shape, n_out) in enumerate(zip(shapes, (32, 16), strict=True))
    }
    assert not warnings_of({"deconvs": kernels})


def convolved(x, kernel, groups=1):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=groups
    )


def analyzed(fn, shape, images=(2, 8, 8, 6)):
    """Analyzes a convolution before two products."""
    params = {"kernel": shape, "up": (18, 4), "down": (4, 5)}
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in params.items()}
    images = jax.ShapeDtypeStruct(images, jnp.float32)
    return mc.analyze(lambda p, x: fn(x, p["kernel"]) @ p["up"] @ p["down"], params, images)


@pytest.mark.parametrize(
    ("fn", "shape", "matrices"),
    [
        (lambda x, k: convolved(x, k, 3), (3, 3, 2, 18), (3, 18, 6)),
        (lambda x, k: convolved(x, k.transpose(2, 3, 1, 0), 3), (18, 2, 3, 3), (3, 18, 6)),
        (
            lambda x, k: convolved(x, jnp.moveaxis(k, 0, 3).reshape(3, 3, 2, 18), 3),
            (3, 3, 3, 2, 6),
            (3, 18, 6),
        ),
        (lambda x, k: convolved(x, k.reshape(3, 3, 2, 18), 3), (9, 2, 3, 6), (3, 18, 6)),
    ],
    ids=["outputs last", "outputs first", "an axis of groups", "reshaped"],
)
def test_each_group_of_a_convolution_is_a_matrix_in_an_analysis(fn, shape, matrices):
    analysis = analyzed(fn, shape)
    assert mc.Analysis.from_json(analysis.to_json()) == analysis
    params = {"kernel": shape, "up": (18, 4), "down": (4, 5)}
    assert roles_of(params, muon_weight_dimension_numbers=analysis)["kernel"] == matrices
    assert "kernel" not in str(analysis.warnings)


def test_members_of_an_ensemble_of_convolutions_are_matrices():
    def fn(params, x):
        one = jax.vmap(lambda p, x: convolved(x, p["kernel"]) @ p["up"] @ p["down"])
        return one(params, x)

    shapes = {"kernel": (5, 3, 3, 6, 7), "up": (5, 7, 8), "down": (5, 8, 4)}
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    analysis = mc.analyze(fn, params, jax.ShapeDtypeStruct((5, 2, 8, 8, 6), jnp.float32))
    assert roles_of(shapes, muon_weight_dimension_numbers=analysis)["kernel"] == (5, 54, 7)
    assert analysis.dimension_numbers["kernel"] == mc.MuonDimensionNumbers((-4, -3, -2), -1)


def test_the_update_of_grouped_convolutions_is_of_each_group_alone():
    analysis = analyzed(lambda x, k: convolved(x, k, 3), (3, 3, 2, 18))
    G = np.random.default_rng(0).normal(size=(3, 3, 2, 18)).astype(np.float32)
    params = {"kernel": jnp.asarray(G), "up": jnp.ones((18, 4)), "down": jnp.ones((4, 5))}
    tx = mc.muon(1.0, muon_weight_dimension_numbers=analysis, ns_dtype="float32")
    updates: Any = tx.update(params, tx.init(params), params)[0]
    groups = np.split(G.astype(np.float64), 3, axis=-1)
    expected = [newton_schulz(g.reshape(18, 6), ROWS).reshape(3, 3, 2, 6) for g in groups]
    np.testing.assert_allclose(-updates["kernel"], np.concatenate(expected, -1), atol=2e-5)


def test_dimension_numbers_of_grouped_convolutions_warn():
    analysis = analyzed(lambda x, k: convolved(x, k, 3), (3, 3, 2, 18))
    with pytest.warns(UserWarning, match="groups of these convolutions: kernel. Pass the analysis"):
        assert analysis.dimension_numbers["down"] is None

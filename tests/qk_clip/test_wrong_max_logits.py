"""Max logits that are missing, swapped, misnamed or of a wrong kind: the error has the fix."""

import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc

pytestmark = pytest.mark.usefixtures("no_typecheck")
LAYOUT = mc.MultiHeadLayout(query="wq", key="wk")
ARRAY = np.full((2, 4), 400.0, np.float32)


def params(**others):
    kernels = {name: np.ones((32, 4, 8), np.float32) for name in ("wq", "wk", "wv")}
    return {"mix": {**kernels, **others}}


def sown(value, name="max_logits"):
    return {"intermediates": {"mix": {name: value}}}


@pytest.mark.parametrize(
    ("arguments", "error", "texts"),
    [
        ((params(), ARRAY), TypeError, ["the array float32[2, 4]", "mutable="]),
        (
            (params(), sown([[400.0, 7.0]])),
            TypeError,
            ["mix/max_logits", "number 400.0", "asarray"],
        ),
        (
            (params(), sown((ARRAY,), "maxlogit")),
            ValueError,
            ["mix: has no max_logits, but 'maxlogit'", "stat='maxlogit'"],
        ),
        (
            (sown((ARRAY,)), params()),
            ValueError,
            ["the parameters hold max logits, 'intermediates/mix/max_logits'", "parameters first"],
        ),
        ((params(), None), ValueError, ["your own attention", "mc.linen.sow_max_logits"]),
    ],
)
def test_wrong_max_logits_raise_with_the_fix(arguments, error, texts):
    with pytest.raises(error, match="qk_clip: ") as raised:
        mc.qk_clip(arguments[0], arguments[1], LAYOUT)
    assert all(text in str(raised.value) for text in texts), str(raised.value)


def test_a_layout_in_the_name_of_the_max_logits_reads_them():
    layout = mc.MultiHeadLayout(query="wq", key="wk", stat="maxlogit")
    _, info = mc.qk_clip(params(), sown((ARRAY,), "maxlogit"), layout)
    assert info.clipped_heads == 4


def test_modules_without_telling_names_get_the_advice_to_analyze():
    children = {f"DenseGeneral_{i}": {"kernel": np.ones((32, 4, 8))} for i in range(3)}
    with pytest.raises(ValueError, match=r"pass layout=mc\.analyze"):
        mc.qk_clip({"mix": children}, sown((ARRAY,)))


@pytest.mark.parametrize(
    ("a", "b", "fault"),
    [
        (
            {},
            sown(ARRAY),
            "intermediates/mix/max_logits: absent in the first, (2, 4) in the second.",
        ),
        (sown(ARRAY), sown(ARRAY[:1]), "(2, 4) in the first, (1, 4) in the second."),
        (
            sown((ARRAY,)),
            sown([ARRAY]),
            "(root): containers dict, tuple in the first, dict, list in the second.",
        ),
    ],
)
def test_merging_unequal_max_logits_raises_with_the_paths(a, b, fault):
    with pytest.raises(ValueError, match="merge_max_logits: ") as raised:
        mc.merge_max_logits(a, b)
    assert fault in str(raised.value)


def test_ignoring_every_module_warns():
    with pytest.warns(UserWarning, match="ignore='m.*' leaves out every attention module"):
        mc.qk_clip(params(), sown(ARRAY), LAYOUT, ignore="m*")
    mc.qk_clip(params(), sown(ARRAY), LAYOUT, ignore="*")


def test_biases_beside_kernels_are_scaled_if_declared():
    with_bias = params(bq=np.ones((4, 8), np.float32), k_bias=np.ones((4, 8), np.float32))
    scaled = "('kernel', 'bias', 'lora_b', 'bq', 'k_bias')"
    with pytest.raises(ValueError, match="'bq' looks like a bias") as raised:
        mc.qk_clip(with_bias, sown(ARRAY), LAYOUT)
    assert f"scaled_leaves={scaled}" in str(raised.value)
    layout = mc.MultiHeadLayout(query="wq", key="wk", scaled_leaves=("kernel", "bq", "k_bias"))
    new, _ = mc.qk_clip(with_bias, sown(jnp.array([400.0, 4.0, 4.0, 4.0])), layout)
    expected = np.ones((4, 8))
    expected[0] = 0.5
    for name in ("bq", "k_bias"):
        np.testing.assert_array_equal(new["mix"][name], expected)
    np.testing.assert_array_equal(new["mix"]["wv"], 1)

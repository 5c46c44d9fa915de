"""Settings of a wrong type or out of range raise when a transform is built."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc

NAN = float("nan")
BAD = [
    ("learning_rate", -0.1),
    ("learning_rate", NAN),
    ("beta", 1.0),
    ("beta", 1.5),
    ("beta", -0.1),
    ("beta", NAN),
    ("adam_b1", 1.0),
    ("adam_b2", -0.5),
    ("adam_eps_root", -1e-9),
    ("eps", -1e-9),
    ("weight_decay", -0.1),
    ("adam_weight_decay", NAN),
    ("adam_learning_rate", -1.0),
    ("consistent_rms", 0.0),
]


@pytest.mark.parametrize("transform", [mc.muon, mc.muonclip])
@pytest.mark.parametrize(("name", "value"), BAD)
def test_each_bad_value(transform, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .*, got {value!r}"):
        transform(**{"learning_rate": 0.1, name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("threshold", 0.0), ("threshold", NAN), ("alpha", 1.1)]
)
def test_each_bad_value_of_the_clip(name, value):
    with pytest.raises(ValueError, match=rf"muonclip: {name} must be .*, got {value!r}"):
        mc.muonclip(0.1, **{name: value})


@pytest.mark.parametrize("transform", [mc.muon, mc.muonclip])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ns_coeffs": "muon"}, r"ns_coeffs must be the name of a preset \('jordan', .*got 'muon'"),
        ({"ns_coeffs": (1.0, 2.0)}, "ns_coeffs must be the name of a preset"),
        ({"ns_steps": 0}, "at least 1, got 0"),
        (
            {"ns_method": "cubic"},
            r"ns_method must be one of 'auto', .*; got 'cubic'",
        ),
        ({"ns_products": "triton"}, "ns_products must be one of 'auto', 'xla', 'pallas'; got"),
        ({"preconditioning": "l2"}, "preconditioning must be one of 'frobenius'"),
    ],
)
def test_each_unknown_name(transform, settings, message):
    with pytest.raises(ValueError, match=message):
        transform(0.1, **settings)


def test_unknown_shared_key():
    with pytest.raises(ValueError, match=r"shared_key must be one of 'query'.*got 'mean'"):
        mc.muonclip(0.1, shared_key="mean")


def test_all_bad_settings_are_in_one_message():
    with pytest.raises(ValueError, match=r"^muon: weight_decay must.*-1.*; adam_b1 must.*, got 2"):
        mc.muon(0.1, weight_decay=-1.0, adam_b1=2.0)


def make_muon(name, value):
    return mc.muon(**{"learning_rate": 0.1, name: value})


def make_muonclip(name, value):
    return mc.muonclip(**{"learning_rate": 0.1, name: value})


def make_scale_by_muon(name, value):
    return mc.scale_by_muon(**{name: value})


def call_newton_schulz(name, value):
    return mc.newton_schulz(jnp.ones((2, 2)), **{name: value})


def call_qk_clip(name, value):
    return mc.qk_clip({}, {}, **{name: value})


NUMBERS = {
    make_muon: ("learning_rate", "beta", "eps", "weight_decay", "adam_b1", "adam_b2", "ns_steps"),
    make_muonclip: ("adam_eps_root", "adam_weight_decay", "adam_learning_rate", "threshold"),
    make_scale_by_muon: ("beta", "eps", "ns_steps"),
    call_newton_schulz: ("eps", "steps"),
    call_qk_clip: ("threshold", "alpha"),
}
WRONG_TYPES = [
    *[
        (make, name, value)
        for make, names in NUMBERS.items()
        for name in names
        for value in ("0.1", "fast", True, 1j, [0.1], {"w": np.ones(3)})
    ],
    *[(make_muon, name, None) for name in ("learning_rate", "beta", "adam_weight_decay")],
    *[(make_muon, name, 5.0) for name in ("ns_steps",)],
    *[(make_muon, name, lambda step: 0.1) for name in ("beta", "eps", "consistent_rms")],
    *[(make_muon, "mu_dtype", value) for value in ("bfloat17", "int8", 16, jnp.ones(()), bool)],
    *[(make_muon, "ns_dtype", value) for value in ("bfloat17", jnp.int32, None, "float8_e5m2")],
    *[(make_muon, name, "no") for name in ("nesterov", "adam_nesterov", "adaptive")],
    (make_muonclip, "layout", {"attn": np.ones(3)}),
    (call_qk_clip, "threshold", lambda step: 100.0),
    (call_qk_clip, "where", "yes"),
]


@pytest.mark.usefixtures("no_typecheck")
@pytest.mark.parametrize(("make", "name", "value"), WRONG_TYPES)
def test_a_setting_of_the_wrong_type_raises_when_built(make, name, value):
    with pytest.raises(TypeError, match=rf"\w+: {name} must be ") as error:
        make(name, value)
    assert len(str(error.value)) < 300


@pytest.mark.usefixtures("no_typecheck")
def test_a_number_as_string_names_the_fix():
    with pytest.raises(TypeError, match=r"pass float\('1e-4'\).*YAML 1\.1"):
        make_muon("learning_rate", "1e-4")


@pytest.mark.usefixtures("no_typecheck")
@pytest.mark.parametrize("value", [("3", "-4", "2"), [[1.0, 2.0, 3.0], [1.0]], 3, [], None])
def test_coefficients_are_numbers(value):
    with pytest.raises(ValueError, match="ns_coeffs must be the name of a preset"):
        make_muon("ns_coeffs", value)


@pytest.mark.usefixtures("no_typecheck")
def test_a_number_has_no_axes():
    with pytest.raises(ValueError, match=r"threshold must be .*, got an array of shape \(2,\)"):
        call_qk_clip("threshold", np.ones(2))


@pytest.mark.usefixtures("no_typecheck")
def test_wrong_types_and_values_are_in_one_message():
    bad: Any = {"learning_rate": "1e-4", "beta": 2.0, "mu_dtype": "int8", "threshold": -1.0}
    with pytest.raises(TypeError) as error:
        mc.muonclip(**bad, **{"shared_key": "k", "ns_steps": 0, "layout": 1})
    for name in ("learning_rate", "beta", "mu_dtype", "threshold", "shared_key", "ns_steps"):
        assert f"{name} must be" in str(error.value)
    assert "layout must be" in str(error.value)


@pytest.mark.usefixtures("no_typecheck")
def test_weights_are_not_printed():
    with pytest.raises(TypeError, match=r"got \{'w': float32\[300\]\}"):
        call_qk_clip("layout", {"w": jnp.ones(300)})


@pytest.mark.usefixtures("no_typecheck")
@pytest.mark.parametrize("number", [np.float32(0.5), np.array(0.5), jnp.array(0.5)])
def test_numbers_of_numpy_and_jax_are_numbers(number):
    for name in ("learning_rate", "beta", "eps", "weight_decay", "adam_b2", "consistent_rms"):
        make_muon(name, number)
    make_muonclip("threshold", number)
    make_muon("ns_steps", np.int64(3))
    make_muon("mu_dtype", "bfloat16")
    make_muon("ns_dtype", np.float16)
    make_muon("nesterov", np.True_)
    make_muonclip("weight_decay", optax.constant_schedule(0.1))


@pytest.mark.usefixtures("no_typecheck")
def test_numpy_numbers_are_checked_and_the_ends_are_allowed():
    with pytest.raises(ValueError, match="weight_decay"):
        mc.muon(0.1, weight_decay=np.float32(-1))  # pyright: ignore[reportArgumentType]
    mc.muonclip(0.0, threshold=float("inf"), alpha=0.0, beta=0.0, eps=0.0, weight_decay=0.0)
    mc.muonclip(optax.constant_schedule(0.1), alpha=1.0)


def test_traced_settings_are_not_checked():
    g = {"w": np.ones((3, 4), np.float32)}

    @jax.jit
    def update(beta, decay):
        tx = mc.muon(0.1, beta=beta, weight_decay=decay)
        updates: Any = tx.update(g, tx.init(g), g)[0]
        return updates["w"]

    assert np.all(np.isfinite(update(0.9, 0.1)))


@pytest.mark.usefixtures("no_typecheck")
@pytest.mark.parametrize("name", ["outputs_first", "weight_decay_mask"])
@pytest.mark.parametrize("transform", [mc.muon, mc.muonclip])
def test_a_boolean_as_string_raises(transform, name):
    with pytest.raises(TypeError, match=rf"{name} must be .*'False'"):
        transform(0.1, **{name: "False"})


@pytest.mark.usefixtures("no_typecheck")
def test_an_integer_as_string_names_the_fix():
    steps: Any = "5"
    with pytest.raises(TypeError, match=r"pass int\('5'\)\.$"):
        mc.muon(0.1, ns_steps=steps)


@pytest.mark.usefixtures("no_typecheck")
@pytest.mark.parametrize(
    ("name", "value"), [("ignore", 3), ("ignore", None), ("ignore", [3]), ("ever_clipped", 5)]
)
def test_other_arguments_of_the_clip_of_the_wrong_type_raise(name, value):
    with pytest.raises(TypeError, match=f"qk_clip: {name} must be"):
        call_qk_clip(name, value)


@pytest.mark.usefixtures("no_typecheck")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query", 3),
        ("key", None),
        ("stat", 3),
        ("scaled_leaves", ["kernel"]),
        ("kept_leaves", "lora_a"),
        ("qk_norm", True),
    ],
)
def test_fields_of_a_head_layout_of_the_wrong_type_raise(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        mc.MultiHeadLayout(**{name: value})


def test_query_heads_with_groups_first_raise():
    with pytest.raises(ValueError, match="'kv_heads groups' side by side"):
        mc.MultiHeadLayout(kernel="inputs (groups kv_heads head_dim)", head_dim=4)

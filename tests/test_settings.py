"""Settings out of range are refused when a transform is built."""

from typing import Any

import jax
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
        ({"ns_coeffs": "muon"}, r"ns_coeffs must be a preset's name \('jordan', .*, got 'muon'"),
        ({"ns_coeffs": (1.0, 2.0)}, "ns_coeffs must be a preset's name"),
        ({"ns_steps": 0}, "at least 1, got 0"),
        (
            {"ns_method": "cubic"},
            r"ns_method must be one of 'auto', .*; got 'cubic'",
        ),
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


@pytest.mark.usefixtures("no_typecheck")
def test_numpy_numbers_are_checked_and_the_ends_are_allowed():
    with pytest.raises(ValueError, match="weight_decay"):
        mc.muon(0.1, weight_decay=np.float32(-1))  # pyright: ignore[reportArgumentType]
    mc.muonclip(0.0, threshold=float("inf"), alpha=0.0, beta=0.0, eps=0.0, weight_decay=0.0)
    mc.muonclip(optax.constant_schedule(0.1), alpha=1.0)


def test_traced_settings_are_taken_as_they_are():
    g = {"w": np.ones((3, 4), np.float32)}

    @jax.jit
    def update(beta, decay):
        tx = mc.muon(0.1, beta=beta, weight_decay=decay)
        updates: Any = tx.update(g, tx.init(g), g)[0]
        return updates["w"]

    assert np.all(np.isfinite(update(0.9, 0.1)))

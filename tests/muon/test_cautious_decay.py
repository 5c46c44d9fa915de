"""Cautious weight decay equals its equation in float64, in both halves of the optimizers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from tests.support import reference_family
from tests.support.family_cases import DTYPES, assert_equal, draw, run


@pytest.mark.parametrize("dtype", DTYPES)
def test_cautious_decay_equals_its_equation(dtype):
    W, U = draw((5, 4), 1, dtype), draw((5, 4), 2, dtype)
    U = U.at[0].set(0)  # a zero update agrees with every weight
    W = W.at[1].set(0)
    tx = mc.add_cautious_weight_decay(0.3)
    (got,) = run(tx, [U], W)
    assert_equal([got], [reference_family.cautious_decay(U, W, 0.3)], dtype)
    assert 0 < np.mean(np.asarray(got == U)) < 1


def test_cautious_decay_compares_signs_of_tiny_numbers():
    W, U = jnp.full(2, 1e-30), jnp.array([1e-30, -1e-30])
    (got,) = run(mc.add_cautious_weight_decay(1.0), [U], W)
    np.testing.assert_array_equal(got, np.array([2e-30, -1e-30], np.float32))


def test_cautious_decay_of_complex_weights():
    W, U = jnp.array([1 + 1j, 1 + 1j]), jnp.array([1 - 0.5j, -2 + 1j])
    (got,) = run(mc.add_cautious_weight_decay(0.5), [U], W)
    np.testing.assert_allclose(got, reference_family.cautious_decay(U, W, 0.5), rtol=1e-6)


def test_cautious_decay_with_a_mask_and_a_schedule():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    schedule = optax.linear_schedule(0.0, 1.0, 2)
    tx = mc.add_cautious_weight_decay(schedule, mask={"a": True, "b": False})
    got = run(tx, [params] * 3, params)
    assert [float(u["a"][0]) for u in got] == [1.0, 1.5, 2.0]
    assert [float(u["b"][0]) for u in got] == [1.0, 1.0, 1.0]


def test_cautious_decay_needs_the_parameters():
    tx = mc.add_cautious_weight_decay(0.1)
    with pytest.raises(ValueError, match="update needs params, got None"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


@pytest.mark.parametrize("name", ["muon", "muonclip"])
def test_the_optimizer_decays_both_halves_cautiously(name):
    params = {"up": {"kernel": draw((4, 6), 0), "bias": draw((6,), 1)}}
    grads = {"up": {"kernel": draw((4, 6), 2), "bias": draw((6,), 3)}}
    settings: dict[str, Any] = {"weight_decay": 0.3, "adam_weight_decay": 0.3}
    if name == "muonclip":
        settings["threshold"] = None
    updates, states = [], []
    more: dict[str, Any]
    for more in ({"weight_decay": 0.0, "adam_weight_decay": 0.0}, {}, {"cautious": True}):
        cautious = more.pop("cautious", False)
        tx = getattr(mc, name)(1.0, **settings | more, cautious_weight_decay=cautious)
        states.append(tx.init(params))
        updates.append(tx.update(grads, states[-1], params)[0])
    plain, decayed, got = updates
    for part in ("kernel", "bias"):
        U, W = np.float64(-plain["up"][part]), np.float64(params["up"][part])
        expected = -reference_family.cautious_decay(U, W, 0.3)
        np.testing.assert_allclose(got["up"][part], expected, rtol=1e-5, atol=1e-6)
        assert np.any(got["up"][part] != decayed["up"][part])
    assert jax.tree.structure(states[2]) == jax.tree.structure(states[1])


@pytest.mark.parametrize("cautious", [False, True])
def test_decay_follows_a_schedule_without_injection(cautious):
    params = {"up": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    grads = jax.tree.map(jnp.zeros_like, params)
    settings: dict[str, Any] = {"cautious_weight_decay": cautious}
    schedule = optax.linear_schedule(0.0, 1.0, 2)
    tx = mc.muon(0.5, weight_decay=schedule, adam_weight_decay=schedule, **settings)
    for got, decay in zip(run(tx, [grads] * 3, params), (0.0, 0.5, 1.0), strict=True):
        for x in jax.tree.leaves(got):
            np.testing.assert_allclose(x, np.full(x.shape, -0.5 * decay), atol=1e-6)

"""Values that go wrong: contained in their leaf, never spread, never raised inside jit."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from tests.support import reference


def _params():
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"a": make(6, 8), "b": make(6, 8), "stack": make(3, 6, 8), "bias": make(5)}


def _step(tx, grads, state, params):
    return jax.jit(tx.update)(grads, state, params)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("leaf", ["a", "bias", "stack"])
def test_non_finite_stays_in_its_leaf(bad, leaf):
    params = _params()
    tx = mc.muon(0.1, weight_decay=0.1)
    clean, _ = _step(tx, params, tx.init(params), params)
    index = (1, 2, 3)[: params[leaf].ndim]
    broken = {**params, leaf: params[leaf].at[index].set(bad)}
    got, _ = _step(tx, broken, tx.init(params), params)
    assert not np.all(np.isfinite(got.pop(leaf)))
    expected = {k: v for k, v in clean.items() if k != leaf}
    chex.assert_trees_all_equal(got, expected)


def test_non_finite_stays_in_its_matrix_of_a_stack():
    params = _params()
    tx = mc.muon(0.1)
    clean, _ = _step(tx, params, tx.init(params), params)
    broken = {**params, "stack": params["stack"].at[1, 2, 3].set(np.nan)}
    got, _ = _step(tx, broken, tx.init(params), params)
    np.testing.assert_array_equal(got["stack"][0], clean["stack"][0])
    np.testing.assert_array_equal(got["stack"][2], clean["stack"][2])


def test_apply_if_finite_contains():
    params = _params()
    tx = optax.apply_if_finite(mc.muon(0.1, weight_decay=0.1), max_consecutive_errors=5)
    state = tx.init(params)
    _, state = _step(tx, params, state, params)
    bad = {**params, "a": params["a"].at[0, 0].set(np.nan)}
    updates, skipped = _step(tx, bad, state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(skipped.inner_state, state.inner_state)
    after, _ = _step(tx, params, skipped, params)
    expected, _ = _step(tx, params, state, params)
    chex.assert_trees_all_equal(after, expected)


def test_the_clip_follows_a_skipped_step():
    """The recipe of the README: a step that is not taken is not clipped either."""
    make = np.random.default_rng(0).normal
    params = {
        "attn": {
            n: {"kernel": jnp.asarray(make(size=(6, 2, 4)), jnp.float32)} for n in ("query", "key")
        }
    }
    stats = {"attn": {"max_logits": jnp.array([400.0, 1.0])}}
    into_heads = mc.MuonDimensionNumbers(-3, (-2, -1))
    muon = mc.muon(0.1, overrides={"attn/*/kernel": into_heads})
    tx = optax.apply_if_finite(muon, max_consecutive_errors=5)

    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        params, info = mc.qk_clip(params, stats, where=state.last_finite)
        return params, info.clipped_heads

    bad = jax.tree.map(lambda x: x.at[0, 0, 0].set(jnp.nan), params)
    same, clipped = step(bad, tx.init(params), params)
    chex.assert_trees_all_equal(same, params)
    assert int(clipped) == 0
    _, clipped = step(params, tx.init(params), params)
    assert int(clipped) == 1


def test_zero_gradient():
    params = _params()
    tx = mc.muon(0.1)
    clean, _ = _step(tx, params, tx.init(params), params)
    zeroed = {**params, "a": jnp.zeros((6, 8)), "stack": params["stack"].at[1].set(0.0)}
    got, _ = _step(tx, zeroed, tx.init(params), params)
    np.testing.assert_array_equal(got["a"], np.zeros((6, 8)))
    np.testing.assert_array_equal(got["stack"][1], np.zeros((6, 8)))
    chex.assert_trees_all_equal(got["b"], clean["b"])
    np.testing.assert_array_equal(got["stack"][::2], clean["stack"][::2])


@pytest.mark.parametrize("scale", [1e38, 1e30, 1e20, 1e19, 1e-10, 1e-20, 1e-30, 1e-33])
@pytest.mark.parametrize("nesterov", [True, False])
def test_scale_free(scale, nesterov):
    g = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, size=(12, 20)), jnp.float32)
    tx = mc.scale_by_muon(nesterov=nesterov)
    expected, _ = tx.update(g, tx.init(g))
    got, _ = tx.update(g * scale, tx.init(g))
    assert reference.relative_error(got, expected) < 1e-4


def test_denormal_gradients_stay_finite():
    g = jnp.full((4, 6), 1e-40, jnp.float32)
    tx = mc.scale_by_muon()
    assert np.all(np.isfinite(np.asarray(tx.update(g, tx.init(g))[0])))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (jnp.float16, 300.0),
        (jnp.float16, 1.0),
        (jnp.float16, 1e-3),
        (jnp.float16, 1e-7),
        (jnp.bfloat16, 1e30),
        (jnp.bfloat16, 1.0),
        (jnp.bfloat16, 1e-30),
    ],
)
def test_narrow_dtypes(dtype, scale):
    g = jnp.asarray(np.random.default_rng(0).normal(size=(512, 512)) * scale, dtype)
    tx = mc.muon(1.0)
    got: Any
    got, state = tx.update({"w": g}, tx.init({"w": g}), {"w": g})
    expected = np.asarray(mc.newton_schulz(g.astype(jnp.float32)))
    u = -np.asarray(got["w"], np.float32)
    assert got["w"].dtype == dtype
    assert np.all(np.isfinite(u))
    assert np.vdot(u, expected) > 0.99 * np.linalg.norm(u) * np.linalg.norm(expected)
    chex.assert_trees_all_equal_dtypes(state, tx.init({"w": g}))


def test_optimizer_state_recovers_from_one_bad_matrix_only_with_a_guard():
    """NaN is not hidden by default, as the documentation describes."""
    params = _params()
    tx = mc.muon(0.1)
    bad = {**params, "a": params["a"].at[0, 0].set(np.nan)}
    _, state = _step(tx, bad, tx.init(params), params)
    got, _ = _step(tx, params, state, params)
    assert not np.all(np.isfinite(got["a"]))
    assert np.all(np.isfinite(got["b"]))

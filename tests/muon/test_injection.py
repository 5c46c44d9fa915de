"""`optax.inject_hyperparams` and `jax.vmap` over settings, without `static_args`."""

import copy
import functools
import inspect
import pickle
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc

ROW = (3.4445, -4.7750, 2.0315)


def weights(dtype: Any = jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"up": {"kernel": (4, 6), "bias": (6,)}, "experts": (2, 6, 3)}
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def matrices(dtype: Any = jnp.float32):
    return {"experts": weights(dtype)["experts"]}


def no_bias(params):
    return jax.tree.map_with_path(lambda path, _: "bias" not in str(path), params)


def experts_only(params):
    numbers = {"experts": mc.MuonDimensionNumbers(-2, -1), "up": {"kernel": None, "bias": None}}
    return {name: numbers[name] for name in params}


def updates_of(tx, params, steps=2):
    state, updates = jax.jit(tx.init)(params), None
    for step in range(steps):
        grads = jax.tree.map(lambda x, step=step: jnp.sin((step + 1) * x), params)
        updates, state = jax.jit(tx.update)(grads, state, params)
    return updates, state


CASES = {
    "muon": (mc.muon, weights, {"weight_decay": 0.2}),
    "masks and numbers": (
        mc.muon,
        weights,
        {
            "weight_decay": 0.3,
            "weight_decay_mask": no_bias,
            "muon_weight_dimension_numbers": experts_only,
            "mu_dtype": jnp.float32,
        },
    ),
    "muonclip": (functools.partial(mc.muonclip, threshold=None), weights, {"ns_coeffs": "you"}),
    "scale_by_muon": (mc.scale_by_muon, matrices, {"weight_dimension_numbers": experts_only}),
    "scale_by_shape": (mc.scale_by_shape, matrices, {"consistent_rms": 0.2}),
    "one step": (mc.scale_by_muon, matrices, {"ns_steps": 1}),
    "gram": (mc.scale_by_muon, matrices, {"ns_method": "gram", "ns_steps": 3}),
    "bfloat16": (mc.scale_by_muon, matrices, {"ns_dtype": jnp.bfloat16, "ns_steps": 2}),
    "aol": (mc.scale_by_muon, matrices, {"preconditioning": "aol", "adaptive": True}),
    "row in an array": (mc.scale_by_muon, matrices, {"ns_coeffs": np.array(ROW), "ns_steps": 4}),
    "rows in an array": (
        mc.scale_by_muon,
        matrices,
        {"ns_coeffs": jnp.array([ROW, (1.5, -0.5, 0.0)])},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_injected_settings_equal_plain_ones(name):
    factory, make, settings = CASES[name]
    takes_a_rate = "learning_rate" in inspect.signature(factory).parameters
    settings = {**settings, **({"learning_rate": 0.1} if takes_a_rate else {})}
    expected, _ = updates_of(factory(**settings), make())
    got, state = updates_of(optax.inject_hyperparams(factory)(**settings), make())
    rtol = 1e-2 if "bfloat16" in name else 1e-4
    # Measured: 2e-6; 1 - beta is a float32 difference when beta is traced.
    chex.assert_trees_all_close(got, expected, rtol=rtol, atol=1e-5)
    numbers = {name for name, value in settings.items() if isinstance(value, float | np.ndarray)}
    assert numbers <= set(state.hyperparams)


def test_unguarded_coefficients_are_guarded_in_16_bits():
    rows = np.array(mc.ns_coefficients("cubic5"), np.float32)
    settings = {"ns_dtype": "bfloat16", "ns_coeffs": rows}
    plain = mc.scale_by_muon(**settings, ns_method="standard")
    expected, _ = updates_of(plain, matrices())
    got, _ = updates_of(optax.inject_hyperparams(mc.scale_by_muon)(**settings), matrices())
    chex.assert_trees_all_close(got, expected, rtol=2e-2, atol=2e-3)


def test_a_schedule_and_a_changed_rate_take_effect():
    schedule = optax.linear_schedule(0.0, 0.4, 4)
    got, _ = updates_of(optax.inject_hyperparams(mc.muon)(schedule), weights())
    expected, _ = updates_of(mc.muon(0.1), weights())
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)
    tx = optax.inject_hyperparams(mc.muon)(learning_rate=0.1)
    _, state = updates_of(tx, weights())
    state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    still, _ = jax.jit(tx.update)(weights(), state, weights())
    chex.assert_trees_all_equal(still, jax.tree.map(jnp.zeros_like, still))


def test_every_number_may_be_a_schedule():
    values = {"beta": 0.9, "eps": 1e-7, "adam_b1": 0.8, "consistent_rms": 0.2, "ns_steps": 4}
    schedules = {name: lambda _, value=value: value for name, value in values.items()}
    got, _ = updates_of(optax.inject_hyperparams(mc.muon)(0.1, **schedules), weights())
    expected, _ = updates_of(mc.muon(0.1, **values), weights())
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_settings_in_the_state_keep_their_digits_and_the_dtype_of_updates(dtype):
    settings: Any = {"learning_rate": 0.1, "weight_decay": 0.1}
    tx = optax.inject_hyperparams(mc.muon, hyperparam_dtype=jnp.float32)(**settings)
    got, state = updates_of(tx, weights(dtype))
    expected, _ = updates_of(mc.muon(**settings), weights(dtype))
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
    chex.assert_trees_all_close(got, expected, rtol=0.01, atol=1e-3)
    assert state.hyperparams["adam_b2"] == np.float32(0.999)


def test_bfloat16_settings_never_give_nan_silently():
    """optax before 0.2.8 casts them to the dtype of the parameters, where 0.999 is 1."""
    tx = optax.inject_hyperparams(mc.muon)(learning_rate=0.1)
    if optax.__version__ >= "0.2.8":
        chex.assert_tree_all_finite(updates_of(tx, weights(jnp.bfloat16))[0])
    else:
        with pytest.raises(TypeError, match=r"hyperparam_dtype=jnp\.float32"):
            tx.init(weights(jnp.bfloat16))


@pytest.mark.usefixtures("no_typecheck")
def test_bad_settings_raise_before_init():
    with pytest.raises(TypeError, match=r"muon: learning_rate must be .*; beta must be"):
        optax.inject_hyperparams(mc.muon)(learning_rate="1e-4", beta=1.5)


def test_a_partial_factory_keeps_its_functions():
    factory = functools.partial(mc.muon, weight_decay=0.5, weight_decay_mask=no_bias)
    zero = jax.tree.map(jnp.zeros_like, weights())
    tx = optax.inject_hyperparams(factory)(learning_rate=0.1)
    updates: Any = tx.update(zero, tx.init(weights()), weights())[0]
    chex.assert_trees_all_close(updates["experts"], -0.05 * weights()["experts"], rtol=1e-6)


SWEPT = {
    "learning_rate": [0.1, 0.2],
    "beta": [0.9, 0.99],
    "eps": [1e-8, 1e-3],
    "weight_decay": [0.0, 0.5],
    "consistent_rms": [0.1, 0.2],
    "adam_b1": [0.5, 0.9],
    "adam_learning_rate": [0.1, 0.3],
    "adam_weight_decay": [0.0, 0.5],
    "ns_steps": [2, 5],
    "ns_coeffs": [ROW, (2.0, -1.5, 0.5)],
}


def test_a_sweep_over_all_numbers_equals_its_members():
    def one(settings):
        tx = mc.muon(**settings)
        grads = jax.tree.map(jnp.sin, weights())
        return tx.update(grads, tx.init(weights()), weights())[0]

    together = jax.jit(jax.vmap(one))({name: jnp.array(x) for name, x in SWEPT.items()})
    for i in range(2):
        alone = jax.tree.map(lambda x, i=i: x[i], together)
        expected = jax.jit(lambda i=i: one({name: x[i] for name, x in SWEPT.items()}))()
        chex.assert_trees_all_close(alone, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("traced", ["coefficients", "steps"])
def test_traced_arguments_of_newton_schulz(traced):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 8)), jnp.float32)
    values = {"coefficients": jnp.array(ROW), "steps": jnp.int32(4)}
    known = {"coefficients": ROW, "steps": 4}
    del known[traced]
    got = jax.jit(lambda v: mc.newton_schulz(x, **{traced: v, **known}))(values[traced])
    np.testing.assert_allclose(got, mc.newton_schulz(x, ROW, steps=4), rtol=1e-5, atol=1e-6)


def test_a_traced_number_of_steps_needs_single_coefficients():
    with pytest.raises(TypeError, match="needs a single"):
        jax.jit(lambda n: mc.newton_schulz(jnp.eye(2), "you", steps=n))(3)
    with pytest.raises(TypeError, match="needs a single"):
        jax.jit(lambda n, c: mc.newton_schulz(jnp.eye(2), c, steps=n))(3, jnp.ones((2, 3)))


def test_a_gradient_through_a_traced_number_of_steps_raises():
    loss = lambda x, n: mc.newton_schulz(x, ROW, steps=n).sum()  # noqa: E731
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.jit(jax.grad(loss))(jnp.eye(2), 3)


def test_injected_settings_are_copied_and_pickled():
    """As cloudpickle does with the optimizer that has them."""
    settings = inspect.signature(mc.muon).bind(0.1).arguments
    for copied in (copy.deepcopy(settings), pickle.loads(pickle.dumps(settings))):
        assert float(copied["beta"]) == 0.95
        assert repr(copied["beta"]) == "0.95"
        assert jnp.asarray(copied["beta"]) == np.float32(0.95)

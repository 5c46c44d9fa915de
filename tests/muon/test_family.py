"""The settings of the Muon family: the spectral scale, injected hyperparameters and schedules."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from tests.support import reference
from tests.support.family_cases import TOLERANCE, draw, run

# The spectral scale.


@pytest.mark.parametrize("shape", [(2, 8), (8, 2), (3, 4, 9)])
def test_the_spectral_scale(shape):
    tx = mc.scale_by_shape(consistent_rms="spectral")
    (got,) = run(tx, [jnp.ones(shape)])
    np.testing.assert_allclose(got, np.full(shape, np.sqrt(shape[-1] / shape[-2])), rtol=1e-6)
    (row,) = mc.routing_table({"w": jnp.ones(shape)}, consistent_rms="spectral").rows
    assert row.scale == pytest.approx(np.sqrt(shape[-1] / shape[-2]))


def test_the_spectral_scale_in_both_optimizers():
    params = {"up": {"kernel": draw((8, 2), 0)}}
    for factory in (mc.muon, lambda *a, **k: mc.muonclip(*a, **k, threshold=None)):
        (a,) = run(factory(1.0, consistent_rms="spectral", weight_decay=0.0), [params], params)
        (b,) = run(factory(1.0, consistent_rms=None, weight_decay=0.0), [params], params)
        np.testing.assert_allclose(a["up"]["kernel"], 0.5 * b["up"]["kernel"], rtol=1e-6)


@pytest.mark.parametrize("factory", [mc.muon, mc.muonclip, mc.scale_by_shape])
def test_another_name_of_a_scale_raises(no_typecheck, factory):
    expected = "consistent_rms must be a number above 0 or 'spectral', got the string 'mup'"
    rate = {} if factory is mc.scale_by_shape else {"learning_rate": 1.0}
    with pytest.raises(TypeError, match=expected):
        factory(**rate, consistent_rms="mup")


# optax.inject_hyperparams.

INJECTED = {
    "add_cautious_weight_decay": ({"weight_decay": 0.1}, {"weight_decay"}),
    "normalize_matrices": ({"by": "outputs"}, set()),
    "normalize_neurons": ({"b2": 0.9}, {"b2", "eps"}),
    "scale_by_sinkhorn": ({"token_axis": -1}, {"beta", "tau"}),
    "muon": (
        {"learning_rate": 0.1, "neuron_b2": 0.9, "consistent_rms": "spectral"}
        | {"cautious_weight_decay": True, "weight_decay": 0.1, "overrides": {"w": mc.Sinkhorn()}},
        {"learning_rate", "neuron_b2"},
    ),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", INJECTED)
def test_inject_hyperparams(name, dtype):
    settings, numbers = INJECTED[name]
    params = {"w": draw((4, 6), 0, dtype), "up": draw((4, 6), 1, dtype)}
    grads = jax.tree.map(jnp.cos, params)
    factory = getattr(mc, name)
    tx = optax.inject_hyperparams(factory, hyperparam_dtype=jnp.float32)(**settings)
    assert numbers <= tx.init(params).hyperparams.keys()
    (got,), (expected,) = run(tx, [grads], params), run(factory(**settings), [grads], params)
    tolerance = 2 * TOLERANCE[dtype]
    for key in params:
        a, b = (np.float64(x[key]) for x in (got, expected))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


# Schedules.


def test_momentum_and_decay_follow_schedules():
    beta: Any = optax.join_schedules(
        [optax.linear_schedule(0.5, 0.9, 2), optax.linear_schedule(0.9, 0.5, 2)], [3]
    )
    decay: Any = optax.linear_schedule(0.3, 0.0, 4)
    rate: Any = optax.linear_schedule(0.1, 0.0, 6)
    params: Any = {"up": {"kernel": draw((4, 6), 9)}}
    tx = optax.inject_hyperparams(mc.muonclip)(
        rate,
        beta=beta,
        weight_decay=decay,
        nesterov=True,
        threshold=None,
        consistent_rms=None,
        adam_weight_decay=0.0,
    )
    state, step = tx.init(params), jax.jit(tx.update)
    W = np.float64(params["up"]["kernel"])
    M = np.zeros_like(W)
    for t in range(6):
        G = draw((4, 6), t)
        updates, state = step({"up": {"kernel": G}}, state, params)
        params = optax.apply_updates(params, updates)
        b, G = float(beta(t)), np.float64(G)
        M = b * M + (1 - b) * G
        O = reference.newton_schulz(b * M + (1 - b) * G, (reference.JORDAN,) * 5)  # noqa: E741
        W = W - float(rate(t)) * (np.sqrt(6 / 4) * O + float(decay(t)) * W)
        np.testing.assert_allclose(params["up"]["kernel"], W, rtol=1e-4, atol=1e-4)
    assert float(state.hyperparams["beta"]) == pytest.approx(float(beta(5)))

"""The Muon transform over several steps against float64, and the scale for the shape."""

from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import muonclip_jax as mc
from tests.support import reference
from tests.support.training_cases import assert_same_way, gradients, train


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (8, 8)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("beta", [0.95, 0.5, 0.0])
def test_six_steps_equal_the_reference(shape, nesterov, beta):
    g = gradients(shape)
    w = np.zeros(shape, np.float32)
    tx = optax.chain(
        mc.scale_by_muon(beta=beta, nesterov=nesterov), mc.scale_by_shape(), optax.scale(-0.1)
    )
    expected = reference.muon(
        w, g, learning_rate=0.1, beta=beta, nesterov="optax" if nesterov else None
    )
    assert_same_way(train(tx, w, g), expected, w)


@pytest.mark.parametrize("preconditioning", ["frobenius", "spectral", "schatten", "aol"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_six_steps_equal_the_reference_in_every_variant(preconditioning, adaptive):
    g = gradients((6, 9))
    w = np.zeros((6, 9), np.float32)
    settings = {"preconditioning": preconditioning, "adaptive": adaptive}
    tx = optax.chain(mc.scale_by_muon("you", **settings), mc.scale_by_shape(), optax.scale(-0.1))
    rows = mc.ns_coefficients("you")
    expected = reference.muon(w, g, learning_rate=0.1, rows=rows, **settings)
    assert_same_way(train(tx, w, g), expected, w)


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_stack_is_trained_matrix_by_matrix(adaptive):
    g = gradients((3, 6, 9))
    w = np.zeros((3, 6, 9), np.float32)
    tx = mc.scale_by_muon(adaptive=adaptive)
    together = train(tx, w, g)
    for i in range(3):
        alone = train(tx, w[i], [x[i] for x in g])
        assert_same_way([x[i] for x in together], alone, w[i], 1e-5)


@pytest.mark.parametrize(
    ("shape", "numbers", "order", "matrix"),
    [
        ((4, 2, 3), mc.MuonDimensionNumbers(0, (1, 2)), (0, 1, 2), (4, 6)),
        ((2, 3, 4), mc.MuonDimensionNumbers((0, 1), 2), (0, 1, 2), (6, 4)),
        ((3, 4, 2), mc.MuonDimensionNumbers(-2, (-1, -3)), (1, 2, 0), (4, 6)),
        ((6, 4), mc.MuonDimensionNumbers(1, 0), (1, 0), (4, 6)),
    ],
)
def test_dimension_numbers_name_inputs_and_outputs(shape, numbers, order, matrix):
    g = gradients(shape)
    w = np.zeros(shape, np.float32)
    tx = optax.chain(mc.scale_by_muon(weight_dimension_numbers=numbers), mc.scale_by_shape(numbers))
    got = [x.transpose(order).reshape(matrix) for x in train(tx, w, g)]
    flat = [x.transpose(order).reshape(matrix) for x in g]
    expected = reference.muon(np.zeros(matrix), flat, learning_rate=-1.0)
    assert_same_way(got, expected, np.zeros(matrix))


def test_per_head_is_a_choice_of_dimension_numbers():
    g = gradients((8, 2, 3))
    w = np.zeros((8, 2, 3), np.float32)
    together = train(mc.scale_by_muon(weight_dimension_numbers=mc.MuonDimensionNumbers(0, 2)), w, g)
    for head in range(2):
        alone = train(mc.scale_by_muon(), w[:, head], [x[:, head] for x in g])
        assert_same_way([x[:, head] for x in together], alone, w[:, head], 1e-5)


@pytest.mark.parametrize("ns_coeffs", [(2.0, -1.5, 0.5), "dion", mc.ns_coefficients("you", 3)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_optax_where_the_settings_coincide(ns_coeffs, nesterov):
    g = gradients((8, 8))
    w = np.zeros((8, 8), np.float32)
    ours = mc.scale_by_muon(ns_coeffs, nesterov=nesterov)
    rows = mc.ns_coefficients("you") if ns_coeffs == "dion" else ns_coeffs
    steps = len(rows) if isinstance(rows[0], tuple) else 5
    theirs = contrib.scale_by_muon(
        rows,
        steps,
        nesterov=nesterov,
        weight_dimension_numbers=contrib.MuonDimensionNumbers(),
    )
    # Measured: 2e-5, and optax's own 1e-8 is not relative to gradients of 1e-6.
    assert_same_way(train(ours, w, g), train(theirs, w, g), w, 3e-4)


def test_ns_steps_applies_to_single_coefficients_only():
    g = gradients((5, 7), steps=1)
    w = np.zeros((5, 7), np.float32)
    jordan = (3.4445, -4.7750, 2.0315)
    for steps in (1, 4, 7):
        got = train(mc.scale_by_muon(jordan, steps), w, g)[0]
        expected = -reference.muon(w, g, learning_rate=1.0, rows=(jordan,) * steps)[0] / np.sqrt(
            1.4
        )
        assert reference.relative_error(got, expected) < 2e-5
    for table in ("you", mc.ns_coefficients("you")):
        chex.assert_trees_all_equal(
            train(mc.scale_by_muon(table, 2), w, g), train(mc.scale_by_muon("you"), w, g)
        )


@pytest.mark.parametrize("n_out", [2, 4, 16])
@pytest.mark.parametrize("consistent_rms", [None, 0.2, 0.18])
def test_scale_by_shape(n_out, consistent_rms):
    tx = mc.scale_by_shape(consistent_rms=consistent_rms)
    got: Any = tx.update({"w": jnp.ones((3, 4, n_out))}, tx.init({}))[0]
    if consistent_rms is None:
        expected = np.sqrt(max(1.0, n_out / 4))
    else:
        expected = consistent_rms * np.sqrt(max(4, n_out))
    np.testing.assert_allclose(np.asarray(got["w"]), np.full((3, 4, n_out), expected), rtol=1e-6)


def test_consistent_rms_is_the_root_mean_square_of_the_update():
    g = np.random.default_rng(0).normal(size=(64, 160)).astype(np.float32)
    tx = optax.chain(mc.scale_by_muon("polar_express_6"), mc.scale_by_shape(consistent_rms=0.2))
    u, _ = tx.update(g, tx.init(g))
    # Singular values in 0.989 .. 1.001 leave the rest.
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(np.asarray(u)))), 0.2, rtol=6e-3)


def test_state_holds_count_and_average_and_no_setting():
    g = gradients((4, 6), steps=3)
    tx = mc.scale_by_muon(beta=0.8)
    state = tx.init(g[0])
    assert isinstance(state, mc.ScaleByMuonState)
    assert state._fields == ("count", "mu")
    mu = np.zeros((4, 6))
    for i, x in enumerate(g, start=1):
        _, state = tx.update(x, state)
        mu = 0.8 * mu + 0.2 * x.astype(np.float64)
        assert int(state.count) == i
        np.testing.assert_allclose(state.mu, mu, rtol=1e-5, atol=1e-9)


def test_bfloat16_momentum_is_rounded_once_a_step():
    g = gradients((4, 6), steps=4)
    tx = mc.scale_by_muon(mu_dtype=jnp.bfloat16)
    state = tx.init(g[0])
    mu = np.zeros((4, 6), np.float32)
    for x in g:
        _, state = tx.update(x, state)
        mu = np.asarray(jnp.asarray(0.95 * mu + 0.05 * x, jnp.bfloat16), np.float32)
        # Measured: equal except for ties of the last bit.
        np.testing.assert_allclose(np.asarray(state.mu, np.float32), mu, rtol=2**-7)
    assert state.mu.dtype == jnp.bfloat16

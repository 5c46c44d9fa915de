"""Sinkhorn normalization of tables equals its equation in float64, also as an override."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support import reference_family
from tests.support.family_cases import (
    DTYPES,
    SHAPES,
    assert_equal,
    draw,
    each_matrix,
    gradients,
    run,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_sinkhorn_equals_its_equation(name, dtype):
    updates = [g.at[..., 0, :].multiply(1e-5) for g in gradients(SHAPES[name], dtype)]
    got = run(mc.scale_by_sinkhorn(mu_dtype=jnp.float32), updates)
    expected = each_matrix(reference_family.sinkhorn, updates)
    assert not np.any(expected[0][..., 0, :])
    assert_equal(got, expected, dtype)


def test_sinkhorn_of_a_head_is_that_of_its_transpose():
    updates = gradients((6, 4))
    params = {"wte": updates[0], "head": updates[0].T}
    tx = mc.scale_by_sinkhorn({"wte": -2, "head": -1})
    for got in run(tx, [{"wte": g, "head": g.T} for g in updates], params):
        np.testing.assert_allclose(got["head"], got["wte"].T, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_sinkhorn_has_no_scale(scale):
    G = draw((6, 4), 0).at[2].set(0)
    tx = mc.scale_by_sinkhorn()
    (expected,), (got,) = run(tx, [G]), run(tx, [scale * G])
    # Measured: 1e-6.
    np.testing.assert_allclose(got, expected if scale else 0 * G, rtol=1e-5)
    assert not np.any(got[2])


def test_sinkhorn_returns_nan_for_nan():
    got = run(mc.scale_by_sinkhorn(), [draw((6, 4), 0).at[1, 1].set(jnp.nan)])
    assert np.any(np.isnan(got[0]))


@pytest.mark.parametrize("bad", [0, 1, -3, "rows"])
def test_sinkhorn_rejects_other_token_axes(no_typecheck, bad):
    for make in (mc.Sinkhorn, mc.scale_by_sinkhorn):
        with pytest.raises(ValueError, match="token_axis must be -2 for"):
            make(bad)


def test_sinkhorn_rejects_leaves_that_are_no_tables():
    with pytest.raises(ValueError, match=r"1 of 2 leaves are no tables(.|\n)*bias: float32\[3\]"):
        mc.scale_by_sinkhorn().init({"wte": jnp.ones((4, 2)), "bias": jnp.ones(3)})


def test_sinkhorn_rejects_gradients_of_other_shapes():
    tx = mc.scale_by_sinkhorn()
    state = tx.init({"wte": jnp.ones((4, 2))})
    message = r"scale_by_sinkhorn(.|\n)*got \(1, 2\), expected \(4, 2\)"
    with pytest.raises(ValueError, match=message):
        tx.update({"wte": jnp.ones((1, 2))}, state)


def _model():
    return {
        "wte": draw((9, 4), 0),
        "lm_head": {"kernel": draw((4, 9), 1)},
        "up": {"kernel": draw((4, 6), 2), "bias": draw((6,), 3)},
    }


TABLES = {"wte": mc.Sinkhorn(), "lm_head/*": mc.Sinkhorn(-1)}


def test_overrides_assign_tables_to_sinkhorn_and_nothing_else():
    params, grads = _model(), jax.tree.map(jnp.cos, _model())
    rates: dict[str, Any] = {"learning_rate": 0.5, "adam_learning_rate": 0.1, "weight_decay": 0.3}
    plain, tables = mc.muon(**rates), mc.muon(**rates, adam_weight_decay=0.3, overrides=TABLES)
    (before,), (got,) = run(plain, [grads], params), run(tables, [grads], params)
    for name, G in (("wte", grads["wte"]), ("lm_head", grads["lm_head"]["kernel"].T)):
        expected = -0.1 * 0.18 * reference_family.sinkhorn([G])[0]
        found = got["wte"] if name == "wte" else got["lm_head"]["kernel"].T
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_array_equal(got["up"]["kernel"], before["up"]["kernel"])
    sizes = [sum(x.size for x in jax.tree.leaves(tx.init(params))) for tx in (plain, tables)]
    assert sizes[0] - sizes[1] == 2 * 36  # one buffer fewer for each table


def test_routing_table_prints_sinkhorn():
    text = str(mc.routing_table(_model(), overrides=TABLES))
    assert "wte (9, 4) sinkhorn - - override 'wte'" in " ".join(text.split())
    assert text.endswith("sinkhorn: 2 leaves, 72 parameters")


def test_sinkhorn_override_of_a_vector_raises():
    with pytest.raises(ValueError, match=r"up/bias \(6,\): Sinkhorn\(token_axis=-2\) needs"):
        mc.routing_table(_model(), overrides={"up/bias": mc.Sinkhorn()})


def test_a_state_without_sinkhorn_raises():
    params = _model()
    tx = mc.muon(0.1, overrides=TABLES)
    with pytest.raises(ValueError, match="wte: now Sinkhorn, AdamW in the state"):
        tx.update(params, mc.muon(0.1).init(params), params)
    with pytest.raises(ValueError, match="wte: now AdamW, Sinkhorn in the state"):
        mc.muon(0.1).update(params, tx.init(params), params)

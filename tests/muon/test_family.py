"""The transforms of the Muon family equal their equations in float64, leaf by leaf."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from tests.support import reference, reference_family
from tests.support.by_day import by_day

DTYPES = by_day([jnp.float32, jnp.bfloat16, jnp.float16], jnp.float32, jnp.bfloat16)
# Half a unit in the last place of the result, beside 1e-5 of float32.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11 + 1e-4}
SHAPES = {"wide": (3, 7), "tall": (7, 3), "stacked": (2, 4, 5)}


def draw(shape, seed, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def gradients(shape, dtype=jnp.float32, steps=3):
    return [draw(shape, seed, dtype) for seed in range(steps)]


def run(tx, updates, params=None):
    """Returns the updates of a transform in order."""
    state, found = tx.init(params if params is not None else updates[0]), []
    update = jax.jit(tx.update)
    for u in updates:
        u, state = update(u, state, params)
        found.append(u)
    return found


def assert_equal(got, expected, dtype=jnp.float32):
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(g, np.float64), e, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


def each_matrix(oracle, updates, **settings):
    """Applies an oracle of one matrix to every matrix of stacked leaves."""
    stacks = [np.array(u, dtype=np.float64).reshape(-1, *u.shape[-2:]) for u in updates]
    found = [oracle([s[i] for s in stacks], **settings) for i in range(len(stacks[0]))]
    return [np.stack(step).reshape(updates[0].shape) for step in zip(*found, strict=True)]


# Cautious weight decay.


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


# NorMuon.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_normuon_equals_its_equation(name, dtype):
    updates = gradients(SHAPES[name], dtype)
    got = run(mc.normalize_neurons(0.9), updates)
    assert_equal(got, each_matrix(reference_family.normuon, updates, b2=0.9), dtype)


def test_normuon_keeps_one_number_for_each_output():
    params = {"up": draw((2, 3, 5), 0, jnp.bfloat16), "out": draw((2, 4, 6), 1)}
    numbers = {"up": mc.MuonDimensionNumbers(-2, -1), "out": mc.MuonDimensionNumbers((-3, -2), -1)}
    state = mc.normalize_neurons(weight_dimension_numbers=numbers).init(params)
    assert state.nu["up"].shape == (2, 1, 5)
    assert state.nu["up"].dtype == jnp.float32
    assert state.nu["out"].shape == (1, 1, 6)


@pytest.mark.parametrize("eps", [0.0, 1e-10])
def test_normuon_of_zero_outputs_is_zero(eps):
    O = draw((4, 3), 0).at[:, 1].set(0)  # noqa: E741
    tx = mc.normalize_neurons(0.9, eps)
    for got in (*run(tx, [O, O]), *run(tx, [jnp.zeros((4, 3))])):
        assert np.all(np.isfinite(got))
        np.testing.assert_array_equal(got[:, 1], 0)


def test_normuon_of_heads_keeps_the_norm_of_each():
    layout = mc.MultiHeadLayout(kernel="inputs (heads head_dim)", head_dim=3)
    kernels = {"query": {"kernel": draw((4, 6), 0)}, "key": {"kernel": draw((4, 3), 1)}}
    params = {"attn": kernels}
    tx = mc.normalize_neurons(0.9, per_head=layout)
    (got,) = run(tx, [params])
    heads = np.split(np.asarray(kernels["query"]["kernel"]), 2, axis=1)
    expected = np.concatenate([reference_family.normuon([h], b2=0.9)[0] for h in heads], axis=1)
    np.testing.assert_allclose(got["attn"]["query"]["kernel"], expected, rtol=1e-5)
    assert tx.init(params).nu["attn"]["query"]["kernel"].shape == (1, 6)


def test_muon_puts_normuon_between_orthogonalization_and_scale():
    params = {"up": {"kernel": draw((3, 7), 0)}}
    steps = [{"up": {"kernel": draw((3, 7), seed)}} for seed in (1, 2)]
    chain = optax.chain(
        mc.scale_by_muon(), mc.normalize_neurons(0.9), mc.scale_by_shape(), optax.scale(-0.1)
    )
    got, expected = run(mc.muon(0.1, neuron_b2=0.9), steps, params), run(chain, steps, params)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a["up"]["kernel"], b["up"]["kernel"], rtol=1e-6)


@pytest.mark.parametrize("layout", ["per head", "latent"])
def test_normuon_of_heads_in_muon(layout):
    if layout == "per head":
        layout = mc.MultiHeadLayout(kernel="inputs (heads head_dim)", head_dim=3)
        kernels = {"query": draw((4, 6), 0), "key": draw((4, 3), 1)}
    else:
        flat = "inputs (heads head_dim)"
        layout = mc.MLALayout(nope_dim=2, rope_dim=1, value_dim=2, kernel=flat)
        kernels = {"q_b": draw((4, 6), 0), "kv_b": draw((5, 8), 1)}
    params = {"attn": {name: {"kernel": x} for name, x in kernels.items()}}
    heads: dict[str, Any] = {"per_head": layout}
    chain = optax.chain(
        mc.scale_by_muon(**heads),
        mc.normalize_neurons(0.9, **heads),
        mc.scale_by_shape(**heads),
        optax.scale(-0.1),
    )
    got = run(mc.muon(0.1, neuron_b2=0.9, **heads), [params] * 2, params)
    expected = run(chain, [params] * 2, params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


# MuonEq and Muon+.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("by", ["inputs", "outputs", "matrix"])
def test_normalized_matrices_equal_their_equation(by, name, dtype):
    X = draw(SHAPES[name], 0, dtype)
    oracle = {"matrix": lambda x: [reference_family.renormalized(x[0])]}.get(
        by, lambda x: [reference_family.equilibrated(x[0], by)]
    )
    assert_equal(run(mc.normalize_matrices(by), [X]), each_matrix(oracle, [X]), dtype)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("by", ["inputs", "outputs", "matrix"])
def test_normalized_matrices_have_no_scale(by, scale):
    X = draw((3, 4), 0).at[1].set(0).at[:, 2].set(0)
    tx = mc.normalize_matrices(by)
    (expected,), (got,) = run(tx, [X]), run(tx, [scale * X])
    np.testing.assert_allclose(got, expected if scale else 0 * X, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
@pytest.mark.parametrize("by", ["inputs", "outputs"])
def test_equilibration_precedes_the_orthogonalization(by, shape):
    sizes = jnp.logspace(-2, 2, shape[by == "outputs"])
    G = draw(shape, 0) * (sizes[None] if by == "outputs" else sizes[:, None])
    (got,) = run(mc.scale_by_muon(preconditioning=by, nesterov=False, beta=0.0), [G])
    X = reference_family.equilibrated(G, by)
    expected = reference.newton_schulz(X, (reference.JORDAN,) * 5)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_equilibration_of_heads_is_of_each_head():
    layout = mc.MultiHeadLayout(kernel="inputs heads head_dim")
    kernel = draw((4, 2, 3), 0) * jnp.array([1.0, 100.0])[None, :, None]
    params = {"attn": {"query": {"kernel": kernel}, "key": {"kernel": kernel}}}
    tx = mc.scale_by_muon(preconditioning="inputs", per_head=layout, nesterov=False, beta=0.0)
    (got,) = run(tx, [params])
    for head in range(2):
        X = reference_family.equilibrated(kernel[:, head], "inputs")
        expected = reference.newton_schulz(X, (reference.JORDAN,) * 5)
        np.testing.assert_allclose(got["attn"]["query"]["kernel"][:, head], expected, atol=1e-5)


def test_newton_schulz_has_no_equilibration():
    with pytest.raises(ValueError, match="preconditioning must be one of 'frobenius'"):
        mc.newton_schulz(jnp.ones((2, 3)), preconditioning="outputs")


# Sinkhorn.


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

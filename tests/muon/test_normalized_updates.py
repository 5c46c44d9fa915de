"""NorMuon, MuonEq and Muon+ equal their equations in float64, leaf by leaf."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from tests.support import reference, reference_family
from tests.support.family_cases import (
    DTYPES,
    SHAPES,
    assert_equal,
    draw,
    each_matrix,
    gradients,
    run,
)

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

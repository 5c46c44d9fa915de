"""Newton-Schulz against the singular value decomposition, in every dtype and at every scale."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from muonclip_jax._orthogonalize.newton_schulz import Orthogonalizer
from tests.support import reference
from tests.support.iteration_cases import DISTINCT, products

SHAPES = [(1, 1), (1, 7), (7, 1), (7, 5), (16, 16), (64, 128), (128, 64), (127, 257)]
PRECONDITIONINGS = ("frobenius", "spectral", "schatten", "aol")


def _matrix(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _well_conditioned(m, n, seed=0):
    """Singular values from 0.1 to 1, so that float32 loses nothing in the directions."""
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.normal(size=(m, min(m, n))))
    v, _ = np.linalg.qr(rng.normal(size=(n, min(m, n))))
    return ((u * np.linspace(0.1, 1, min(m, n))) @ v.T).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DISTINCT)
def test_equals_the_polynomial_of_the_singular_values(name, shape):
    x = _well_conditioned(*shape)
    expected = reference.newton_schulz(x, mc.ns_coefficients(name))
    # cubic5 amplifies errors 240 times at one, the only singular value of a matrix with one row.
    # Measured: 2.01e-5, and 1.6e-5 elsewhere.
    tolerance = 1e-4 if name == "cubic5" and min(shape) == 1 else 2e-5
    got = mc.newton_schulz(x, name, method="standard")
    assert reference.relative_error(got, expected) < tolerance


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (64, 128)])
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_preconditionings_equal_their_definition(preconditioning, shape, dtype):
    x = _well_conditioned(*shape).astype(dtype)
    if dtype is np.complex64:
        x = x + 1j * _well_conditioned(*shape, seed=1)
    got = mc.newton_schulz(x, "you", preconditioning=preconditioning)
    expected = reference.newton_schulz(x, mc.ns_coefficients("you"), preconditioning)
    assert reference.relative_error(got, expected) < 2e-5


def test_complex_matrices_become_unitary():
    x = _matrix((6, 4)) + 1j * _matrix((6, 4), 1)
    y = np.asarray(mc.newton_schulz(x, (2.0, -1.5, 0.5), steps=20))
    np.testing.assert_allclose(y.conj().T @ y, np.eye(4), atol=1e-5)


@pytest.mark.parametrize("batch", [(3,), (2, 3)])
@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
def test_a_batch_equals_its_slices(batch, preconditioning):
    x = _matrix((*batch, 6, 9))
    got = mc.newton_schulz(x, preconditioning=preconditioning)
    for index in np.ndindex(*batch):
        one = mc.newton_schulz(x[index], preconditioning=preconditioning)
        assert reference.relative_error(got[index], one) < 2e-5


def test_a_batched_product_equals_separate_ones(monkeypatch):
    x = _matrix((2, 3, 6, 9))
    separate = mc.newton_schulz(x, dtype=jnp.float32)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert reference.relative_error(mc.newton_schulz(x, dtype=jnp.float32), separate) < 2e-5


@hypothesis.given(
    seed=st.integers(0, 2**31), exponent=st.integers(-90, 90), sign=st.sampled_from([1, -1])
)
def test_sign_and_powers_of_two_are_exact(seed, exponent, sign):
    x = _matrix((6, 9), seed)
    scaled = sign * np.ldexp(x, exponent)
    np.testing.assert_array_equal(mc.newton_schulz(scaled), sign * mc.newton_schulz(x))


@hypothesis.given(seed=st.integers(0, 2**31))
def test_commutes_with_transposition_rotation_and_permutation(seed):
    x = _well_conditioned(9, 6, seed)
    q, _ = np.linalg.qr(_matrix((9, 9), seed + 1))
    p = np.random.default_rng(seed).permutation(6)
    y = np.asarray(mc.newton_schulz(x))
    assert reference.relative_error(mc.newton_schulz(x.T), y.T) < 2e-5
    assert reference.relative_error(mc.newton_schulz(q @ x), q @ y) < 2e-5
    assert reference.relative_error(mc.newton_schulz(x[:, p]), y[:, p]) < 2e-5


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
@pytest.mark.parametrize("backend", ["cpu", "gpu"])  # one by one, and in one batch
def test_the_scale_of_a_matrix_does_not_matter(preconditioning, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    scales = (1e38, 1e30, 1e20, 1e19, 1.0, 1e-10, 1e-20, 1e-30, 1e-33)
    x = _matrix((12, 20))
    x /= np.abs(x).max()
    stack = jnp.stack([x * np.float32(s) for s in scales])
    settings = {"preconditioning": preconditioning, "dtype": jnp.float32}
    expected = mc.newton_schulz(x, **settings)
    for y in mc.newton_schulz(stack, **settings):
        assert reference.relative_error(y, expected) < 2e-4


@pytest.mark.parametrize("scale", [1e-38, 1e-40, 1e-44])
def test_denormal_matrices_stay_finite(scale):
    assert np.all(np.isfinite(mc.newton_schulz(_matrix((4, 6)) * np.float32(scale))))


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])  # one by one, and in one batch
def test_a_zero_or_broken_matrix_affects_no_other(preconditioning, eps, bad, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    settings = {"preconditioning": preconditioning, "eps": eps, "dtype": jnp.float32}
    x = _matrix((3, 6, 9))
    clean = np.asarray(mc.newton_schulz(x, **settings))
    x[1] = 0.0
    x[1, 2, 3] = bad
    got = np.asarray(mc.newton_schulz(x, **settings))
    np.testing.assert_array_equal(got[[0, 2]], clean[[0, 2]])
    if bad == 0.0:
        np.testing.assert_array_equal(got[1], np.zeros((6, 9)))
    else:
        assert not np.all(np.isfinite(got[1]))


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bit_compute_stays_bounded(name, dtype):
    # Gaussian, decaying, and rank one with noise: the last is where a norm above one explodes.
    decaying = _well_conditioned(64, 128) * np.geomspace(1, 1e-3, 128, dtype=np.float32)
    rank_one = _matrix((64, 1)) @ _matrix((1, 128), 1) + 1e-3 * _matrix((64, 128), 2)
    for x in (_matrix((64, 128)), decaying, rank_one, _matrix((128, 128), 3)):
        y = np.asarray(mc.newton_schulz(x, name, dtype=dtype))
        # Measured: 1.301 for cubic5, whose range ends at 1.300, and 1.21 for the others.
        assert np.linalg.svd(y, compute_uv=False).max() < 1.32
        u, _, vh = np.linalg.svd(x, full_matrices=False)
        assert u[:, 0] @ y @ vh[0] > 0.6  # the leading direction keeps its sign and size


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bit_input_is_computed_in_float32_on_cpu_and_rounded_once(dtype):
    x = jnp.asarray(_matrix((64, 128)), dtype)
    expected = mc.newton_schulz(x.astype(jnp.float32)).astype(dtype)
    got = mc.newton_schulz(x)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("scale", [300.0, 1.0, 1e-3, 1e-7])
def test_float16_at_the_ends_of_its_range(scale):
    x = jnp.asarray(_matrix((512, 512)) * np.float32(scale), jnp.float16)
    got = np.asarray(mc.newton_schulz(x), np.float32)
    expected = np.asarray(mc.newton_schulz(x.astype(jnp.float32)))
    cosine = np.vdot(got, expected) / np.linalg.norm(got) / np.linalg.norm(expected)
    assert cosine > 0.99


def test_rank_deficient_matrix():
    x = _matrix((64, 8)) @ _matrix((8, 128), 1)
    expected = reference.newton_schulz(x, mc.ns_coefficients("jordan"))
    # Measured: 2e-5; rounding noise in the null space is amplified by the slope at 0, 485.
    assert reference.relative_error(mc.newton_schulz(x), expected) < 1e-4


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(20, 30))
        y = mc.newton_schulz(jnp.asarray(x), eps=0.0)
        assert y.dtype == jnp.float64
        expected = reference.newton_schulz(x, mc.ns_coefficients("jordan"))
        assert reference.relative_error(y, expected) < 1e-12


def test_float32_products_request_the_highest_precision():
    jaxpr = jax.make_jaxpr(mc.newton_schulz)(jnp.ones((3, 4, 6)))
    found = list(products(jaxpr.jaxpr))
    assert len(found) == 15  # three a step
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert all(product.params["precision"] == highest for product in found)


def test_sixteen_bit_products_accumulate_in_float32():
    jaxpr = jax.make_jaxpr(lambda x: mc.newton_schulz(x, dtype=jnp.bfloat16))(jnp.ones((4, 6)))
    found = list(products(jaxpr.jaxpr))
    assert len(found) == 15
    for product in found:
        assert product.params["preferred_element_type"] == jnp.float32
        assert all(v.aval.dtype == jnp.bfloat16 for v in product.invars)


def test_compute_dtype_follows_the_backend(monkeypatch):
    compute_dtype = Orthogonalizer(mc.ns_coefficients("jordan")).compute_dtype
    assert compute_dtype(jnp.float32) == jnp.float32
    for backend in ("tpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert compute_dtype(jnp.float32) == jnp.bfloat16
        assert compute_dtype(jnp.complex64) == jnp.complex64


def test_works_under_strict_promotion(strict_promotion):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64):
        assert mc.newton_schulz(jnp.ones((3, 4), dtype)).dtype == dtype
    for preconditioning in PRECONDITIONINGS:
        y = mc.newton_schulz(
            jnp.ones((3, 4)), "cubic5", dtype=jnp.bfloat16, preconditioning=preconditioning
        )
        assert y.dtype == jnp.float32


def test_vmap_and_grad_go_through():
    x = jnp.asarray(_matrix((3, 4, 6)))
    mapped = jax.vmap(mc.newton_schulz)(x)
    assert reference.relative_error(mapped, mc.newton_schulz(x)) < 2e-5
    assert np.all(np.isfinite(jax.grad(lambda x: mc.newton_schulz(x).sum())(x)))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4)])
def test_empty_matrices_pass(shape):
    assert mc.newton_schulz(jnp.zeros(shape)).shape == shape


@pytest.mark.usefixtures("no_typecheck")
@pytest.mark.parametrize(
    ("x", "kwargs", "error", "message"),
    [
        (np.ones(3), {}, ValueError, r"at least two axes, got shape \(3,\)"),
        (np.ones((3, 3), np.int32), {}, TypeError, "must be floating or complex, got int32"),
        (np.ones((3, 3)), {"method": "qr"}, ValueError, "method must be one of 'auto'"),
        (np.ones((3, 3)), {"preconditioning": "l1"}, ValueError, "preconditioning must be one of"),
        (
            np.ones((3, 3)),
            {"coefficients": "nobody"},
            ValueError,
            "coefficients must be .* got 'nobody'",
        ),
        (np.ones((3, 3)), {"steps": 0}, ValueError, "at least 1, got 0"),
        (np.ones((3, 3)), {"dtype": jnp.int8}, TypeError, "dtype must be 'auto' or .* got int8"),
        (
            np.ones((3, 3)),
            {"dtype": jnp.float8_e4m3fn},
            TypeError,
            "dtype must be 'auto' or .* got float8",
        ),
        (1j * np.ones((3, 3)), {"dtype": jnp.float32}, TypeError, "cannot be computed in float32"),
    ],
)
def test_bad_arguments_raise(x, kwargs, error, message):
    x = x.astype({"f": np.float32, "c": np.complex64}.get(x.dtype.kind, x.dtype))
    with pytest.raises(error, match=message):
        mc.newton_schulz(jnp.asarray(x), **kwargs)

"""The kernel of symmetric products for GPUs, interpreted, against float64."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from muonclip_jax import _orthogonalize
from muonclip_jax._orthogonalize import gpu_kernel
from muonclip_jax._orthogonalize.newton_schulz import orthogonalizer
from muonclip_jax._orthogonalize.tiles import Tiles
from tests.support.iteration_cases import spectra
from tests.support.kernel_cases import kernel_flops, leakage, small_gpu_tiles

nightly = pytest.mark.nightly

TILES = Tiles(16, 16, 16)
PARTIAL = (2, 40, 56)  # three tiles a side, the last partial, and a remainder of terms
SHAPES = [(16, 16), (32, 48), (3, 2, 7, 20), (33, 100)]
H100, EPS = "NVIDIA H100 80GB HBM3", 1e-8


def _wide(x):
    return np.asarray(x, np.float64)


def _draw(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _rounding(dtype):
    """Largest error of one rounding and of the sums."""
    return {jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11, jnp.float32: 2e-6}[dtype]


def _check_gram_matrix(shape, dtype):
    *stack, n, m = shape
    X, r = _draw(shape, dtype), _draw((*stack, 1, 1), jnp.float32, seed=1) + m
    got = _wide(gpu_kernel.gram_matrix(X, r, TILES))
    expected = _wide(X) @ _wide(X).mT - _wide(r) * np.eye(n)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1.01 * _rounding(dtype) * np.abs(expected).max()
    np.testing.assert_array_equal(got, got.mT)


def _check_product(shape, dtype, same):
    """Symmetric matrices that commute, with norms of about one."""
    *stack, n, _ = shape
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.normal(size=(*stack, n, n)))[0]
    A, B = (jnp.asarray((Q * x) @ Q.mT, dtype) for x in rng.uniform(0.1, 1, (2, *stack, 1, n)))
    B = A if same else B
    a, b = 0.7, jnp.asarray(rng.normal(size=(*stack, 1, 1)), jnp.float32)
    terms = a * _wide(A), _wide(b) * _wide(B), -1.3 * _wide(A) @ _wide(B)
    size = max(np.abs(term).max() for term in terms)
    got = _wide(gpu_kernel.product(a, A, b, B, -1.3, TILES))
    # Terms may cancel, so errors are relative to them. The lower half is B A, which differs as A
    # and B commute up to rounding only.
    assert np.abs(got - sum(terms)).max() <= 2 * _rounding(dtype) * size


def test_gram_matrix_equals_float64():
    _check_gram_matrix(PARTIAL, jnp.bfloat16)


@nightly
def test_product_of_symmetric_matrices_equals_float64():
    _check_product(PARTIAL, jnp.bfloat16, same=False)


def test_tiles_on_and_above_the_diagonal_are_those_of_the_product():
    """Not of A Bᵀ: rounding breaks the symmetry of the tiles on the diagonal of B."""
    A, B = (_draw((40, 40), jnp.float32, seed) for seed in (0, 1))
    expected = 0.7 * _wide(A) - 0.2 * _wide(B) - 1.3 * _wide(A) @ _wide(B)
    tile = np.arange(40) // TILES.side
    above = tile[:, None] <= tile[None, :]
    got = gpu_kernel.product(0.7, A, -0.2, B, -1.3, TILES)
    np.testing.assert_allclose(got, np.where(above, expected, expected.T), rtol=0, atol=1e-4)


@nightly
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("shape", [PARTIAL, *SHAPES])
def test_gram_matrix_of_every_shape_equals_float64(shape, dtype):
    _check_gram_matrix(shape, dtype)


@nightly
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [PARTIAL, *SHAPES])
def test_product_of_every_shape_equals_float64(shape, dtype, same):
    _check_product(shape, dtype, same)


@nightly
def test_unrounded_gram_matrix_is_float32():
    X = _draw(PARTIAL, jnp.bfloat16)
    got = gpu_kernel.gram_matrix(X, 0.0, TILES, jnp.float32)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, _wide(X) @ _wide(X).mT, rtol=0, atol=2e-6 * PARTIAL[-1])


@nightly
def test_nan_stays_in_its_matrix():
    """Beside a partial tile are rows of the next matrix and columns of the next row."""
    X = jnp.stack([_draw((7, 20), jnp.float32), jnp.full((7, 20), jnp.nan)])
    got = gpu_kernel.gram_matrix(X, 0.0, TILES)[0]
    np.testing.assert_allclose(got, _wide(X[0]) @ _wide(X[0]).T, rtol=0, atol=1e-4)


def _on_h100(
    coefficients="jordan", steps=None, method="auto", dtype=jnp.float32, products="pallas"
):
    """Newton-Schulz as on an H100; the kernel is interpreted, as this is a CPU."""
    made = orthogonalizer(coefficients, steps, method, dtype, "frobenius", products)
    return made.on("gpu", H100)


def test_newton_schulz_equals_that_of_xla():
    x = _draw((52, 72), jnp.float32)
    with small_gpu_tiles():
        got = _on_h100(method="gram", steps=2)(x, EPS)
    expected = _on_h100(method="gram", steps=2, products="xla")(x, EPS)
    assert np.any(got != expected)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_flops_are_those_of_the_program():
    n, m, s = 96, 192, 6 / 9  # tiles on and below the diagonal, of 3 x 3
    with small_gpu_tiles():
        settings = _on_h100(method="standard")
        jaxpr = jax.make_jaxpr(settings)(jnp.ones((n, m)), EPS)
        planned = settings.flops(n, m, jnp.float32)
    expected = 5 * (2 * m * n**2 * (1 + s) + 2 * s * n**3)
    assert planned == pytest.approx(expected)
    assert kernel_flops(jaxpr.jaxpr) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "m", "kernel"), [(1024, 4096, H100), (1023, 4096, None)])
def test_small_matrices_use_xla(n, m, kernel):
    assert _on_h100().choose(n, m, jnp.float32).products.kernel == kernel


@pytest.mark.parametrize(("n", "m"), [(1026, 4096), (1024, 4098)])
def test_rows_that_are_not_aligned_use_xla(n, m):
    assert _on_h100().choose(n, m, jnp.float32).products.kernel is None


def test_jax_without_triton_raises(monkeypatch):
    monkeypatch.delattr(_orthogonalize, "gpu_kernel")
    monkeypatch.delitem(sys.modules, gpu_kernel.__name__)
    monkeypatch.delattr(pallas, "triton")
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    with pytest.raises(ValueError, match=r"needs jax.experimental.pallas.triton .* which jax \d"):
        jax.eval_shape(_on_h100(), jnp.ones((1024, 1024)), EPS)


@nightly
@pytest.mark.parametrize("name", ["jordan", "you", "polar_express"])
@pytest.mark.parametrize(
    ("shape", "method"), [((256, 256), "standard"), ((256, 512), "gram"), ((200, 504), "gram")]
)
def test_bfloat16_leaks_no_more_than_with_xla(shape, method, name):
    x = np.stack([matrix for seed in (0, 1) for matrix in spectra(*shape, seed=seed)])
    settings = {"coefficients": name, "method": method, "dtype": jnp.bfloat16}
    with small_gpu_tiles(side=128, chunk=128):
        got = np.asarray(_on_h100(**settings)(jnp.asarray(x), EPS))
    expected = np.asarray(_on_h100(**settings, products="xla")(jnp.asarray(x), EPS))
    ratio = leakage(x, got) / leakage(x, expected)
    assert ratio.max() <= 1.05
    assert np.linalg.svd(got, compute_uv=False).max() <= 1.32

"""The Pallas kernel of symmetric products for GPUs, in interpret mode, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax._orthogonalize.gpu_kernel import symmetric_product
from tests.support.by_day import by_day

SHAPES = {
    "one tile": (16, 16),
    "full tiles": (32, 48),
    "partial tiles": (2, 40, 56),
    "less than a tile": (3, 2, 7, 20),
}
# Half a unit in the last place of the largest entry. float32: sums of 56 terms.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 1e-6}


def draw(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def product(*arrays, **factors):
    return symmetric_product(*arrays, tile=16, depth=16, interpret=True, **factors)


def assert_close(got, expected):
    assert got.shape == expected.shape
    error = np.abs(np.asarray(got, np.float64) - expected).max()
    assert error <= 1.01 * ROUNDING[got.dtype.name] * np.abs(expected).max()


@pytest.mark.parametrize("dtype", by_day(sorted(ROUNDING), "bfloat16"))
@pytest.mark.parametrize("case", by_day(list(SHAPES), "partial tiles"))
def test_gram_matrix_with_an_addend_is_rounded_once(case, dtype):
    shape = SHAPES[case]
    X = draw(shape, dtype)
    C = draw((*shape[:-1], shape[-2]), dtype, seed=1)
    C += C.mT
    got = product(X, X, C, b=-0.75, c=1.5)
    x, addend = np.asarray(X, np.float64), np.asarray(C, np.float64)
    assert_close(got, 1.5 * x @ x.swapaxes(-1, -2) - 0.75 * addend)
    np.testing.assert_array_equal(got, got.mT)


@pytest.mark.nightly
def test_product_of_matrices_that_commute():
    A = draw((24, 24), jnp.float32)
    A = (A + A.T) / 8
    B = A @ A - 2 * A
    assert_close(product(A, B), np.asarray(A, np.float64) @ np.asarray(B, np.float64))


@pytest.mark.nightly
def test_entries_outside_are_not_read():
    """With a partial tile, rows of the next matrix and columns of the next row are beside it."""
    X = jnp.stack([draw((7, 20), jnp.float32), jnp.full((7, 20), jnp.nan)])
    x = np.asarray(X[0], np.float64)
    assert_close(product(X, X)[0], x @ x.T)


@pytest.mark.parametrize("shapes", [((3, 4), (4, 4)), ((4,), (4,)), ((3, 4), (3, 4), (4, 4))])
def test_shapes_that_do_not_fit_raise(shapes):
    with pytest.raises(ValueError, match=r"got A, B, C of shapes .*, expected \[..., n, k\]"):
        product(*(jnp.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("int32", "int32")])
def test_dtypes_that_do_not_fit_raise(dtypes):
    with pytest.raises(TypeError, match=r"got .*, expected one of bfloat16, float16, float32"):
        product(*(jnp.zeros((4, 4), dtype) for dtype in dtypes))

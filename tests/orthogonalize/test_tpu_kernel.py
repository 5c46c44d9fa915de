"""The TPU kernel of products, interpreted, against float64."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax._orthogonalize import tpu_kernel
from muonclip_jax._orthogonalize.tiles import Tiles
from tests.support.iteration_cases import spectra
from tests.support.kernel_cases import kernel_flops, leakage, small_tiles

nightly = pytest.mark.nightly

# Several tiles, three of four blocks on the diagonal, a partial last one, several steps and a
# remainder of terms.
PARTIAL = (2, 300, 300), Tiles(256, 128, 128)
SHAPES = [
    ((256, 256), Tiles(128, 256, 128)),  # full tiles, all terms in one step, two chunks
    ((256, 512), Tiles(128, 256, 256)),  # two steps
    ((129, 129), Tiles(128, 129, 128)),  # one row in the last tile, one term in no chunk
    ((2, 3, 140, 333), Tiles(128, 256, 128)),  # two batch axes
    ((3, 384, 640), Tiles(256, 512, 128)),  # the last step has fewer chunks
    ((128, 256), Tiles(128, 256, 128)),  # a single tile
    ((200, 300), Tiles(256, 300, 256)),  # a tile that is larger than the matrix
    ((2, 512, 256), Tiles(256, 256, 128)),  # the last chunk is full
]
# Rows and terms of A, and the columns of B.
FULL_SHAPES = [
    ((256, 256, 256), Tiles(128, 256, 128)),
    ((2, 256, 128, 384), Tiles(256, 128, 128)),  # one chunk, two tiles in a row
    ((3, 1, 140, 512, 129), Tiles(128, 256, 256)),  # two batch axes, partial tiles, two steps
    ((40, 300, 300), Tiles(128, 300, 128)),  # fewer rows than a tile has
    ((300, 130, 700), Tiles(512, 130, 128)),  # a narrow last tile, masked rows
]


def _rounding(dtype):
    """Largest error of one rounding and of the sums."""
    return 2.0**-8 if dtype == jnp.bfloat16 else 3e-6


def _symmetric(stack, n, dtype, seed=0):
    """Two symmetric matrices that commute, in a dtype, with norms of about one."""
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.normal(size=(*stack, n, n)))[0]
    s, t = rng.uniform(0.1, 1.0, size=(2, *stack, 1, n))
    A, B = ((Q * x) @ Q.mT for x in (s, t))
    return jnp.asarray(A, dtype), jnp.asarray(B, dtype)


def _wide(x):
    return np.asarray(x, np.float64)


def check_gram_matrix(shape, tiles, dtype):
    *stack, n, m = shape
    rng = np.random.default_rng(1)
    X = jnp.asarray(rng.normal(size=shape), dtype)
    r = jnp.asarray(rng.normal(size=(*stack, 1, 1)) + m, jnp.float32)
    expected = _wide(X) @ _wide(X).mT - _wide(r) * np.eye(n)
    got = _wide(tpu_kernel.gram_matrix(X, r, tiles))
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= _rounding(dtype) * np.abs(expected).max()


def check_product(shape, tiles, dtype, same):
    *stack, n, _ = shape
    A, B = _symmetric(stack, n, dtype)
    B = A if same else B
    a, b = 0.7, jnp.asarray(np.random.default_rng(2).normal(size=(*stack, 1, 1)), jnp.float32)
    terms = a * _wide(A), _wide(b) * _wide(B), -1.3 * _wide(A) @ _wide(B)
    expected, size = sum(terms), max(np.abs(term).max() for term in terms)
    got = _wide(tpu_kernel.product(a, A, b, B, -1.3, tiles._replace(depth=min(n, tiles.depth))))
    # Terms may cancel, so errors are relative to them. In float32 the lower half is B A, which
    # differs as A and B commute up to rounding only.
    assert np.abs(got - expected).max() <= 2 * _rounding(dtype) * size


def check_full_product(shape, tiles, dtype, terms):
    *stack, n, k, m = shape
    rng = np.random.default_rng(3)
    A = jnp.asarray(rng.normal(size=(*stack, n, k)), dtype)
    B = jnp.asarray(rng.normal(size=(*stack, k, m)), dtype)
    c = jnp.asarray(rng.normal(size=(*stack, 1, 1)) + 2, jnp.float32)
    C = [jnp.asarray(rng.normal(size=(*stack, n, m)), dtype) for _ in range(terms)]
    factors = [-0.7, c - 1][:terms]
    expected = _wide(c) * (_wide(A) @ _wide(B))
    expected += sum(_wide(a) * _wide(x) for a, x in zip(factors, C, strict=True))
    got, squares = tpu_kernel.full_product(c, A, B, [*zip(factors, C, strict=True)], tiles)
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert np.abs(_wide(got) - expected).max() <= _rounding(dtype) * np.abs(expected).max()
    sums = np.sum(expected**2, axis=(-2, -1), keepdims=True)
    np.testing.assert_allclose(squares, sums, rtol=1e-4)


def test_gram_matrix_equals_float64():
    check_gram_matrix(*PARTIAL, jnp.bfloat16)


def test_product_of_symmetric_matrices_equals_float64():
    check_product(*PARTIAL, jnp.bfloat16, same=False)


def test_full_product_equals_float64():
    # The last tiles are half as wide as the others.
    check_full_product((2, 140, 300, 300), Tiles(256, 256, 128), jnp.bfloat16, terms=1)


@nightly
@pytest.mark.parametrize("terms", [0, 1, 2])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("shape", "tiles"), FULL_SHAPES)
def test_full_product_of_every_shape_equals_float64(shape, tiles, dtype, terms):
    check_full_product(shape, tiles, dtype, terms)


@nightly
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("shape", "tiles"), [PARTIAL, *SHAPES])
def test_gram_matrix_of_every_shape_equals_float64(shape, tiles, dtype):
    check_gram_matrix(shape, tiles, dtype)


@nightly
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("shape", "tiles"), [PARTIAL, *SHAPES])
def test_product_of_every_shape_equals_float64(shape, tiles, dtype, same):
    check_product(shape, tiles, dtype, same)


@nightly
def test_unrounded_gram_matrix_is_float32():
    X = jnp.asarray(np.random.default_rng(0).normal(size=(200, 300)), jnp.bfloat16)
    got = tpu_kernel.gram_matrix(X, 0.0, PARTIAL[1], jnp.float32)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, _wide(X) @ _wide(X).mT, rtol=0, atol=3e-6 * 300)


@nightly
def test_nan_stays_in_its_matrix():
    X = np.random.default_rng(0).normal(size=(3, 200, 300)).astype(np.float32)
    clean = tpu_kernel.gram_matrix(jnp.asarray(X), 1.0, PARTIAL[1])
    X[1, -1, -1] = np.nan
    got = tpu_kernel.gram_matrix(jnp.asarray(X), 1.0, PARTIAL[1])
    np.testing.assert_array_equal(got[::2], clean[::2])
    assert np.isnan(got[1]).any()


@nightly
@pytest.mark.parametrize("batched", [(0, 0), (0, None), (None, 0)])
def test_vmap_equals_a_loop(batched):
    rng = np.random.default_rng(0)
    X = jnp.asarray(rng.normal(size=(3, 2, 140, 200)), jnp.float32)
    r = jnp.asarray(rng.normal(size=(3, 1, 1, 1)), jnp.float32)
    X, r = (x if axis == 0 else x[0] for x, axis in zip((X, r), batched, strict=True))

    def f(X, r):
        return tpu_kernel.gram_matrix(X, r, PARTIAL[1])

    each = [
        f(*(x[i] if axis == 0 else x for x, axis in zip((X, r), batched, strict=True)))
        for i in range(3)
    ]
    np.testing.assert_array_equal(jax.vmap(f, in_axes=batched)(X, r), jnp.stack(each))


@nightly
def test_inside_shard_map_and_jit():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 200, 300)), jnp.bfloat16)
    f = functools.partial(tpu_kernel.gram_matrix, r=1.0, tiles=PARTIAL[1])
    sharded = jax.shard_map(f, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    np.testing.assert_array_equal(jax.jit(sharded)(X), f(X))


@pytest.mark.parametrize("differentiate", [jax.grad, jax.jacfwd])
def test_derivative_raises(differentiate):
    def loss(x):
        with small_tiles():
            return mc.newton_schulz(x, steps=1, products="pallas").sum()

    with pytest.raises(ValueError, match=r"no derivative\. Pass products='xla'"):
        jax.eval_shape(differentiate(loss), jnp.ones((140, 200)))


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_newton_schulz_equals_that_of_xla(method):
    x = np.random.default_rng(0).normal(size=(140, 200)).astype(np.float32)
    steps = 1 if method == "standard" else 2  # the first product of two matrices is in step 2
    f = functools.partial(mc.newton_schulz, steps=steps, method=method)
    with small_tiles():
        got = f(x, products="pallas")
    expected = f(x, products="xla")
    assert np.any(got != expected)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_small_and_complex_matrices_use_xla():
    x = np.random.default_rng(0).normal(size=(2, 20, 30)).astype(np.float32)
    np.testing.assert_array_equal(mc.newton_schulz(x, products="pallas"), mc.newton_schulz(x))
    with small_tiles(smallest=2):
        z = x[0] + 1j * x[1]
        np.testing.assert_array_equal(mc.newton_schulz(z, products="pallas"), mc.newton_schulz(z))


def test_all_arrays_stay_in_hbm():
    """In fast memory, instructions would copy their blocks one after another."""

    def products(x):
        A = tpu_kernel.gram_matrix(x, 0.0, Tiles(128, 128, 128))
        return tpu_kernel.full_product(1.0, A, x, [(1.0, x)], Tiles(128, 128, 128))

    x = jax.ShapeDtypeStruct((128, 256), jnp.bfloat16)
    text = jax.jit(products).trace(x).lower(lowering_platforms=("tpu",)).as_text()
    colors = re.findall(r"color\\22:(\d)", text)
    assert colors == ["0"] * (3 + 5)  # of HBM, for operands and results


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_unknown_devices_raise(platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    f = functools.partial(mc.newton_schulz, products="pallas")
    with pytest.raises(ValueError, match="for 'cpu', only for NVIDIA GPUs, TPU v5 lite"):
        jax.eval_shape(f, jnp.ones((2000, 2000)))


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_flops_are_those_of_the_program(method):
    settings = {"method": method, "products": "pallas"}
    with small_tiles():
        jaxpr = jax.make_jaxpr(functools.partial(mc.newton_schulz, **settings))(
            jnp.ones((384, 768))
        )
    n, m = 384, 768
    s = 6 / 9  # tiles on and above the diagonal, of 3 x 3
    standard = 5 * (2 * m * n**2 * (1 + s) + 2 * s * n**3)
    # One window in float32: X Xᵀ and Q X, five squares, four times Y Q, Y R and (Y R) Y.
    gram = 2 * m * n**2 * (1 + s) + 5 * 2 * s * n**3 + 4 * (2 + 4 * s) * n**3
    expected = standard if method == "standard" else gram
    assert kernel_flops(jaxpr.jaxpr) == pytest.approx(expected)
    with small_tiles():
        params = {"w": jax.ShapeDtypeStruct((384, 768), jnp.float32)}
        planned = mc.sharding_plan(params, ns_method=method, ns_products="pallas")
    assert planned.groups[0].flops == pytest.approx(expected)


@nightly
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_products_of_a_shared_matrix_use_the_kernel(method):
    """One matrix on four devices: X Xᵀ in part, and a quarter of each other product in full."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, P("x", "y"))
    params = {"w": jax.ShapeDtypeStruct((4096, 8192), jnp.float32, sharding=sharding)}
    settings = {"ns_products": "pallas", "ns_dtype": jnp.bfloat16, "ns_method": method}
    settings |= {"shardings": {"w": sharding}}
    tx = mc.scale_by_muon(**settings)
    names = set()
    jaxpr = jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params))
    flops = kernel_flops(jaxpr.jaxpr, names)
    assert names == {"symmetric_gram_matrix", "full_product"}
    plan = mc.sharding_plan(params, **settings)
    assert "4 devices" in plan.groups[0].strategy()
    assert plan.groups[0].flops == pytest.approx(flops)


@nightly
@pytest.mark.parametrize("name", ["jordan", "you", "polar_express"])
@pytest.mark.parametrize(
    ("shape", "method"), [((256, 256), "standard"), ((256, 512), "gram"), ((200, 500), "gram")]
)
def test_bfloat16_leaks_no_more_than_with_xla(shape, method, name):
    x = np.stack([matrix for seed in (0, 1) for matrix in spectra(*shape, seed=seed)])
    f = functools.partial(mc.newton_schulz, coefficients=name, method=method, dtype=jnp.bfloat16)
    with small_tiles():
        got = np.asarray(f(x, products="pallas"))
    expected = np.asarray(f(x))
    ratio = leakage(x, got) / leakage(x, expected)
    assert ratio.max() <= 1.05
    largest = np.linalg.svd(got, compute_uv=False).max()
    assert largest <= 1.32


@nightly
def test_muon_on_a_mesh_equals_one_device():
    """Full matrices, and a remainder that several devices share."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, P(None, "x", "y"))
    w = np.random.default_rng(0).normal(size=(5, 140, 280)).astype(np.float32)
    params = {"w": jax.device_put(w, sharding)}
    settings = {"ns_products": "pallas", "ns_dtype": jnp.float32}
    with small_tiles():
        tx = mc.scale_by_muon(shardings={"w": sharding}, **settings)
        got = jax.jit(tx.update)(params, tx.init(params))[0]["w"]
    alone = mc.scale_by_muon(ns_dtype=jnp.float32)
    expected: Any = alone.update({"w": w}, alone.init({"w": w}))[0]
    np.testing.assert_allclose(got, expected["w"], atol=2e-5)

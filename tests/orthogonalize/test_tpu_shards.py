"""The passes over shards on TPU, interpreted, against float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax._orthogonalize import tpu_shards
from muonclip_jax._orthogonalize.newton_schulz import orthogonalizer
from muonclip_jax._sharding import plan
from tests.support.kernel_cases import small_tiles

nightly = pytest.mark.nightly
HEIGHT, WIDTH = 128, 256
ROUNDING = 2.0**-8  # of bfloat16


def shards_of(count, grid, scale=1.0, dtype=jnp.bfloat16):
    shape = (count, grid[0] * grid[1], HEIGHT, WIDTH)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape) * scale, dtype)


def assembled(shards, grid, transposed=False):
    """Assembles the matrices in float64, block by block."""
    rows = np.split(np.asarray(shards, np.float64), grid[0], axis=1)
    X = np.concatenate([np.concatenate([*row.swapaxes(0, 1)], axis=-1) for row in rows], axis=-2)
    return X.mT if transposed else X


def check(shards, grid, transposed=False):
    X = assembled(shards, grid, transposed)
    expected = X / np.linalg.norm(X, axis=(-2, -1), keepdims=True)
    got = tpu_shards.normalized(shards, grid, 1e-8, transposed)
    assert got.dtype == shards.dtype
    error = np.abs(np.asarray(got, np.float64) - expected).max()
    rounding = ROUNDING if shards.dtype == jnp.bfloat16 else 1e-6
    assert error <= rounding * np.abs(expected).max()
    back = tpu_shards.taken_apart(got, grid, transposed)
    np.testing.assert_array_equal(assembled(back, grid, transposed), np.asarray(got, np.float64))


@pytest.mark.parametrize("transposed", [False, True])
def test_shards_become_normalized_matrices_and_shards_again(transposed):
    check(shards_of(2, (2, 1)), (2, 1), transposed)


@nightly
@pytest.mark.parametrize("grid", [(1, 4), (4, 1), (3, 2), (1, 1)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_grid(grid, dtype, transposed):
    check(shards_of(1, grid, dtype=dtype), grid, transposed)


@nightly
@pytest.mark.parametrize("transposed", [False, True])
def test_several_blocks_of_a_shard(transposed, monkeypatch):
    monkeypatch.setattr(tpu_shards, "_ROW", 128)
    monkeypatch.setattr(tpu_shards, "_BLOCK", 32 * 128)
    tpu_shards._compiled.clear_cache()
    assert tpu_shards.block_of(HEIGHT, WIDTH, transposed) == (128 if transposed else 32, 128)
    check(shards_of(1, (1, 2)), (1, 2), transposed)
    tpu_shards._compiled.clear_cache()


def test_each_matrix_of_a_stack_is_normalized_at_its_own_scale():
    # Magnitudes on both sides of the limits between the three sums, and the ends of float32.
    scales = np.array([1e-33, 1e-12, 1e-9, 1e13, 1e16, 3e37])
    x = np.array(shards_of(9, (2, 1), dtype=jnp.float32))
    x[:6] *= scales[:, None, None, None]
    x[6], x[7, 1, 3, 4], x[8, 0, 0, 0] = 0, np.nan, np.inf
    got = np.asarray(tpu_shards.normalized(jnp.asarray(x), (2, 1), 1e-8), np.float64)
    X = assembled(x[:6], (2, 1))
    expected = X / np.linalg.norm(X, axis=(-2, -1), keepdims=True)
    np.testing.assert_allclose(got[:6], expected, atol=1e-6 * np.abs(expected).max())
    assert not got[6].any()
    assert np.isnan(got[7:]).any(axis=(1, 2)).all()


def test_eps_is_relative_to_the_largest_magnitude():
    x = jnp.zeros((1, 1, HEIGHT, WIDTH), jnp.float32).at[0, 0, 1, 2].set(1e20)
    assert tpu_shards.normalized(x, (1, 1), 1.0).max() == pytest.approx(0.5, rel=1e-6)


@nightly
def test_vmap_equals_a_loop():
    x = jnp.stack([shards_of(2, (3, 2)), 3 * shards_of(2, (3, 2)) + 1])
    f = functools.partial(tpu_shards.normalized, grid=(3, 2), eps=1e-8)
    np.testing.assert_array_equal(jax.vmap(f)(x), jnp.stack([f(y) for y in x]))


def test_only_shards_of_full_registers_fit():
    products = orthogonalizer("jordan", 5, "auto", jnp.bfloat16, "frobenius", "pallas")
    products = products.on("tpu", "TPU v5 lite").choose(2048, 4096, jnp.bfloat16).products
    assert products.passes(128, 256) is tpu_shards
    assert products.passes(120, 256) is products.passes(128, 64) is products.passes(0, 128) is None
    assert products._replace(kernel=None).passes(128, 256) is None
    assert products._replace(kernel="NVIDIA H100").passes(128, 256) is None


@nightly
@pytest.mark.parametrize("preconditioning", ["frobenius", "schatten", "spectral"])
def test_muon_with_passes_equals_one_device(preconditioning, monkeypatch):
    """Wide, tall and square leaves that are exchanged on their own, two chunks, and a stack."""
    monkeypatch.setattr(plan, "_MIN_STACK", 0)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    specs = {"wide": P(None, "x", "y"), "tall": P(None, "y", "x")}
    shapes = {"wide": (4, 256, 512), "tall": (8, 512, 256), "odd": (3, 256, 256)}
    shapes |= {"first": (4, 256, 256), "second": (4, 256, 256)}
    specs |= {"odd": specs["wide"], "first": specs["wide"], "second": specs["tall"]}
    w = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    shardings = {name: jax.sharding.NamedSharding(mesh, spec) for name, spec in specs.items()}
    settings = {"ns_dtype": jnp.float32, "preconditioning": preconditioning}
    params = jax.device_put(w, shardings)
    with small_tiles():
        tx = mc.scale_by_muon(shardings=shardings, ns_products="pallas", **settings)
        names = str(jax.make_jaxpr(tx.update)(params, tx.init(params)))
        got = jax.jit(tx.update)(params, tx.init(params))[0]
    assert ("sums_of_squares" in names) == (preconditioning != "spectral")
    alone = mc.scale_by_muon(**settings)
    expected: Any = alone.update(w, alone.init(w))[0]
    for name, sharding in shardings.items():
        assert got[name].sharding.is_equivalent_to(sharding, 3)
        np.testing.assert_allclose(got[name], expected[name], atol=2e-5)

"""Leaves of equal shape are orthogonalized together, with the same result."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax._orthogonalize import choices, matrices
from muonclip_jax._orthogonalize.dimension_numbers import LAST_TWO_AXES, axes_of
from muonclip_jax._orthogonalize.matrices import orthogonalize_leaves
from tests.support import reference


def _tree(layers=3, seed=0):
    """Up and down projections, square matrices, experts and one shape that is alone."""
    rng = np.random.default_rng(seed)
    shapes = {"q": (8, 8), "o": (8, 8), "up": (8, 20), "down": (20, 8), "experts": (2, 3, 20, 8)}
    tree = {
        f"layer_{i}": {name: rng.normal(size=shape) for name, shape in shapes.items()}
        for i in range(layers)
    } | {"alone": {"w": rng.normal(size=(5, 9))}}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def _calls(matrices):
    """Shapes that reach the function which orthogonalizes."""
    seen = []

    def orthogonalize(x):
        seen.append(x.shape)
        return x

    axes = [axes_of(LAST_TWO_AXES, x.ndim) for x in matrices]
    for x, y in zip(matrices, orthogonalize_leaves(orthogonalize, matrices, axes), strict=True):
        np.testing.assert_array_equal(x, y)
    return seen


def test_all_matrices_of_one_shape_reach_one_call():
    leaves = jax.tree.leaves(_tree())
    # Six q and o; three up, three down and eighteen experts, which are transposed; one alone.
    assert sorted(_calls(leaves)) == [(5, 9), (6, 8, 8), (24, 8, 20)]


def test_dtypes_are_not_mixed():
    x = jnp.ones((4, 6))
    assert _calls([x, x.astype(jnp.bfloat16), x.T]) == [(2, 4, 6), (4, 6)]


def test_a_leaf_that_is_alone_keeps_its_batch_axes():
    assert _calls([jnp.ones((2, 3, 8, 4))]) == [(2, 3, 4, 8)]


def test_nothing_to_orthogonalize():
    assert orthogonalize_leaves(lambda x: x, [], []) == []


def test_a_group_holds_no_more_than_its_bytes(monkeypatch):
    monkeypatch.setattr(matrices, "MAX_BATCH_BYTES", 3 * 4 * 6 * 4)  # three matrices of 4 x 6
    leaves = [jnp.ones((4, 6)), jnp.ones((6, 4)), jnp.ones((2, 4, 6)), jnp.ones((5, 4, 6))]
    assert _calls(leaves) == [(2, 4, 6), (2, 4, 6), (5, 4, 6)]


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_grouped_equals_ungrouped(backend, adaptive, monkeypatch):
    params = _tree()
    tx = mc.muon(0.1, adaptive=adaptive, ns_dtype=jnp.float32, weight_decay=0.1)
    state = tx.init(params)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    grouped = tx.update(params, state, params)[0]
    monkeypatch.setattr(matrices, "groups_of", lambda D: [[i] for i in range(len(D))])
    ungrouped = tx.update(params, state, params)[0]
    for g, u in zip(*map(jax.tree.leaves, (grouped, ungrouped)), strict=True):
        assert reference.relative_error(g, u) < 1e-5  # measured: 4e-7


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_matrix_affects_no_other_of_its_group(backend, bad, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    params = _tree()
    tx = mc.scale_by_muon(ns_dtype=jnp.float32)
    state = tx.init(params)
    clean: Any = tx.update(params, state)[0]
    broken: Any = {**params, "layer_1": {**params["layer_1"]}}
    broken["layer_1"]["up"] = broken["layer_1"]["up"].at[2, 3].set(bad)
    broken["layer_1"]["experts"] = broken["layer_1"]["experts"].at[1, 2, 3, 4].set(bad)
    got: Any = tx.update(broken, state)[0]
    assert not np.any(np.isfinite(got["layer_1"]["up"]))
    assert not np.any(np.isfinite(got["layer_1"]["experts"][1, 2]))
    for tree in (got, clean):
        tree["layer_1"]["up"] = jnp.zeros(())
        tree["layer_1"]["experts"] = tree["layer_1"]["experts"].at[1, 2].set(0)
    for g, c in zip(*map(jax.tree.leaves, (got, clean)), strict=True):
        np.testing.assert_array_equal(g, c)


@pytest.mark.parametrize("shape", [(7, 6, 9), (2, 5, 9, 6), (3, 6, 9)])
def test_smaller_batches_equal_one_batch(shape, monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    one_batch = mc.newton_schulz(x, dtype=jnp.float32)
    monkeypatch.setattr(choices, "MAX_BATCH_BYTES", 3 * 4 * 6 * 9)  # three matrices at once
    smaller = jax.make_jaxpr(lambda x: mc.newton_schulz(x, dtype=jnp.float32))(x)
    assert ("scan" in str(smaller)) == (x.size > 3 * 6 * 9)
    got = mc.newton_schulz(x, dtype=jnp.float32)
    assert reference.relative_error(got, one_batch) < 1e-5  # measured: 2e-7


def _dots_in_a_loop_body(layers):
    """Counts the products that a program holds, those of a loop once."""
    tx = mc.scale_by_muon()
    tree = _tree(layers)
    return str(jax.make_jaxpr(tx.update)(tree, tx.init(tree))).count("dot_general")


def test_the_program_grows_with_shapes_and_not_with_layers():
    assert _dots_in_a_loop_body(2) == _dots_in_a_loop_body(6) > 0


def test_differently_sharded_leaves_on_an_explicit_mesh_stay_apart():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        stacks = [
            jax.device_put(jnp.ones((2, 4, 6)), NamedSharding(mesh, spec))
            for spec in (P("x"), P(), P())
        ]
        assert _calls(stacks) == [(2, 4, 6), (4, 4, 6)]

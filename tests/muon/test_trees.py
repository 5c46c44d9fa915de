"""Containers, empty and odd leaves, and leaves that do not fit."""

import collections
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import muonclip_jax as mc

Pair = collections.namedtuple("Pair", ["up", "down"])
W = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)


@pytest.mark.parametrize(
    "tree",
    [
        W,
        {"a": W, "b": {"c": W}},
        [W, W],
        (W, {"a": W}),
        Pair(W, W),
        freeze({"a": {"b": W}}),
        {"a": nn.Partitioned(W, names=("x", "y"))},
        {"a": None, "b": W},
        {"a": optax.MaskedNode(), "b": W},
        {"a": {}, "b": [], "c": (), "d": W},
    ],
    ids="leaf dict list tuple namedtuple FrozenDict boxed None MaskedNode empty".split(),
)
def test_defaults_work_on_trees(tree):
    expected = mc.newton_schulz(W)
    for tx in (mc.scale_by_muon(), optax.chain(mc.scale_by_muon(), mc.scale_by_shape())):
        updates, _ = tx.update(tree, tx.init(tree))
        chex.assert_trees_all_equal_structs(updates, tree)
        for u in jax.tree.leaves(updates):
            assert (
                np.linalg.norm(u / np.linalg.norm(u) - expected / np.linalg.norm(expected)) < 1e-5
            )


@pytest.mark.parametrize("transform", [mc.muon, mc.muonclip])
@pytest.mark.parametrize(
    "tree",
    [
        {"kernel": nn.Partitioned(W, names=("x", "y")), "bias": jnp.ones(3)},
        freeze({"kernel": W, "bias": jnp.ones(3)}),
        [W, {"bias": jnp.ones(3)}],
        {"kernel": W, "frozen": None},
    ],
    ids="boxed FrozenDict list None".split(),
)
def test_structures_stay(transform, tree):
    tx = transform(0.1) if transform is mc.muon else transform(0.1, threshold=None)
    updates, state = tx.update(tree, tx.init(tree), tree)
    chex.assert_trees_all_equal_structs(updates, tree)
    again, _ = tx.update(tree, state, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(again, updates)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 4)])
def test_empty_leaf_gives_an_empty_update(shape):
    tree = {"empty": jnp.zeros(shape), "w": W}
    tx = mc.muon(0.1)
    updates: Any = tx.update(tree, tx.init(tree), tree)[0]
    assert updates["empty"].shape == shape
    assert np.all(np.isfinite(np.asarray(updates["w"])))


def test_complex_leaf():
    tree = {"w": (W + 1j * W[::-1]).astype(jnp.complex64)}
    tx = mc.muon(0.1, adaptive=True)
    updates, _ = jax.jit(tx.update)(tree, tx.init(tree), tree)
    assert updates["w"].dtype == jnp.complex64
    assert np.all(np.isfinite(np.asarray(updates["w"])))


def test_complex_leaf_keeps_its_momentum_complex():
    state = mc.scale_by_muon(mu_dtype=jnp.bfloat16).init({"c": W.astype(jnp.complex64), "r": W})
    assert state.mu["c"].dtype == jnp.complex64
    assert state.mu["r"].dtype == jnp.bfloat16


def test_wrong_leaf_names_its_path():
    tree = {
        "a": {"bias": jnp.ones(3)},
        "ids": jnp.ones((2, 2), jnp.int32),
        "w": W,
        "x": jnp.ones(()),
    }
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole text follows
        mc.scale_by_muon().init(tree)
    wanted = "a matrix needs two axes or more and a floating or complex dtype"
    assert str(error.value) == (
        "scale_by_muon: 3 of 4 leaves cannot be orthogonalized.\n"
        f"  a/bias: float32[3]: {wanted}.\n"
        f"  ids: int32[2, 2]: {wanted}.\n"
        f"  x: float32[]: {wanted}.\n"
        "Assign them to another optimizer: use `muon`, pass None for them in "
        "muon_weight_dimension_numbers, or wrap this transform in `optax.masked`."
    )


@pytest.mark.parametrize(
    "numbers",
    [
        mc.MuonDimensionNumbers(0, 0),
        mc.MuonDimensionNumbers(0, 2),
        mc.MuonDimensionNumbers(-3, 1),
        mc.MuonDimensionNumbers((0, 1), ()),
        mc.MuonDimensionNumbers(0, -2),
    ],
)
def test_wrong_dimension_numbers_name_the_path(numbers):
    tx = mc.muon(0.1, muon_weight_dimension_numbers={"a": {"w": numbers}})
    with pytest.raises(
        ValueError, match=r"a/w: float32\[4, 6\]: MuonDimensionNumbers\(.*does not name axes"
    ):
        tx.init({"a": {"w": W}})


def test_dimension_numbers_of_another_pytree_raise():
    tx = mc.muon(0.1, muon_weight_dimension_numbers={"b": mc.MuonDimensionNumbers()})
    with pytest.raises(ValueError, match="a: got no entry, expected an entry"):
        tx.init({"a": W})


def test_mismatch_names_its_path():
    tx = mc.scale_by_muon()
    state = tx.init({"a": W, "b": W, "c": W})
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole text follows
        tx.update({"a": W, "b": W.T, "d": W}, state)
    assert str(error.value) == (
        "scale_by_muon: the gradients do not match the state.\n"
        "  b: got (6, 4), expected (4, 6).\n"
        "  c: got no leaf, expected (4, 6).\n"
        "  d: got (4, 6), expected no leaf.\n"
        "Call init with the parameters of these gradients."
    )


def test_transposed_layout_transposes_the_update():
    tx, other = (
        mc.muon(0.1),
        mc.muon(0.1, muon_weight_dimension_numbers=mc.MuonDimensionNumbers(1, 0)),
    )
    u: Any = tx.update({"w": W}, tx.init({"w": W}), {"w": W})[0]
    v: Any = other.update({"w": W.T}, other.init({"w": W.T}), {"w": W.T})[0]
    chex.assert_trees_all_close(u["w"], v["w"].T, rtol=1e-5, atol=1e-6)


def test_nnx_state_and_optimizer():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(16, 8, rngs=rngs)
            self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

    model = Model(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    routes = {row.path: row.optimizer for row in mc.routing_table(params).rows}
    assert routes["embed/embedding"] == "adamw"
    assert routes["attn/query/kernel"] == routes["attn/value/kernel"] == "muon"
    tx = mc.muon(0.1)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert isinstance(updates, nnx.State)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    before = np.asarray(model.attn.query.kernel[...])
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, params))
    assert np.all(np.asarray(model.attn.query.kernel[...]) != before)


def test_a_filter_in_nnx_optimizer_trains_some_parameters():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(8, 24, rngs=rngs), nnx.Linear(24, 8, rngs=rngs)

    model = Model(nnx.Rngs(0))
    before: Any = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    wrt = nnx.All(nnx.Param, nnx.PathContains("a"))
    optimizer = nnx.Optimizer(model, mc.muon(0.1), wrt=wrt)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, wrt))
    optimizer.update(model, grads)
    after: Any = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert not np.allclose(after["a"]["kernel"], before["a"]["kernel"])
    np.testing.assert_array_equal(after["b"]["kernel"], before["b"]["kernel"])


EMPTY = {name: jnp.ones(shape) for name, shape in {"up": (3, 0, 8), "down": (3, 8, 0)}.items()}


@pytest.mark.parametrize(
    "tx",
    [
        mc.scale_by_muon(),
        mc.scale_by_muon(preconditioning="outputs"),
        mc.normalize_matrices("inputs"),
        mc.scale_by_sinkhorn(),
    ],
)
def test_parameters_without_elements_keep_their_shapes(tx):
    updates, _ = jax.eval_shape(tx.update, EMPTY, tx.init(EMPTY))
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, EMPTY)

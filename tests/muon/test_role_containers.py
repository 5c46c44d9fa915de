"""Roles and masks in pytrees of any kind: callable ones, keys that are paths, hidden leaves."""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import muonclip_jax as mc
from muonclip_jax._common.paths import leaf_paths
from muonclip_jax._orthogonalize.dimension_numbers import is_function

W = jnp.asarray(np.random.default_rng(0).normal(size=(8, 24)), jnp.float32)
NUMBERS = mc.MuonDimensionNumbers


@flax.struct.dataclass
class Policy:
    kernel: Any
    bias: Any

    def __call__(self, x):
        return x @ self.kernel + self.bias


def equinox_model():
    eqx = pytest.importorskip("equinox")
    return eqx.filter(eqx.nn.Linear(8, 24, key=jax.random.key(0)), eqx.is_inexact_array)


def nnx_model():
    return nnx.Linear(8, 24, rngs=nnx.Rngs(0))


CALLABLE = [lambda: Policy(W, W[0]), nnx_model, equinox_model]


def optimizers(tree, **arguments):
    return {row.path: row.optimizer for row in mc.routing_table(tree, **arguments).rows}


# Pytrees that are callable


@pytest.mark.parametrize("make", CALLABLE)
@pytest.mark.parametrize("transform", [mc.muon, lambda lr: mc.muonclip(lr, threshold=None)])
def test_a_callable_pytree_gets_the_updates_of_its_leaves(make, transform):
    params = make()
    tx = transform(0.1)
    got, state = tx.update(params, tx.init(params), params)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    tx.update(params, state, params)
    plain = {
        "/".join(p): x for p, x in zip(leaf_paths(params), jax.tree.leaves(params), strict=True)
    }
    expected, _ = tx.update(plain, tx.init(plain), plain)
    for path, update in zip(leaf_paths(got), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(update, expected["/".join(path)])


@pytest.mark.parametrize("make", CALLABLE)
def test_masks_and_numbers_may_be_callable_pytrees(make):
    params = make()
    mask = jax.tree.map(lambda x: x.ndim > 1, params)
    numbers = jax.tree.map(lambda x: NUMBERS() if x.ndim > 1 else None, params)
    tx = mc.muon(0.1, weight_decay=0.5, weight_decay_mask=mask)
    by_function = mc.muon(
        0.1, weight_decay=0.5, weight_decay_mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    )
    got, _ = tx.update(params, tx.init(params), params)
    expected, _ = by_function.update(params, by_function.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    rows = mc.routing_table(params, numbers).rows
    assert [row.optimizer == "muon" for row in rows] == [len(row.shape) > 1 for row in rows]
    assert len(mc.sharding_plan(params, numbers).groups) <= 1


def test_functions_differ_from_callable_pytrees():
    def method():
        return nnx_model().__call__

    for function in (len, lambda p: p, functools.partial(len), jax.tree_util.Partial(len)):
        assert is_function(function)
    assert is_function(method())
    for tree in (Policy(W, W[0]), nnx_model(), {"a": 1}, None, NUMBERS(), True):
        assert not is_function(tree)


# Keys that hold paths

NESTED = {
    "transformer": {
        "embed": {"embedding": (16, 8)},
        "h_0": {"norm": {"scale": (8,)}, "up": {"kernel": (8, 32), "bias": (32,)}},
        "moe": {"gate": {"kernel": (8, 4)}, "experts": {"up": (4, 8, 16), "down": (4, 16, 8)}},
    }
}
SHAPES = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in flatten_dict(NESTED).items()}


def haiku(paths):
    tree: dict[str, dict[str, Any]] = {}
    for path, x in paths.items():
        tree.setdefault("/".join((path[0], "~", *path[1:-1])), {})[path[-1]] = x
    return tree


@pytest.mark.parametrize(
    "container",
    [
        lambda paths: {"/".join(path): x for path, x in paths.items()},
        lambda paths: {".".join(path): x for path, x in paths.items()},
        lambda paths: dict(paths.items()),
        haiku,
    ],
    ids="slashes dots tuples haiku".split(),
)
def test_keys_that_are_paths_have_the_roles_of_nested_keys(container):
    nested = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), NESTED, is_leaf=lambda x: type(x) is tuple
    )
    expected = {row.path: row[1:] for row in mc.routing_table(nested).rows}
    got = {row.path: row[1:] for row in mc.routing_table(container(SHAPES)).rows}
    assert got == expected


def test_parameters_with_colliding_paths_have_their_own_roles():
    tree = {"a": {"b": {"kernel": W}}, "a/b": {"kernel": W}, "c/d": W}
    rows = mc.routing_table(tree, overrides={"c/d": None}).rows
    assert [row.optimizer for row in rows] == ["muon", "muon", "adamw"]


@pytest.mark.parametrize(
    "box", "data _value unboxed param value raw_value array value/raw_value raw_value/value".split()
)
def test_boxes_below_parameters_change_no_role(box):
    shapes = {
        "layers_0/attn/query/kernel": (64, 4, 16),
        "layers_0/attn/value/kernel": (64, 2, 16),
        "layers_0/attn/out/kernel": (4, 16, 64),
        "layers_0/norm/scale": (64,),
        "layers_0/mlp/wo": (256, 64),
        "embed/embedding": (100, 64),
        "lm_head/kernel": (64, 100),
    }
    arrays = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    expected = [row[1:] for row in mc.routing_table(arrays).rows]
    boxed = {f"{path}/{box}": x for path, x in arrays.items()}
    assert [row[1:] for row in mc.routing_table(boxed).rows] == expected


def test_boxes_below_kernels_do_not_hide_queries_from_the_clip():
    kernels = {"query": {"kernel": {"value": jnp.ones((8, 2, 4))}}}
    kernels |= {"key": {"kernel": {"value": jnp.ones((8, 2, 4))}}}
    logits = {"attn": {"max_logits": (jnp.full((2,), 200.0),)}}
    clipped, info = mc.qk_clip({"attn": kernels}, logits)
    assert float(clipped["attn"]["query"]["kernel"]["value"].max()) < 1
    assert "attn" in info.max_logits


# Masks and numbers as an nnx.State


def test_masks_and_numbers_may_be_an_nnx_state():
    model = nnx_model()
    state = nnx.state(model, nnx.Param)
    pure = nnx.to_pure_dict(state)
    mask = jax.tree.map(lambda x: x.ndim > 1, state)
    numbers = jax.tree.map(lambda x: NUMBERS(1, 0) if x.ndim > 1 else None, state)
    for given in (mask, nnx.to_pure_dict(mask)):
        for params in (state, pure):
            tx = mc.muon(0.1, weight_decay=0.5, weight_decay_mask=given)
            decayed, _ = tx.update(params, tx.init(params), params)
            plain = mc.muon(0.1)
            other, _ = plain.update(params, plain.init(params), params)
            difference = jax.tree.map(lambda a, b: float(abs(a - b).sum()), decayed, other)
            assert [d > 0 for d in jax.tree.leaves(difference)] == [False, True]
    for params in (state, pure):
        rows = mc.routing_table(params, numbers).rows
        assert [(row.n_in, row.n_out) for row in rows] == [(0, 0), (24, 8)]


def test_a_mask_of_other_parameters_raises():
    for mask in ({"other": True}, {"w": True, "other": True}, [True]):
        tx = mc.muon(0.1, weight_decay=0.1, weight_decay_mask=mask)
        with pytest.raises(ValueError, match="weight_decay_mask does not match the parameters"):
            tx.init({"w": W})


# Parameters that are hidden

HEADS = {
    "query": {"kernel": jnp.ones((32, 4, 8))},
    "out": {"kernel": jnp.ones((4, 8, 32))},
    "norm": {"scale": jnp.ones(32)},
}


def update_of(tx, params) -> Any:
    return tx.update(params, tx.init(params), params)[0]


@pytest.mark.parametrize("name", ["query", "out"])
def test_hidden_parameters_do_not_change_the_others(name):
    grads = jax.tree.map(
        lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), HEADS
    )
    whole = update_of(mc.muon(0.1), grads)[name]["kernel"]
    hidden = optax.masked(mc.muon(0.1), {key: key == name for key in HEADS})
    labels = {key: "muon" if key == name else "frozen" for key in HEADS}
    parts = optax.partition({"muon": mc.muon(0.1), "frozen": optax.set_to_zero()}, labels)
    for tx in (hidden, parts):
        np.testing.assert_array_equal(update_of(tx, grads)[name]["kernel"], whole)
    alone = {key: tree if key == name else None for key, tree in grads.items()}
    np.testing.assert_array_equal(update_of(mc.muon(0.1), alone)[name]["kernel"], whole)


def test_partition_of_a_callable_model():
    model = Policy(W, W[0])
    labels = Policy("muon", "frozen")
    tx = optax.partition({"muon": mc.muon(0.1), "frozen": optax.set_to_zero()}, lambda _: labels)
    updates = update_of(tx, model)
    assert not np.any(updates.bias)
    assert np.all(updates.kernel != 0)


def test_boxed_parameters_keep_their_names():
    boxed = {"up": {"kernel": nn.Partitioned(W, names=(None, None))}}
    assert optimizers(boxed) == {"up/kernel": "muon"}
    assert optimizers(boxed, overrides={"up/kernel": None}) == {"up/kernel": "adamw"}


# A state of another assignment


def test_a_state_of_another_assignment_names_the_parameters():
    params = {"up": {"kernel": W}, "down": {"kernel": W.T}}
    one, other = mc.muon(0.1), mc.muon(0.1, overrides={"up/*": None})
    for tx, state, line in (
        (other, one.init(params), "up/kernel: now AdamW, Muon in the state."),
        (one, other.init(params), "up/kernel: now Muon, AdamW in the state."),
    ):
        with pytest.raises(ValueError, match="another assignment of parameters") as error:
            tx.update(params, state, params)
        assert line in str(error.value)
        assert "down/kernel" not in str(error.value)


def test_roles_of_equal_shapes_are_computed_once():
    calls = []

    def numbers(params):
        calls.append(1)
        return jax.tree.map(lambda x: NUMBERS(), params)

    tx = mc.muon(0.1, muon_weight_dimension_numbers=numbers)
    state = tx.init({"w": W})
    tx.update({"w": W}, state, {"w": W})
    assert len(calls) == 2  # a function may look at anything, so it is called for each update


def test_a_leaf_that_is_no_array_is_named():
    model: Any = {"kernel": jnp.ones((4, 4)), "act": jnp.tanh}
    with pytest.raises(ValueError, match=r"act: .*\n.*eqx\.filter"):
        mc.muon(0.1).init(model)

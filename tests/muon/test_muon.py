"""`muon` and `muonclip` without the clip: matrices follow Muon, all other leaves AdamW."""

import functools
import inspect
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from optax import contrib

import muonclip_jax as mc
from tests.support import reference
from tests.support.training_cases import assert_same_way, gradients, train


def _tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "embed": {"embedding": rng.normal(size=(11, 8)).astype(np.float32)},
        "up": {
            "kernel": rng.normal(size=(8, 16)).astype(np.float32),
            "bias": rng.normal(size=16).astype(np.float32),
        },
    }


def _tree_gradients(tree, steps=6):
    leaves, structure = jax.tree.flatten(tree)
    columns = [gradients(leaf.shape, steps, seed=i) for i, leaf in enumerate(leaves)]
    return [structure.unflatten(row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize(
    ("tx", "settings"),
    [
        (mc.muon(0.1), {}),
        (
            mc.muon(0.1, weight_decay=0.3, consistent_rms=0.2),
            {"weight_decay": 0.3, "consistent_rms": 0.2},
        ),
        (mc.muon(0.1, beta=0.8, nesterov=False), {"beta": 0.8, "nesterov": None}),
        (
            mc.muonclip(0.1, threshold=None),
            {"nesterov": None, "weight_decay": 0.1, "consistent_rms": 0.2},
        ),
        (
            mc.muonclip(0.1, nesterov=True, consistent_rms=None, weight_decay=0.0, threshold=None),
            {"nesterov": "plain"},
        ),
        (
            mc.muonclip(
                0.1, nesterov=True, consistent_rms=0.18, ns_coeffs="deepseek_v4", threshold=None
            ),
            {
                "nesterov": "plain",
                "consistent_rms": 0.18,
                "weight_decay": 0.1,
                "rows": ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2,
            },
        ),
    ],
    ids=["optax", "decay and rms", "no nesterov", "Kimi K2", "Keller Jordan", "DeepSeek-V4"],
)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_matrices_follow_the_named_algorithm(tx, settings, shape):
    g = gradients(shape)
    w = np.random.default_rng(9).normal(size=shape).astype(np.float32)
    expected = reference.muon(w, g, learning_rate=0.1, **settings)
    assert_same_way([x["w"] for x in train(tx, {"w": w}, [{"w": x} for x in g])], expected, w)


def test_the_other_leaves_follow_adamw():
    tree = _tree()
    g = _tree_gradients(tree)
    ours = train(
        mc.muon(0.1, adam_b1=0.8, adam_b2=0.9, adam_weight_decay=0.2, nesterov=False), tree, g
    )
    theirs = train(optax.adamw(0.1, b1=0.8, b2=0.9, weight_decay=0.2), tree, g)
    for a, b in zip(ours, theirs, strict=True):
        chex.assert_trees_all_close(a["embed"], b["embed"], rtol=1e-6)
        chex.assert_trees_all_close(a["up"]["bias"], b["up"]["bias"], rtol=1e-6)


# KellerJordan/Muon, muon.py, and MoonshotAI/Moonlight, examples/toy_train.py: Nesterov momentum for
# the matrices, plain AdamW for the rest.
RECIPES = {
    "optax": (mc.muon, {}, {"nesterov": "optax"}, {"nesterov": True}),
    "plain AdamW": (mc.muon, {"adam_nesterov": False}, {"nesterov": "optax"}, {}),
    "Keller Jordan": (
        mc.muonclip,
        {
            "nesterov": True,
            "adam_nesterov": False,
            "consistent_rms": None,
            "weight_decay": 0.0,
            "adam_b2": 0.95,
        },
        {"nesterov": "plain"},
        {"b2": 0.95},
    ),
    "Moonlight": (
        mc.muonclip,
        {"nesterov": True, "adam_nesterov": False, "adam_b2": 0.95},
        {"nesterov": "plain", "consistent_rms": 0.2, "weight_decay": 0.1},
        {"weight_decay": 0.1, "b2": 0.95},
    ),
    "Kimi K2": (
        mc.muonclip,
        {},
        {"nesterov": None, "consistent_rms": 0.2, "weight_decay": 0.1},
        {"weight_decay": 0.1},
    ),
    "only AdamW": (
        mc.muon,
        {"nesterov": False, "adam_nesterov": True},
        {"nesterov": None},
        {"nesterov": True},
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_all_leaves_follow_the_recipe(name):
    factory, settings, matrix, vector = RECIPES[name]
    tree = _tree()
    g = _tree_gradients(tree)
    settings = {**settings, **({"threshold": None} if factory is mc.muonclip else {})}
    got = train(factory(0.1, **settings), tree, g)

    def column(trees, *path):
        for key in path:
            trees = [x[key] for x in trees]
        return trees

    expected = {
        ("up", "kernel"): functools.partial(reference.muon, **matrix),
        ("up", "bias"): functools.partial(reference.adamw, **vector),
        ("embed", "embedding"): functools.partial(reference.adamw, **vector),
    }
    for path, follow in expected.items():
        start = column([tree], *path)[0]
        way = follow(start, column(g, *path), learning_rate=0.1)
        assert_same_way(column(got, *path), way, start)


@pytest.mark.parametrize("adam_weight_decay", [None, 0.0, 0.3])
def test_muonclip_decays_all_parameters_by_default(adam_weight_decay):
    tree = _tree()
    g = _tree_gradients(tree)
    ours = train(mc.muonclip(0.1, threshold=None, adam_weight_decay=adam_weight_decay), tree, g)
    decay = 0.1 if adam_weight_decay is None else adam_weight_decay
    theirs = train(optax.adamw(0.1, weight_decay=decay), tree, g)
    chex.assert_trees_all_close(ours[-1]["embed"], theirs[-1]["embed"], rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"consistent_rms": 0.2}])
def test_equals_optax_on_matrices_and_vectors(settings):
    if not settings.keys() <= inspect.signature(contrib.muon).parameters.keys():
        pytest.skip(f"optax {optax.__version__} has no consistent_rms")
    tree = {"up": _tree()["up"], "down": {"kernel": np.ones((16, 8), np.float32)}}
    g = _tree_gradients(tree)
    ours, theirs = (train(m(0.01, **settings), tree, g) for m in (mc.muon, contrib.muon))
    for a, b in zip(jax.tree.leaves(ours[-1]), jax.tree.leaves(theirs[-1]), strict=True):
        # Measured: 2e-5 of the way moved.
        assert reference.relative_error(a, b) < 3e-4


def test_adam_learning_rate_is_its_own():
    tree = _tree()
    g = _tree_gradients(tree, steps=1)
    moved = train(mc.muon(0.1, adam_learning_rate=0.0), tree, g)[0]
    chex.assert_trees_all_equal(moved["embed"], tree["embed"])
    assert np.any(moved["up"]["kernel"] != tree["up"]["kernel"])


def test_weight_decay_mask_spares_a_matrix():
    tree = {"a": np.ones((4, 4), np.float32), "b": np.ones((4, 4), np.float32)}
    zero = jax.tree.map(np.zeros_like, tree)
    tx = mc.muon(0.5, weight_decay=0.5, weight_decay_mask={"a": True, "b": False})
    moved = train(tx, tree, [zero])[0]
    np.testing.assert_allclose(moved["a"], 0.75 * tree["a"])
    np.testing.assert_array_equal(moved["b"], tree["b"])


def test_a_learning_rate_of_zero_changes_nothing():
    tree = _tree()
    tx = mc.muonclip(0.0, threshold=None)
    chex.assert_trees_all_equal(train(tx, tree, _tree_gradients(tree))[-1], tree)


def test_a_schedule_equals_its_values():
    tree = _tree()
    g = _tree_gradients(tree, steps=3)
    schedule = optax.linear_schedule(0.1, 0.0, 4)
    scheduled = train(mc.muon(schedule, weight_decay=0.1), tree, g)
    stepwise = train(
        optax.inject_hyperparams(mc.muon)(learning_rate=schedule, weight_decay=0.1),
        tree,
        g,
    )
    # Measured: 1.0e-6, as 1 - b2 of an injected, traced b2 is a float32 difference.
    chex.assert_trees_all_close(scheduled, stepwise, rtol=0, atol=1e-5)


def test_a_function_gets_all_parameters():
    """Here `up` is two matrices because of a leaf of AdamW, which a partition hides."""

    def numbers(params):
        heads = params["heads"].shape[0]
        return {"heads": None, "up": mc.MuonDimensionNumbers(1, 2) if heads == 2 else None}

    up = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    params = {"heads": np.ones(2, np.float32), "up": up}
    tx = mc.muon(0.1, muon_weight_dimension_numbers=numbers)
    got = jax.jit(tx.update)(params, tx.init(params), params)[0]["up"]
    tx = mc.muon(0.1)
    updates: Any = tx.update({"up": up}, tx.init({"up": up}), {"up": up})[0]
    expected = updates["up"]
    assert reference.relative_error(got, expected) < 1e-6

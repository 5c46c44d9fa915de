"""`per_head` trains each head of attention as a matrix of its own, for every head layout."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from tests.support import reference
from tests.support.by_day import by_day
from tests.support.per_head_cases import CASES
from tests.support.training_cases import assert_same_way, gradients, train

STEPS = 2
BY_DAY = (
    "queries and keys only",
    "outputs first",
    "stacked",
    "stacked along axis 1",
    "axes of groups",
    "pairs",
    "gates beside queries",
    "keys, and values in one",
    "fused, values in one",
    "fused, pairs",
    "interleaved, values in one",
    "an axis of three, values in one",
    "latent",
    "latent, values in one",
)
each_case = pytest.mark.parametrize("name", by_day([*CASES], *BY_DAY))
some_cases = pytest.mark.parametrize("name", ["flat", "latent"])


def _start(kernel):
    return np.random.default_rng(9).normal(size=kernel.shape).astype(np.float32)


def _gradients(case):
    steps = case.tree(lambda kernel: np.stack(gradients(kernel.shape, STEPS)))
    return [jax.tree.map(lambda g, t=t: g[t], steps) for t in range(STEPS)]


@functools.cache
def _trained(name, per_head=True):
    case = CASES[name]
    tx = mc.muon(0.1, weight_decay=0.3, per_head=case.layout if per_head else None)
    return train(tx, case.tree(_start), _gradients(case))


@each_case
def test_every_matrix_follows_the_float64_reference(name):
    case, got, grads = CASES[name], _trained(name), _gradients(CASES[name])
    for child, kernel in case.kernels.items():
        start = _start(kernel).ravel()
        covered = np.concatenate([m.ravel() for m in kernel.matrices])
        assert sorted(covered) == [*range(start.size)]
        for positions in kernel.matrices:
            g = [np.ravel(x["attn"][child]["kernel"])[positions] for x in grads]
            w = start[positions]
            expected = reference.muon(w, g, learning_rate=0.1, weight_decay=0.3)
            way = [np.ravel(x["attn"][child]["kernel"])[positions] for x in got]
            assert_same_way(way, expected, w)


@some_cases
def test_a_projection_as_one_matrix_has_another_update(name):
    trees = CASES[name].tree(_start), _trained(name)[0], _trained(name, per_head=False)[0]
    for start, a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        assert reference.relative_error(a - start, b - start) > 0.1


@some_cases
def test_a_split_leaf_equals_its_parts_as_leaves(name):
    """The scale rule sees the matrix of a head: the parts have the scales of leaves."""
    case, grads = CASES[name], _gradients(CASES[name])[0]
    tx = mc.muon(1.0, per_head=case.layout, consistent_rms=0.2)
    whole = _first_update(tx, case.tree(_start), grads)
    parts = {
        f"{child} {i}": np.ravel(grads["attn"][child]["kernel"])[positions]
        for child, kernel in case.kernels.items()
        for i, positions in enumerate(kernel.matrices)
    }
    alone = _first_update(mc.muon(1.0, consistent_rms=0.2), parts, parts)
    for child, kernel in case.kernels.items():
        for i, positions in enumerate(kernel.matrices):
            got = np.ravel(whole["attn"][child]["kernel"])[positions]
            assert reference.relative_error(got, alone[f"{child} {i}"]) < 1e-5


@some_cases
def test_transforms_in_a_chain_equal_muon(name):
    case = CASES[name]
    chain = optax.chain(
        mc.scale_by_muon(per_head=case.layout),
        mc.scale_by_shape(per_head=case.layout),
        optax.scale(-0.1),
    )
    updates = [
        _first_update(tx, case.tree(_start), _gradients(case)[0])
        for tx in (chain, mc.muon(0.1, per_head=case.layout))
    ]
    chex.assert_trees_all_close(*updates, rtol=1e-6)


def test_adaptive_scales_each_head_alone():
    case = CASES["flat"]
    tx = mc.scale_by_muon(adaptive=True, nesterov=False, per_head=case.layout)
    grads = _gradients(case)[0]
    got = _first_update(tx, case.tree(_start), grads)["attn"]["query"]["kernel"]
    for positions in case.kernels["query"].matrices:
        g = np.ravel(grads["attn"]["query"]["kernel"])[positions].astype(np.float64)
        o = reference.newton_schulz(g, (reference.JORDAN,) * 5)
        assert reference.relative_error(np.ravel(got)[positions], o * np.sum(g * o)) < 1e-3


def test_checkpoints_fit_with_and_without_per_head():
    case = CASES["latent"]
    states = [
        mc.muon(0.1, per_head=layout).init(case.tree(_start)) for layout in (None, case.layout)
    ]
    chex.assert_trees_all_equal(*states)


def test_inject_hyperparams_accepts_it():
    case = CASES["flat"]
    make = optax.inject_hyperparams(mc.muon)
    updates = [
        _first_update(tx, case.tree(_start), _gradients(case)[0])
        for tx in (
            make(learning_rate=0.1, per_head=case.layout),
            mc.muon(0.1, per_head=case.layout),
        )
    ]
    # Measured: 8e-8, as an injected number is traced.
    chex.assert_trees_all_close(*updates, rtol=0, atol=1e-6)


def test_muonclip_takes_its_layout():
    case = CASES["latent"]
    stats = {"attn": {"max_logits": jnp.array([400.0, 1.0, 1.0, 1.0])}}
    by_flag = mc.muonclip(0.1, layout=case.layout, per_head=True)
    by_layout = mc.muonclip(0.1, layout=case.layout, per_head=case.layout)
    parts = mc.muonclip(0.1, threshold=None, per_head=case.layout)
    params, grads = case.tree(_start), _gradients(case)[0]
    update = functools.partial(by_flag.update, max_logits=stats)
    got, _ = jax.jit(update)(grads, by_flag.init(params), params)
    same, _ = jax.jit(functools.partial(by_layout.update, max_logits=stats))(
        grads, by_layout.init(params), params
    )
    chex.assert_trees_all_equal(got, same)
    moved = optax.apply_updates(params, _first_update(parts, params, grads))
    expected, _ = mc.qk_clip(moved, stats, case.layout)
    chex.assert_trees_all_close(optax.apply_updates(params, got), expected, rtol=1e-5)


def test_frozen_queries_are_skipped():
    case = CASES["flat"]
    params = case.tree(_start)
    labels = {"attn": {"query": "frozen", "key": "train", "value": "train"}}
    tx = optax.partition(
        {"train": mc.muon(0.1, per_head=case.layout), "frozen": optax.set_to_zero()}, labels
    )
    whole = mc.muon(0.1, per_head=case.layout)
    got, expected = (_first_update(t, params, _gradients(case)[0]) for t in (tx, whole))
    chex.assert_trees_all_equal(got["attn"]["key"], expected["attn"]["key"])


def _first_update(tx, params, grads):
    return jax.jit(tx.update)(grads, tx.init(params), params)[0]

"""Whole optimizers on a mesh train as on one device, and keep everything where it is."""

import contextlib
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from tests.support.sharding_cases import (
    Leaf,
    assert_close,
    draw,
    each_kind,
    make_mesh,
    no_rematerialization,  # noqa: F401  (of every test here)
    shardings_of,
)

# A small transformer, on a mesh of 2 x 4.
INTO = Leaf((16, 4, 4), P("x", "y"))
TREE = {
    "embedding": Leaf((24, 16), P("x", "y")),
    "block": {
        "attention": {
            "query": {"kernel": INTO},
            "key": {"kernel": INTO},
            "value": {"kernel": INTO},
            "out": {"kernel": Leaf((4, 4, 16), P("y", None, "x"))},
        },
        "norm": {"scale": Leaf((16,), P("x"))},
        "mlp": {
            "up": {"kernel": Leaf((16, 32), P("x", "y")), "bias": Leaf((32,), P("y"))},
            "down": {"kernel": Leaf((32, 16), P("y", "x"))},
        },
        "experts": {"up": Leaf((4, 16, 24), P("x", None, "y"))},
    },
    "lm_head": {"kernel": Leaf((16, 24), P("x", "y"))},
}
# The first of four heads is over the threshold.
STATS = {"block": {"attention": {"max_logits": jnp.array([[110.0, 50.0, 1.0, -3.0]])}}}

OPTIMIZERS = {
    "muon": (functools.partial(mc.muon, 0.02, weight_decay=0.1), {}),
    "muonclip without clip": (functools.partial(mc.muonclip, 0.02, threshold=None), {}),
    "muonclip": (functools.partial(mc.muonclip, 0.02, nesterov=True), {"max_logits": STATS}),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def build(name, mesh=None, leaves=TREE):
    """Makes a training step, and the start of it on a mesh or on one device."""
    factory, extra = OPTIMIZERS[name]
    params = draw(leaves)
    tx = factory()
    if mesh is not None:
        shardings = shardings_of(mesh, leaves)
        params = jax.device_put(params, shardings)
        tx = factory(shardings=shardings) if "Auto" in str(mesh) else tx
    return training_step(tx, **extra), params, tx


def training_step(tx, **extra):
    def step(params, state):
        grads = jax.tree.map(jnp.sin, params)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def mesh_of(kind) -> Any:
    """Makes the mesh, or none for None."""
    return None if kind is None else make_mesh((2, 4), kind)


def use(mesh) -> Any:
    """Makes it JAX's own; to be entered at once, as `jax.set_mesh` is no mere maker of contexts."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


class Snapshot(NamedTuple):
    """Parameters and state after their buffers are donated."""

    values: Any
    types: Any
    shardings: Any


def snapshot(*trees):
    kept = (np.asarray, jax.typeof, lambda x: x.sharding)
    return Snapshot(*(jax.tree.map(f, trees) for f in kept))


@functools.cache
def trained(name, kind):
    """Trains twenty steps; gives what was there before them and after each."""
    mesh = mesh_of(kind)
    chex.clear_trace_counter()
    with use(mesh):
        step, params, tx = build(name, mesh)
        # Each step may use the buffers of the one before. An unused buffer issues a warning, which
        # is an error.
        step = jax.jit(chex.assert_max_traces(step, 1), donate_argnums=(0, 1))
        state = tx.init(params)
        seen = [snapshot(params, state)]
        for _ in range(20):
            given = jax.tree.leaves((params, state))
            params, state = step(params, state)
            assert mesh is None or all(x.is_deleted() for x in given if x.ndim)
            seen.append(snapshot(params, state))
    return seen


@each_optimizer
@each_kind
@pytest.mark.parametrize(("steps", "tolerance"), [(1, 1e-5), (20, 1e-4)])
def test_training_on_a_mesh_is_training_on_one_device(name, kind, steps, tolerance):
    got, expected = (moved(trained(name, k), steps) for k in (kind, None))
    # Measured: 2e-6 after one step and 6e-7 after twenty, most of it rounding of the weights.
    assert_close(got, expected, tolerance)


def moved(seen, steps):
    """How far the parameters have come."""
    return jax.tree.map(np.subtract, seen[steps].values[0], seen[0].values[0])


@each_optimizer
@each_kind
def test_parameters_and_state_stay_where_they_are(name, kind):
    before, *_, after = trained(name, kind)
    assert after.types == before.types
    for old, new, x in zip(*map(jax.tree.leaves, (before[2], after[2], before[0])), strict=True):
        # Counts of steps are made on one device, and belong to the mesh after the first step.
        assert x.ndim == 0 or new.is_equivalent_to(old, x.ndim)


@each_kind
def test_momentum_lies_as_its_parameter(kind):
    params, state = trained("muon", kind)[-1].shardings
    (of_muon,) = (s for s in jax.tree.leaves(state, is_leaf=is_muon) if is_muon(s))
    momenta = jax.tree_util.tree_leaves_with_path(of_muon.mu)
    assert len(momenta) == 7
    for path, sharding in momenta:
        owner = functools.reduce(lambda tree, key: tree[key.key], path, params)
        assert sharding.is_equivalent_to(owner, 3)


def is_muon(x):
    return isinstance(x, mc.ScaleByMuonState)


# The start.


@each_kind
def test_init_without_jit_keeps_shardings(kind):
    mesh = mesh_of(kind)
    _, params, tx = build("muon", mesh)
    assert_moments_lie_as(params, tx.init(params), tx)


def test_init_in_jit_keeps_the_shardings_of_an_explicit_mesh():
    mesh = mesh_of("explicit")
    with use(mesh):
        _, params, tx = build("muon", mesh)
        assert_moments_lie_as(params, jax.jit(tx.init)(params), tx)


def test_init_in_jit_needs_to_be_told_the_shardings_of_an_auto_mesh():
    mesh = mesh_of("auto")
    _, params, tx = build("muon", mesh)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    with pytest.raises(AssertionError):
        assert_moments_lie_as(params, jax.jit(tx.init)(params), tx)
    of_state = state_shardings(tx, params, shardings, mesh)
    state = jax.jit(tx.init, out_shardings=of_state)(params)
    assert_moments_lie_as(params, state, tx)
    assert state_counts(state) == {NamedSharding(mesh, P())}


def state_shardings(tx, params, shardings, mesh):
    """The fix in the documentation."""
    return optax.tree.map_params(
        tx,
        lambda x, sharding: x if is_masked(x) else sharding,
        jax.eval_shape(tx.init, params),
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
        is_leaf=is_masked,
    )


def is_masked(x):
    return isinstance(x, optax.MaskedNode)


def state_counts(state):
    return {x.sharding for x in jax.tree.leaves(state) if x.ndim == 0}


def assert_moments_lie_as(params, state, tx):
    """Looks at every momentum and second moment of the state."""
    found = optax.tree.map_params(
        tx,
        lambda m, p: is_masked(m) or m.sharding.is_equivalent_to(p.sharding, p.ndim),
        state,
        params,
        transform_non_params=lambda _: True,
        is_leaf=is_masked,
    )
    assert jax.tree.all(found)


# Ways to take a step.


@each_kind
def test_steps_in_a_scan_are_the_steps_of_a_loop(kind):
    mesh = mesh_of(kind)
    with use(mesh):
        step, params, tx = build("muon", mesh)
        start = params, tx.init(params)
        run = jax.jit(lambda c: jax.lax.scan(lambda c, _: (step(*c), None), c, length=4)[0])
        params, state = run(start)
    loop = trained("muon", kind)[4]
    assert_close(params, loop.values[0], 1e-5)
    assert jax.tree.map(jax.typeof, (params, state)) == loop.types
    for new, old in zip(*map(jax.tree.leaves, (params, loop.shardings[0])), strict=True):
        assert new.sharding.is_equivalent_to(old, new.ndim)


@each_kind
def test_shardings_may_be_given_to_jit(kind):
    mesh = mesh_of(kind)
    with use(mesh):
        step, params, tx = build("muon", mesh)
        shardings = jax.tree.map(lambda x: x.sharding, params)
        both = shardings, state_shardings(tx, params, shardings, mesh)
        state = jax.jit(tx.init, out_shardings=both[1])(params)
        step = jax.jit(step, in_shardings=both, out_shardings=both, donate_argnums=(0, 1))
        params, state = step(params, state)
    assert_close(params, trained("muon", kind)[1].values[0], 1e-5)
    assert state_counts(state) == {NamedSharding(mesh, P())}


@each_kind
def test_a_mesh_need_not_be_set(kind):
    mesh = mesh_of(kind)
    step, params, tx = build("muon", mesh)
    state, step = tx.init(params), jax.jit(step)
    for _ in range(2):  # the second on a state that an update has made
        params, state = step(params, state)
    assert_close(params, trained("muon", kind)[2].values[0], 1e-5)


@each_kind
def test_a_second_step_without_jit_compiles_nothing(kind, caplog):
    mesh = mesh_of(kind)
    with use(mesh):
        params = jax.device_put(draw(SMALL), shardings_of(mesh, SMALL))
        tx = mc.scale_by_muon(shardings=shardings_of(mesh, SMALL))
        tx = optax.masked(tx, {"w": True, "bias": False})
        _, state = tx.update(params, tx.init(params))
        with jax.log_compiles():
            tx.update(params, state)
    assert "Compiling" not in caplog.text


# Other transforms around it.

SMALL = {"w": Leaf((3, 16, 24), P(None, "x", "y")), "bias": Leaf((24,), P("y"))}


def in_chain(**settings):
    return optax.chain(optax.clip_by_global_norm(1.0), mc.muon(0.1, **settings), optax.scale(2.0))


def with_injected_settings(**settings):
    return optax.inject_hyperparams(mc.muon)(learning_rate=0.1, **settings)


def with_micro_steps(**settings):
    return optax.MultiSteps(mc.muon(0.1, **settings), 2)


def if_finite(**settings):
    return optax.apply_if_finite(mc.muon(0.1, **settings), 3)


def masked(**settings):
    return optax.masked(mc.scale_by_muon(**settings), {"w": True, "bias": False})


def in_a_partition(**settings):
    label = {"w": "muon", "bias": "rest"}
    return optax.partition({"muon": mc.scale_by_muon(**settings), "rest": optax.sgd(0.1)}, label)


@each_kind
@pytest.mark.parametrize(
    "factory",
    [in_chain, with_injected_settings, with_micro_steps, if_finite, masked, in_a_partition],
)
def test_transforms_around_it_change_nothing(factory, kind):
    def two_updates(tx, params):
        state = tx.init(params)
        update = jax.jit(tx.update)
        _, state = update(params, state, params)
        return update(params, state, params)[0]

    params = draw(SMALL)
    mesh = mesh_of(kind)
    shardings = shardings_of(mesh, SMALL)
    said = {"shardings": shardings} if kind == "auto" else {}
    with use(mesh):
        got = two_updates(factory(**said), jax.device_put(params, shardings))
    assert_close(got, two_updates(factory(), params), 1e-5)
    for name, sharding in shardings.items():
        assert got[name].sharding.is_equivalent_to(sharding, got[name].ndim)

"""Transforms of sharded updates: `jax.vmap`, a partial `jax.shard_map`, injected settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from tests.support.sharding_cases import (
    ONE_STEP,
    Leaf,
    assert_close,
    draw,
    make_mesh,
    planned,
    shardings_of,
)
from tests.support.strict import needs_jax_0_10

MEMBERS = 2
# Each strategy on four devices; see `test_each_strategy_is_here`.
LEAVES = {
    "moved": Leaf((6, 12, 24), P(None, "y")),
    "held": Leaf((5, 12, 24), P(None, None, "y")),
    "shared": Leaf((3, 20, 12), P()),
    "local": Leaf((8, 6, 6), P("y")),
}


def update_of(shardings=None):
    tx = mc.scale_by_muon(ns_coeffs=ONE_STEP, shardings=shardings)
    return lambda grads: tx.update(grads, tx.init(grads))[0]


def stacked(leaves, axis):
    """Puts an axis of members in front of each leaf, sharded over a mesh axis."""
    return {
        name: Leaf((MEMBERS, *leaf.shape), P(axis, *leaf.spec)) for name, leaf in leaves.items()
    }


@functools.cache
def on_one_device():
    run = jax.jit(jax.vmap(update_of()))
    return run(draw(stacked(LEAVES, None)))


def check(run, kind):
    mesh = make_mesh((MEMBERS, 4), kind)
    leaves = stacked(LEAVES, "x")
    with jax.set_mesh(mesh):
        grads = jax.device_put(draw(leaves), shardings_of(mesh, leaves))
        got = jax.jit(run)(grads)
    assert_close(got, on_one_device(), 1e-5)
    for name, array in got.items():
        assert array.sharding.is_equivalent_to(grads[name].sharding, array.ndim)


def test_each_strategy_is_here(dear_work):
    mesh = jax.make_mesh((4,), ("y",))
    strategies = {group.strategy() for group in planned(LEAVES, mesh).groups}
    assert strategies == {
        "exchange: 1 full + 2 on 2 devices each",
        "no exchange: each on 4 devices",
        "split over replicas",
        "local",
    }


@needs_jax_0_10
def test_vmap_with_members_sharded_by_their_types(dear_work):
    check(jax.vmap(update_of()), "explicit")


def test_vmap_with_members_sharded_by_spmd_axis_name(dear_work):
    shardings = shardings_of(make_mesh((MEMBERS, 4), "auto"), LEAVES)
    check(jax.vmap(update_of(shardings), spmd_axis_name="x"), "auto")


@needs_jax_0_10
def test_a_jitted_update_is_planned_anew_under_vmap(dear_work):
    mesh = make_mesh((MEMBERS, 4), "auto")
    shardings = shardings_of(mesh, LEAVES)
    update = jax.jit(update_of(shardings))
    first = draw(LEAVES)
    with jax.set_mesh(mesh):
        # Without members, the devices of x share the work.
        assert_close(update(jax.device_put(first, shardings)), update_of()(first), 1e-5)
    check(jax.vmap(update, spmd_axis_name="x"), "auto")


@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map_over_some_axes_leaves_the_others_to_the_plan(check_vma, dear_work):
    def each(grads):
        new = update_of()(jax.tree.map(lambda x: x[0], grads))
        return jax.tree.map(lambda x: x[None], new)

    axes = {"in_specs": P("x"), "out_specs": P("x"), "axis_names": {"x"}}
    check(jax.shard_map(each, **axes, check_vma=check_vma), "explicit")


# All of an optimizer, and the clip, in a `shard_map` over the batch axis alone.


def test_muonclip_in_a_shard_map_over_the_batch():
    rng = np.random.default_rng(0)
    kernels = {
        name: {"kernel": rng.standard_normal((8, 4, 4)).astype(np.float32)}
        for name in ("query", "key")
    }
    params = {"attn": kernels, "norm": {"scale": np.ones(8, np.float32)}}
    stats = np.exp(2 * rng.standard_normal((8, 4))).astype(np.float32) * 30
    tx = mc.muonclip(0.1)

    def update(params, stats, largest=lambda x: x):
        stats = {"attn": {"max_logits": largest(stats)}}
        return tx.update(params, tx.init(params), params, max_logits=stats)[0]

    expected = jax.jit(update)(params, stats)
    mesh = make_mesh((2, 4), "explicit")

    def placed(path, x):
        spec = P(None, "y") if path[0].key == "attn" else P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        largest = functools.partial(jax.lax.pmax, axis_name="x")
        run = jax.shard_map(
            functools.partial(update, largest=largest),
            in_specs=(P(), P("x")),
            out_specs=P(),
            axis_names={"x"},
        )
        sharded = jax.tree_util.tree_map_with_path(placed, params)
        got = jax.jit(run)(sharded, jax.device_put(stats, NamedSharding(mesh, P("x", "y"))))
    assert_close(got, expected, 1e-5)
    assert jax.typeof(got["attn"]["query"]["kernel"]).sharding.spec == P(None, "y", None)


@pytest.mark.parametrize("spmd_axis_name", [None, "x"])
def test_vmap_of_the_clip(spmd_axis_name):
    rng = np.random.default_rng(0)
    kernels = rng.standard_normal((MEMBERS, 8, 8, 4)).astype(np.float32)
    stats = np.exp(2 * rng.standard_normal((MEMBERS, 6, 8))).astype(np.float32) * 30

    def clip(kernel, maxima):
        params = {"attn": {"query": {"kernel": kernel}, "key": {"kernel": kernel}}}
        return mc.qk_clip(params, {"attn": {"max_logits": maxima}})

    expected = jax.jit(jax.vmap(clip))(kernels, stats)
    mesh = make_mesh((MEMBERS, 4), "explicit")
    with jax.set_mesh(mesh):
        inputs = (
            jax.device_put(kernels, NamedSharding(mesh, P("x", "y"))),
            jax.device_put(stats, NamedSharding(mesh, P("x", None, "y"))),
        )
        got = jax.jit(jax.vmap(clip, spmd_axis_name=spmd_axis_name))(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)
    assert got[0]["attn"]["query"]["kernel"].sharding == inputs[0].sharding.update(
        spec=P("x", "y", None, None)
    )
    assert jnp.any(got[1].gamma["attn"] < 1)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_injected_settings_are_where_those_of_optax_are(kind):
    """Orbax restores them there; built before the mesh, they once stayed on one device."""
    placed = {}
    for factory in (mc.muon, optax.adamw):
        tx = optax.inject_hyperparams(factory)(learning_rate=0.1)
        with jax.set_mesh(make_mesh((2, 2), kind)):
            settings = tx.init({"w": jnp.ones((8, 8))}).hyperparams
        placed[factory] = {str(x.sharding) for x in settings.values()}
    assert placed[mc.muon] == placed[optax.adamw]

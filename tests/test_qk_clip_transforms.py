"""QK-clip under jit, vmap, scan, donation, sharding, and JAX's own checks."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from attention_cases import attention, clip_one, draw


def clip_step(params, maxima, tau, where):
    return mc.qk_clip(params, {"max_logits": maxima}, threshold=tau, where=where, alpha=tau / 200)


def test_one_compilation_serves_all_traced_settings():
    step = jax.jit(chex.assert_max_traces(clip_step, n=1))
    params = attention(2)
    for tau, where in ((100.0, True), (30.0, False), (1.0, True)):
        arguments = jnp.asarray([400.0, 2.0]), jnp.float32(tau), jnp.asarray(where)
        params, info = step(params, *arguments)
    np.testing.assert_allclose(info.gamma[""], [1 / 400, 1 / 2])
    with jax.transfer_guard("disallow"):
        step(params, *arguments)


def test_jaxpr_holds_no_callback():
    arguments = attention(2), jnp.ones(2), jnp.float32(1), jnp.asarray(True)
    assert "callback" not in str(jax.make_jaxpr(clip_step)(*arguments))


@pytest.mark.parametrize("check", ["jax_debug_nans", "jax_check_tracer_leaks", "jax_enable_checks"])
def test_clean_under_debug_checks(check):
    params, maxima = attention(3), jnp.asarray([400.0, -jnp.inf, 5.0])
    jax.config.update(check, True)
    try:
        jax.block_until_ready(jax.jit(clip_step)(params, maxima, 100.0, True))
        jax.block_until_ready(clip_step(params, maxima, 100.0, True))
    finally:
        jax.config.update(check, False)


@pytest.mark.parametrize("x64", [False, True])
def test_strict_promotion_and_x64_change_no_dtype(x64, strict_promotion):
    with jax.enable_x64(x64):
        old, new, info = clip_one([400.0, 7.0], dtype=jnp.bfloat16)
        chex.assert_trees_all_equal_shapes_and_dtypes(old, new)
        dtypes = [x.dtype for x in jax.tree.leaves(info)]
        assert set(dtypes) <= {jnp.dtype("float32"), jnp.dtype("int32")}


def test_vmap_over_an_ensemble_equals_the_loop():
    members = [attention(2, seed=seed) for seed in range(3)]
    maxima = jnp.asarray([[400.0, 1.0], [1.0, 1.0], [100.5, 200.0]])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    new, info = jax.vmap(lambda p, s: mc.qk_clip(p, {"max_logits": s}))(stacked, maxima)
    for i, member in enumerate(members):
        alone, _ = mc.qk_clip(member, {"max_logits": maxima[i]})
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], new), alone, rtol=2e-7)
    np.testing.assert_array_equal(info.clipped_heads, [1, 0, 2])


def test_donated_parameters_are_reused_without_a_warning():
    params = attention(2)
    step = jax.jit(clip_step, donate_argnums=0)
    new, _ = step(params, jnp.asarray([400.0, 1.0]), jnp.float32(100), jnp.asarray(True))
    assert params["query"]["kernel"].is_deleted()
    chex.assert_tree_all_finite(new)


def test_scan_of_steps_equals_the_loop():
    params, maxima = attention(2), jnp.asarray([[150.0, 99.0]]) + draw(5, 30, 2)
    looped = params
    for s in maxima:
        looped, _ = clip_step(looped, s, 100.0, True)
    scanned, _ = jax.lax.scan(lambda p, s: (clip_step(p, s, 100.0, True)[0], None), params, maxima)
    chex.assert_trees_all_close(scanned, looped, rtol=1e-6)


def test_shapes_can_be_evaluated_without_numbers():
    params = attention(2)
    new, _ = jax.eval_shape(lambda p: mc.qk_clip(p, {"max_logits": jnp.ones(2)}), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, params)


# Devices.

MESHES = {"data": ((8,), ("data",)), "data and model": ((4, 2), ("data", "model"))}


def collectives(compiled):
    """Names the communication in a compiled function; a combined one counts once."""
    names = (
        "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
    )
    return re.findall(rf" ({names})(?:-start)?\(", str(compiled.as_text()))


def mixed_model():
    """Two sizes of layers, one of them stacked, and statistics of one batch of 8."""
    params = {"a": attention(4), "b": attention(2), "c": attention(4, 2, stack=(3,))}
    stats = {
        "a": {"max_logits": (200 * draw(1, 8, 4), 200 * draw(2, 8, 4))},
        "b": {"max_logits": (200 * draw(3, 8, 2),)},
        "c": {"max_logits": (200 * draw(4, 3, 8, 4),)},
    }
    return params, stats


def put(mesh, tree, spec_of):
    def place(path, leaf):
        return jax.device_put(leaf, NamedSharding(mesh, spec_of(path[0].key, leaf)))

    return jax.tree_util.tree_map_with_path(place, tree)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("mesh", MESHES)
def test_one_all_reduce_for_the_whole_model_and_nothing_else(mesh, kind):
    shape, names = MESHES[mesh]
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))
    params, stats = mixed_model()
    expected = jax.jit(mc.qk_clip)(params, stats)

    def of_statistic(path, _):
        return P(None, "data") if path == "c" else P("data")

    with jax.set_mesh(mesh):
        inputs = put(mesh, params, lambda *_: P()), put(mesh, stats, of_statistic)
        compiled = jax.jit(mc.qk_clip).lower(*inputs).compile()
        actual = jax.jit(mc.qk_clip)(*inputs)
    assert collectives(compiled) == ["all-reduce"]
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, actual), jax.tree.map(np.asarray, expected)
    )
    for leaf in jax.tree.leaves(actual[0]):
        assert len({np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}) == 1


def test_statistics_of_one_leading_shape_are_reduced_once():
    # XLA on CPU may combine several all-reduces, so that the test above would not see them.
    params, stats = mixed_model()
    jaxpr = str(jax.make_jaxpr(mc.qk_clip)(params, stats))
    assert len(re.findall(r"f32\[\d+\] = reduce_max\[", jaxpr)) == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_kernels_and_heads_keep_their_sharding(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    params, stats = mixed_model()
    params = {
        name: {n: {"kernel": params[name][n]["kernel"]} for n in ("query", "key")}
        for name in params
    }
    expected = jax.jit(mc.qk_clip)(params, stats)

    def of_parameter(_, leaf):
        return P(*[None] * (leaf.ndim - 2), "model")

    def of_statistic(path, _):
        # The heads of b are not sharded: arrays of different sharding cannot be concatenated.
        specs = {"a": P("data", "model"), "b": P("data"), "c": P(None, "data", "model")}
        return specs[path]

    with jax.set_mesh(mesh):
        inputs = put(mesh, params, of_parameter), put(mesh, stats, of_statistic)
        actual = jax.jit(mc.qk_clip)(*inputs)
    for old, new in zip(jax.tree.leaves(inputs[0]), jax.tree.leaves(actual[0]), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim)
    chex.assert_trees_all_close(
        jax.tree.map(np.asarray, actual), jax.tree.map(np.asarray, expected), rtol=1e-6
    )


def test_statistics_joined_by_pmax_give_replicas_the_same_weights():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, stats = {"a": attention(4)}, {"a": {"max_logits": 200 * draw(1, 8, 4)}}

    def clip(params, stats):
        joined = jax.lax.pmax(jax.tree.map(lambda s: s.max(0), stats), "data")
        return mc.qk_clip(params, joined)

    sharded = jax.shard_map(clip, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    actual, expected = jax.jit(sharded)(params, stats), jax.jit(mc.qk_clip)(params, stats)
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, actual), jax.tree.map(np.asarray, expected)
    )

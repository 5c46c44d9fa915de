"""QK-clip under jit, vmap, scan, donation, and JAX's own checks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support.attention_cases import attention, clip_one, draw


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

"""Recipes around `qk_clip`, each one short function, and their promises."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState

import muonclip_jax as mc
from tests.support.attention_cases import same_bits
from tests.support.clip_recipes import TAU, X, gradient, init, loss_fn, max_logits_of, zeros


def assert_same_bits(tree, other):
    assert all(map(same_bits, jax.tree.leaves(tree), jax.tree.leaves(other)))


# Any optimizer: clip once per step, after its update.


def step(optimizer, params, opt_state, x, threshold):
    grads, stats = gradient(params, x)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    params, info = mc.qk_clip(params, stats, threshold=threshold)
    return params, opt_state, info


OPTIMIZERS = {
    "adamw": optax.adamw(0.015),
    "lion": optax.lion(0.01),
    "sgd": optax.sgd(0.05),
    "muon": mc.muon(0.025),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clip_bounds_the_logits_under_each_optimizer(name):
    optimizer = OPTIMIZERS[name]
    traced = jax.jit(functools.partial(step, optimizer))

    def largest_of_25_steps(threshold):
        # One clip to begin with, as the weights are drawn at random.
        params, _ = mc.qk_clip(init(), loss_fn(init(), X)[1], threshold=TAU)
        state, maxima = optimizer.init(params), []
        for _ in range(25):
            params, state, info = traced(params, state, X, jnp.float32(threshold))
            maxima.append(float(info.max_logit))
        return max(maxima)

    assert largest_of_25_steps(np.inf) > 2 * TAU
    assert TAU < largest_of_25_steps(TAU) < 1.2 * TAU


# A threshold that follows a schedule.


def scheduled_clip(params, stats, schedule, count):
    return mc.qk_clip(params, stats, threshold=schedule(count))


def test_scheduled_threshold_needs_one_compilation():
    schedule = optax.linear_schedule(400.0, 100.0, transition_steps=3)
    clip = jax.jit(chex.assert_max_traces(scheduled_clip, n=1), static_argnums=2)
    counts = [jnp.asarray(count) for count in range(4)]
    gammas = [float(clip(init(), max_logits_of(400.0), schedule, n)[1].min_gamma) for n in counts]
    np.testing.assert_allclose(gammas, [1, 0.75, 0.5, 0.25], rtol=1e-6)


# Only logging: an infinite threshold.


def test_infinite_threshold_changes_no_bit_and_shares_a_compilation():
    params, stats = init(), max_logits_of(400.0)
    clip = jax.jit(chex.assert_max_traces(lambda tau: mc.qk_clip(params, stats, threshold=tau), 1))
    new, info = clip(jnp.float32(np.inf))
    assert_same_bits(new, params)
    assert mc.qk_clip_metrics(info)["qk_clip/max_logit"] == 400
    assert info.clipped_heads == 0
    assert clip(jnp.float32(100))[1].clipped_heads == 1


# Skipped steps.


def step_if_finite(optimizer, params, opt_state, grads, stats):
    """With `optimizer = optax.apply_if_finite(...)`."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    params, info = mc.qk_clip(params, stats, where=opt_state.last_finite)
    return params, opt_state, info


@pytest.mark.parametrize("jit", [False, True])
def test_clip_is_skipped_when_apply_if_finite_skips(jit):
    optimizer = optax.apply_if_finite(optax.sgd(0.0), max_consecutive_errors=5)
    params, update = init(), functools.partial(step_if_finite, optimizer)
    update = jax.jit(update) if jit else update
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    state = optimizer.init(params)
    skipped, state, info = update(params, state, bad, max_logits_of(400.0))
    assert_same_bits(skipped, params)
    assert info.clipped_heads == 0
    assert info.max_logit == 400
    taken, state, info = update(skipped, state, zeros(params), max_logits_of(400.0))
    assert info.clipped_heads == 1
    assert not same_bits(taken["attn"]["query"]["kernel"], params["attn"]["query"]["kernel"])


def step_unless_spike(optimizer, params, opt_state, grads, stats, loss, limit):
    normal = loss < limit
    updates, new_state = optimizer.update(grads, opt_state, params)
    new_params = optax.apply_updates(params, updates)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(normal, new, old),
        (new_params, new_state),
        (params, opt_state),
    )
    params, info = mc.qk_clip(params, stats, where=normal)
    return params, opt_state, info


def test_skipped_step_of_a_loss_spike_keeps_every_bit():
    optimizer, params = optax.adamw(0.01), init()
    update = jax.jit(functools.partial(step_unless_spike, optimizer))
    state = optimizer.init(params)
    arguments = params, state, jax.tree.map(jnp.ones_like, params), max_logits_of(400.0)
    skipped, skipped_state, info = update(*arguments, 9.0, 5.0)
    assert_same_bits((skipped, skipped_state), (params, state))
    assert info.clipped_heads == 0
    _, _, info = update(*arguments, 4.0, 5.0)
    assert info.clipped_heads == 1


# Flax.


def train_state_step(state, x, threshold):
    grads, stats = gradient(state.params, x)
    state = state.apply_gradients(grads=grads)
    params, info = mc.qk_clip(state.params, stats, threshold=threshold)
    return state.replace(params=params), info


def test_train_state_accepts_the_clipped_parameters():
    optimizer = OPTIMIZERS["adamw"]
    state = TrainState.create(apply_fn=loss_fn, params=init(), tx=optimizer)
    params, opt_state = init(), optimizer.init(init())
    update, plain = jax.jit(train_state_step), jax.jit(functools.partial(step, optimizer))
    for _ in range(2):
        state, info = update(state, X, TAU)
        params, opt_state, _ = plain(params, opt_state, X, TAU)
        assert info.clipped_heads > 0
    expected = params, opt_state
    chex.assert_trees_all_close((state.params, state.opt_state), expected, rtol=1e-6)
    assert state.step == 2


# float32 master weights, bfloat16 in the forward pass.


def master_step(optimizer, master, opt_state, x, threshold):
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), master)
    grads, stats = gradient(narrow, x.astype(jnp.bfloat16))
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    updates, opt_state = optimizer.update(grads, opt_state, master)
    master = optax.apply_updates(master, updates)
    master, info = mc.qk_clip(master, stats, threshold=threshold)
    return master, opt_state, info


def slightly_over(params):
    """A threshold that the forward pass in bfloat16 exceeds by 0.2 %: within the dead band."""
    narrow, x = jax.tree.map(lambda w: w.astype(jnp.bfloat16), (params, X))
    _, stats = loss_fn(narrow, x)
    return jnp.max(stats["attn"]["max_logits"][0]) / 1.002


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_small_excess_decays_in_float32_and_stays_in_bfloat16(dtype):
    optimizer = optax.sgd(0.0)
    master = jax.tree.map(lambda w: w.astype(dtype), init())
    state, tau = optimizer.init(master), slightly_over(master)
    update = jax.jit(functools.partial(master_step, optimizer))
    ratios = []
    for _ in range(10):
        master, state, info = update(master, state, X, tau)
        ratios.append(float(info.max_logit / tau))
    assert (ratios[-1] <= 1) == (dtype == jnp.float32)


def test_fifty_small_clips_of_master_weights_shrink_as_computed():
    params = new = init()
    clip = jax.jit(lambda params: mc.qk_clip(params, max_logits_of(100.3))[0])
    for _ in range(50):
        new = clip(new)
    expected = np.asarray(params["attn"]["key"]["kernel"], np.float64)[:, 0] * (100 / 100.3) ** 25
    # The factor is the same 50 times, and so is its error: measured 2.3e-6.
    np.testing.assert_allclose(new["attn"]["key"]["kernel"][:, 0], expected, rtol=5e-6)


# Checkpoints: the clip has no state.


@pytest.mark.parametrize(("before", "after"), [(np.inf, TAU), (TAU, np.inf)])
def test_checkpoints_fit_with_and_without_the_clip(before, after):
    optimizer = OPTIMIZERS["adamw"]
    new = TrainState.create(apply_fn=loss_fn, params=init(), tx=optimizer)
    state, _ = train_state_step(new, X, before)
    restored = serialization.from_bytes(new, serialization.to_bytes(state))
    again, info = train_state_step(restored, X, after)
    expected, expected_info = train_state_step(state, X, after)
    chex.assert_trees_all_equal((again, info), (expected, expected_info))
    assert (info.clipped_heads > 0) == (after == TAU)

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
from tests.support.attention_cases import draw, same_bits

TAU = 4.0
X = draw(0, 4, 5, 8)


def init():
    kernel = {"kernel": draw(1, 8, 2, 4)}
    return {"attn": {"query": kernel, "key": {"kernel": draw(2, 8, 2, 4)}}}


def loss_fn(params, x):
    """Rewards queries and keys that agree: every optimizer drives the logits up."""
    query, key = (
        jnp.einsum("btd,dnh->btnh", x, params["attn"][name]["kernel"]) for name in ("query", "key")
    )
    stats = {"attn": {"max_logits": (mc.max_attention_logit(query, key),)}}
    return -jnp.mean(jnp.sum(query * key, axis=-1)), stats


gradient = jax.grad(loss_fn, has_aux=True)


def max_logits_of(s):
    """Max logits of a batch of one, `s` in the first head."""
    return {"attn": {"max_logits": (jnp.asarray([[s, 0.0]]),)}}


def nothing_yet(stats):
    """Max logits of an empty batch."""
    return jax.tree.map(lambda s: jnp.full_like(s, -jnp.inf), stats)


def zeros(params):
    return jax.tree.map(jnp.zeros_like, params)


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


# Micro-batches: one clip for all of them.


def micro_step(multi_steps, params, opt_state, running, grads, stats):
    """With `multi_steps = optax.MultiSteps(...)`; `running` starts as `nothing_yet(stats)`."""
    updates, opt_state = multi_steps.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    running = mc.merge_max_logits(running, stats)
    emit = multi_steps.has_updated(opt_state)
    params, info = mc.qk_clip(params, running, where=emit)
    running = jax.tree.map(lambda s: jnp.where(emit, -jnp.inf, s), running)
    return params, opt_state, running, info


def gammas_of(micro_step, maxima):
    """Runs micro-batches, four per step; returns gamma of the first head after each."""
    multi_steps = optax.MultiSteps(optax.sgd(0.0), every_k_schedule=4)
    params, gammas = init(), []
    state, running = multi_steps.init(params), nothing_yet(max_logits_of(0.0))
    update = jax.jit(functools.partial(micro_step, multi_steps))
    for s in maxima:
        params, state, running, info = update(
            params, state, running, zeros(params), max_logits_of(s)
        )
        gammas.append(float(info.gamma["attn"][0]))
    return gammas


def test_multi_steps_clips_once_by_the_maximum_of_micro_batches():
    gammas = gammas_of(micro_step, [400.0, 50.0, 50.0, 50.0, 50.0, 50.0, 200.0, 50.0])
    assert gammas == [1, 1, 1, 0.25, 1, 1, 1, 0.5]


def without_merge(multi_steps, params, opt_state, running, grads, stats):
    """Clips with the last micro-batch alone."""
    return micro_step(multi_steps, params, opt_state, nothing_yet(running), grads, stats)


def test_the_last_micro_batch_alone_misses_the_maximum():
    assert gammas_of(without_merge, [400.0, 50.0, 50.0, 50.0]) == [1, 1, 1, 1]


def without_reset(multi_steps, params, opt_state, running, grads, stats):
    """Never forgets a maximum."""
    params, opt_state, _, info = micro_step(multi_steps, params, opt_state, running, grads, stats)
    return params, opt_state, mc.merge_max_logits(running, stats), info


def test_max_logits_without_a_reset_clip_the_next_step_too():
    assert gammas_of(without_reset, [400.0] + 7 * [50.0]) == [1, 1, 1, 0.25, 1, 1, 1, 0.25]


def without_where(multi_steps, params, opt_state, running, grads, stats):
    """Clips after every micro-batch."""
    updates, opt_state = multi_steps.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    running = mc.merge_max_logits(running, stats)
    params, info = mc.qk_clip(params, running)
    return params, opt_state, running, info


def test_clip_after_every_micro_batch_clips_repeatedly():
    assert gammas_of(without_where, [400.0, 50.0, 50.0, 50.0]) == [0.25, 0.25, 0.25, 0.25]


def with_another(params, carry, x):
    """Merges one more micro-batch: gradients are added, max logits are not."""
    grads, stats = carry
    more_grads, more_stats = gradient(params, x)
    return jax.tree.map(jnp.add, grads, more_grads), mc.merge_max_logits(stats, more_stats)


def accumulated(params, batches):
    """Starts from the first micro-batch."""
    start = gradient(params, batches[0])
    add = functools.partial(with_another, params)
    return jax.lax.scan(lambda carry, x: (add(carry, x), None), start, batches[1:])[0]


def accumulated_from_nothing(params, batches):
    """Compiles the forward pass once: starts from zero and from -inf."""
    grads, stats = jax.eval_shape(gradient, params, batches[0])
    add = functools.partial(with_another, params)
    start = zeros(grads), nothing_yet(stats)
    return jax.lax.scan(lambda carry, x: (add(carry, x), None), start, batches)[0]


@pytest.mark.parametrize("accumulate", [accumulated, accumulated_from_nothing])
@pytest.mark.parametrize("worst", range(4))
def test_accumulation_under_a_scan_clips_as_the_whole_batch_does(accumulate, worst):
    params, x = init(), X.at[worst].mul(3)
    grads, stats = jax.jit(accumulate)(params, x[:, None])
    expected_grads, expected_stats = gradient(params, x)
    mean = jax.tree.map(lambda g: g / len(x), grads)
    chex.assert_trees_all_close(mean, expected_grads, rtol=1e-5, atol=1e-5)  # measured 7e-7
    _, info = mc.qk_clip(params, stats, threshold=TAU)
    _, expected_info = mc.qk_clip(params, expected_stats, threshold=TAU)
    assert info.clipped_heads == 2
    chex.assert_trees_all_close(info, expected_info, rtol=1e-6)


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

"""A step of several micro-batches is clipped once, by the largest logit of all."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import muonclip_jax as mc
from tests.support.clip_recipes import (
    TAU,
    X,
    accumulated,
    accumulated_from_nothing,
    gradient,
    init,
    max_logits_of,
    nothing_yet,
    zeros,
)


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

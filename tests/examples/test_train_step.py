"""The train step of the training program: schedule, micro-batches, max logits, the model."""

import dataclasses
import functools
import math
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.language_model import data
from examples.language_model.training import loop, optimizer, step
from tests.support.by_day import by_day
from tests.support.tiny_run import CONFIG, CORPUS, TINY, drawn


def test_schedule_rises_to_its_peak_and_ends_at_zero():
    schedule = optimizer.make_schedule(dataclasses.replace(CONFIG, steps=100, learning_rate=0.5))
    rates = np.array([schedule(n) for n in range(101)])
    np.testing.assert_allclose(rates[0], 0.1, rtol=1e-6)
    assert rates.argmax() == 5
    np.testing.assert_allclose(rates[5], 0.5, rtol=1e-6)
    assert (np.diff(rates[5:]) < 0).all()
    assert rates[99] > 0 == rates[100]


def test_cosine_schedule_warms_up_for_one_percent():
    config = dataclasses.replace(CONFIG, steps=200, learning_rate=0.5, schedule="cosine")
    rates = np.array([optimizer.make_schedule(config)(n) for n in range(201)])
    np.testing.assert_allclose(rates[:3], [0.25, 0.375, 0.5], rtol=1e-6)
    np.testing.assert_allclose(rates[101], 0.25, rtol=1e-6)  # half of the way, half of the peak
    assert rates[200] == 0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_shortest_schedules_are_positive(steps):
    schedule = optimizer.make_schedule(dataclasses.replace(CONFIG, steps=steps))
    assert all(np.asarray(schedule(n)) > 0 for n in range(steps))


@pytest.fixture(scope="module")
def random_params():
    """Weights without the zeros of the start, so that every gradient has full rank."""
    return drawn(TINY, spread=0.3)["params"]


def micro_batches(params, count):
    """Loss, statistics and gradients over 8 sequences in `count` micro-batches."""
    text = data.batch(CORPUS.train, 0, 1, batch_size=8, seq_len=16).reshape(count, -1, 17)
    loss_fn = functools.partial(step.make_loss(TINY), balance={})
    return jax.jit(functools.partial(step.accumulate, loss_fn))(params, text)


@pytest.mark.parametrize("count", by_day([2, 4], 2))
def test_micro_batches_equal_one_batch(random_params, count):
    (loss, sown, grads), one = micro_batches(random_params, count), micro_batches(random_params, 1)
    chex.assert_trees_all_close(loss, one[0], rtol=1e-5)
    for ours, reference in zip(*map(jax.tree.leaves, (grads, one[2])), strict=True):
        assert jnp.linalg.norm(ours - reference) < 1e-5 * jnp.linalg.norm(reference)
    (ours,), (reference,) = jax.tree.leaves(sown), jax.tree.leaves(one[1])  # [L B N]
    chex.assert_trees_all_close(ours.max(axis=1), reference.max(axis=1), rtol=1e-6)


def test_largest_logits_below_zero_stay_below_zero():
    def loss_fn(params, text):
        sown = {"intermediates": {"max_logits": -jnp.float32(text)}, "loads": {"moe": text}}
        return (params * text).sum(), sown

    text = jnp.array([[[5]], [[3]], [[4]]])  # [A B T]
    loss, sown, grads = step.accumulate(loss_fn, jnp.float32(2.0), text)
    assert (loss, sown["intermediates"]["max_logits"], grads) == (8.0, -3.0, 4.0)
    assert sown["loads"]["moe"] == 12


def test_statistics_are_the_largest_logits_of_the_model(random_params):
    """Float64 NumPy, from the weights of the first layer."""
    text = data.batch(CORPUS.train, 0, 1, batch_size=2, seq_len=16)
    _, sown = jax.jit(step.make_loss(TINY))(random_params, text, {})
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), random_params)
    layer = jax.tree.map(lambda x: x[0], weights["blocks"])
    x = weights["embed"]["embedding"][text[:, :-1]]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * layer["attn_norm"]["scale"]
    query, key = (
        np.einsum("btd,dnh->btnh", x, layer["attn"][n]["kernel"]) for n in ("query", "key")
    )
    query, key = complex_rotation(query), complex_rotation(np.repeat(key, 2, axis=2))
    logits = np.einsum("btnh,bsnh->bnts", query, key.conj()).real / np.sqrt(TINY.head_dim)
    logits = np.where(np.tril(np.ones((16, 16), bool)), logits, -np.inf)
    np.testing.assert_allclose(
        sown["intermediates"]["blocks"]["attn"]["max_logits"][0][0], logits.max((-1, -2)), rtol=1e-4
    )


def complex_rotation(x):
    """RoPE as a product of complex numbers."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * 10_000.0 ** (-np.arange(half) / half)
    return (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[None, :, None, :]


def test_model_does_not_look_ahead(random_params):
    text = data.batch(CORPUS.train, 0, 1, batch_size=1, seq_len=15).astype(np.int32)
    changed = text.copy()
    changed[:, 9] += 1
    before, now = (jax.jit(TINY.apply)({"params": random_params}, x) for x in (text, changed))
    chex.assert_trees_all_equal(before[:, :9], now[:, :9])
    assert (before[:, 9:] != now[:, 9:]).any(axis=-1).all()


@pytest.mark.nightly
def test_train_step_compiles_once_for_all_thresholds():
    made = loop.Trainer(CONFIG, CORPUS, pathlib.Path("unused"), TINY)
    state = jax.jit(made.initial_state)()
    tx = optimizer.make_optimizer(CONFIG, TINY.layout)
    train_step = chex.assert_max_traces(step.make_train_step(TINY, tx), n=1)
    compiled = jax.jit(train_step)
    text = data.batch(CORPUS.train, 0, 1, 4, 16)[None]
    for threshold in (1.0, 2.0, math.inf):
        state, _ = compiled(state, text, threshold)


def test_adamw_is_optax_adamw():
    config = dataclasses.replace(CONFIG, optimizer="adamw", learning_rate=0.5)
    grads = {"w": jnp.array([2.0, -3.0])}
    tx = optimizer.make_optimizer(config, TINY.layout)
    updates, _ = tx.update(grads, tx.init(grads), {"w": jnp.zeros(2)})
    chex.assert_trees_all_close(updates, {"w": jnp.array([-0.5, 0.5])}, rtol=1e-5)

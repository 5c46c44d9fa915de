"""Transforms after and around `muonclip`, whose clip is part of its update.

The table in docs/qk_clip.md has these cases. One head, with logit 400 before the step and
threshold 100; learning rate 0, so that only the clip moves weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import muonclip_jax as mc

KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(4, 1, 8)), jnp.float32)
STATS = {"attn": {"max_logits": jnp.array([400.0])}}


def attention(factor=1.0) -> Any:
    kernel = factor * KERNEL
    return {"attn": {"query": {"kernel": kernel}, "key": {"kernel": kernel}}}


def logit(params):
    """The largest logit of the batch in which it was 400."""
    query, key = (params["attn"][name]["kernel"] for name in ("query", "key"))
    return 400 * float(jnp.vdot(query, key) / jnp.vdot(KERNEL, KERNEL))


def muonclip(**settings):
    return mc.muonclip(0.0, **settings)


def after_one_step(tx):
    params = attention()
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params, max_logits=STATS)
    return logit(optax.apply_updates(params, updates))


RIGHT = {
    "alone": muonclip,
    "after clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(1.0), muonclip()),
    "in apply_if_finite": lambda: optax.apply_if_finite(muonclip(), 3),
    "in inject_hyperparams": lambda: optax.inject_hyperparams(mc.muonclip)(learning_rate=0.0),
    "in masked": lambda: optax.masked(muonclip(), {"attn": True}),
    "in partition": lambda: optax.partition({"a": muonclip()}, {"attn": "a"}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right(name):
    assert after_one_step(RIGHT[name]()) == pytest.approx(100, rel=1e-5)


def plateau():
    return optax.contrib.reduce_on_plateau(factor=0.25, patience=1)


WRONG = {
    "before scale": (lambda: optax.chain(muonclip(), optax.scale(0.25)), 306),
    "before scale_by_schedule": (
        lambda: optax.chain(muonclip(), optax.scale_by_schedule(lambda step: 0.25)),
        306,
    ),
    "before clip_by_global_norm": (
        lambda: optax.chain(muonclip(), optax.clip_by_global_norm(1e-3)),
        399.7,
    ),
    "before an average of updates": (lambda: optax.chain(muonclip(), optax.ema(0.75, False)), 306),
    "a rate for each layer": (
        lambda: optax.chain(muonclip(), optax.masked(optax.scale(0.25), {"attn": True})),
        306,
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    factory, left = WRONG[name]
    assert after_one_step(factory()) == pytest.approx(left, rel=1e-3)


def test_wrong_before_reduce_on_plateau():
    tx = optax.chain(muonclip(), plateau())
    params = attention()
    state = tx.init(params)
    updates: Any = None
    for _ in range(2):  # the loss does not fall, so that the scale becomes 0.25
        updates, state = tx.update(params, state, params, max_logits=STATS, value=1.0)
    assert logit(optax.apply_updates(params, updates)) == pytest.approx(306, rel=1e-3)


def test_wrong_in_multi_steps_which_passes_the_last_max_logits():
    tx = optax.MultiSteps(muonclip(), 2)
    params = attention()
    below = {"attn": {"max_logits": jnp.array([50.0])}}
    _, state = tx.update(params, tx.init(params), params, max_logits=STATS)
    updates, _ = tx.update(params, state, params, max_logits=below)
    assert logit(optax.apply_updates(params, updates)) == pytest.approx(400)


def schedule_free(base):
    return optax.contrib.schedule_free(base, learning_rate=1.0, b1=0.9)


def test_wrong_in_schedule_free_which_adds_the_clip_to_its_second_copy():
    tx = schedule_free(muonclip())
    params = attention()
    state = tx.init(params)._replace(z=attention(0.5))  # in training, both copies differ
    assert logit(state.z) == pytest.approx(100)
    z: Any = tx.update(params, state, params, max_logits=STATS)[1].z
    assert logit(z) == pytest.approx(0, abs=1e-3)  # the difference was half of the other copy


def test_right_with_qk_clip_on_both_copies_of_schedule_free():
    tx = schedule_free(optax.sgd(0.0))
    params = attention()
    updates, state = tx.update(params, tx.init(params), params)
    params, info = mc.qk_clip(optax.apply_updates(params, updates), STATS)
    z: Any = mc.qk_clip(state.z, STATS)[0]
    assert float(info.min_gamma) == 0.25
    assert (logit(params), logit(z)) == pytest.approx((100, 100), rel=1e-5)


def test_an_average_of_the_parameters_lags_behind_the_clip():
    params = attention()
    clipped, _ = mc.qk_clip(params, STATS)
    average = optax.incremental_update(clipped, params, 0.1)
    assert logit(average) > 300
    assert logit(mc.qk_clip(average, STATS)[0]) <= 100


# --- detected -------------------------------------------------------------------------------------


def in_a_train_state(params):
    state = TrainState.create(apply_fn=lambda: None, params=params, tx=muonclip())
    state.apply_gradients(grads=params, max_logits=STATS)


def in_lookahead(params):
    tx = optax.lookahead(muonclip(), 2, 0.5)
    both = optax.LookaheadParams.init_synced(params)
    tx.update(params, tx.init(both), both)


@pytest.mark.parametrize("step", [in_a_train_state, in_lookahead])
def test_wrappers_that_pass_no_max_logits_raise(step):
    with pytest.raises(ValueError, match=r"muonclip: update needs max_logits.*TrainState.*lookah"):
        step(attention())


def test_two_copies_of_the_weights_raise():
    both = optax.LookaheadParams.init_synced(attention())
    tx = muonclip()
    with pytest.raises(ValueError, match=r"two copies of the weights.*params\.fast.*params\.slow"):
        tx.update(attention(), tx.init(attention()), both, max_logits=STATS)


def test_nnx_optimizer_passes_max_logits_on():
    class Attention(nnx.Module):
        def __init__(self):
            self.query = nnx.Dict(kernel=nnx.Param(KERNEL))
            self.key = nnx.Dict(kernel=nnx.Param(KERNEL))

    class Model(nnx.Module):
        def __init__(self):
            self.attn = Attention()

    model = Model()
    optimizer = nnx.Optimizer(model, muonclip(), wrt=nnx.Param)
    grads = nnx.state(model, nnx.Param)
    nnx.jit(lambda m, o, g: o.update(m, g, max_logits=STATS))(model, optimizer, grads)
    got = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert logit(got) == pytest.approx(100, rel=1e-5)

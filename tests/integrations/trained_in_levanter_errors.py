"""Attention that cannot be clipped in Levanter raises, and frozen attention does not change."""

import dataclasses

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from levanter.layers.attention import Attention
from levanter.optim.config import AdamConfig
from levanter.trainer import Trainer

from muonclip_jax.integrations.levanter import MuonClipTrainer, attention as clip_of_attention
from tests.integrations.levanter_models import build
from tests.integrations.levanter_trainer import (
    OPTIMIZER,
    TAU,
    batches,
    equal,
    loud,
    next_token_loss,
    state_of,
    train,
    trainer_of,
)

pytestmark = pytest.mark.usefixtures("rank_promotion")


def stopped(model, example, *, key=None):
    model = eqx.tree_at(
        lambda m: m.transformer, model, replace_fn=jax.tree_util.Partial(jax.lax.stop_gradient)
    )
    return model.compute_next_token_loss(example, key=key)


def twice(model, example, *, key=None):
    return next_token_loss(model, example, key=key) + next_token_loss(model, example, key=key)


@pytest.mark.parametrize(("loss", "count"), [(stopped, 0), (twice, 2)])
def test_max_logits_that_do_not_arrive_once_raise(loss, count, tmp_path):
    with pytest.raises(RuntimeError, match=rf"layers/stacked/self_attn: {count} times\."):
        train(trainer_of(tmp_path, loss=loss), stop=1)


def test_sums_over_micro_batches_raise(tmp_path, monkeypatch):
    def add(self, other):
        return jax.tree.map(jnp.add, self, other)

    monkeypatch.setattr(clip_of_attention.MaxLogits, "accumulate", add)
    with pytest.raises(RuntimeError, match=r"self_attn: 4 times\."):
        train(trainer_of(tmp_path, per_device_parallelism=1), stop=1)


def test_frozen_attention_is_not_clipped(tmp_path):
    model = loud(build("llama_unscanned"))
    of = lambda m: [layer.self_attn for layer in m.transformer.layers.blocks]  # noqa: E731
    frozen = jax.tree.map(lambda x: True, model, is_leaf=lambda x: isinstance(x, hax.NamedArray))
    frozen = eqx.tree_at(lambda m: of(m)[0], frozen, False)
    state, _, log = train(trainer_of(tmp_path), model, stop=1, is_trainable=frozen)
    assert log.series("qk_clip/clipped_heads") == [4]  # the heads of the second layer
    assert equal(of(state.model)[0], of(model)[0])
    assert not equal(of(state.model)[1], of(model)[1])


def test_a_model_without_trainable_attention_raises(tmp_path):
    model = build("llama")
    is_leaf = lambda x: isinstance(x, Attention | hax.NamedArray)  # noqa: E731
    frozen = jax.tree.map(lambda x: not isinstance(x, Attention), model, is_leaf=is_leaf)
    with pytest.raises(ValueError, match="no attention module has trainable queries and keys"):
        train(trainer_of(tmp_path), model, stop=1, is_trainable=frozen)


def test_a_model_with_one_trainable_projection_raises(tmp_path):
    model = build("llama")
    frozen = jax.tree.map(lambda x: True, model, is_leaf=lambda x: isinstance(x, hax.NamedArray))
    key = lambda m: m.transformer.layers.stacked.self_attn.k_proj.weight  # noqa: E731
    frozen = eqx.tree_at(key, frozen, False)
    with pytest.raises(ValueError, match="only one of q_proj and k_proj is trainable"):
        train(trainer_of(tmp_path), model, stop=1, is_trainable=frozen)


def test_normalized_queries_raise(tmp_path):
    with pytest.raises(ValueError, match=r"self_attn: queries or keys are normalized"):
        train(trainer_of(tmp_path), "olmo2", stop=1)


def test_normalized_queries_can_be_watched(tmp_path):
    watching = dataclasses.replace(OPTIMIZER, qk_clip_threshold=float("inf"))
    _, _, log = train(trainer_of(tmp_path, watching), "olmo2", stop=1)
    assert 0 < log.series("qk_clip/max_logit")[0] < 100


def test_a_model_without_levanters_attention_raises(tmp_path):
    with pytest.raises(ValueError, match=r"stacked/attn \(Gpt2Attention\): not a levanter"):
        train(trainer_of(tmp_path), "gpt2", stop=1)


def test_another_trainer_raises(tmp_path):
    with pytest.raises(ValueError, match="this trainer does not clip"):
        train(trainer_of(tmp_path, cls=Trainer), stop=1)


def test_an_optimizer_without_a_threshold_raises(tmp_path):
    with pytest.raises(ValueError, match="this optimizer has no threshold"):
        trainer_of(tmp_path, AdamConfig())


def test_another_optimizer_can_be_clipped(tmp_path):
    class Clipping(MuonClipTrainer):
        def __init__(self, *args):
            super().__init__(*args, threshold=TAU)

    _, _, log = train(trainer_of(tmp_path, AdamConfig(), Clipping), stop=2)
    assert log.series("qk_clip/clipped_heads")[0] > 0


def test_forward_mode_passes_the_loss(tmp_path):
    with trainer_of(tmp_path) as trainer:
        params, static = eqx.partition(state_of(trainer).model, eqx.is_inexact_array)
        example = next(batches())
        loss = lambda p: trainer.loss_fn(eqx.combine(p, static), example)[0]  # noqa: E731
        _, tangent = jax.jvp(loss, (params,), (params,))
    assert np.isfinite(tangent)

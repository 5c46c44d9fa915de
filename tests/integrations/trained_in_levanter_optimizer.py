"""The optimizer that Levanter builds from a config: roles, weight decay, heads."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from levanter.main.train_lm import TrainLmConfig

from muonclip_jax.integrations.levanter import MuonClipConfig, dimension_numbers
from tests.integrations.levanter_cases import GOLDEN, lines
from tests.integrations.levanter_models import MODELS, build, parameters
from tests.integrations.levanter_trainer import OPTIMIZER, train, trainer_of

pytestmark = pytest.mark.usefixtures("rank_promotion")


def test_roles_equal_the_golden_file():
    found = [
        line
        for model in MODELS
        for line in lines(model, parameters(model), muon_weight_dimension_numbers=dimension_numbers)
    ]
    assert found == GOLDEN.read_text().splitlines()


def test_yaml_has_the_settings():
    import draccus

    fields = {"type": "muonclip", "learning_rate": 2e-4, "momentum": 0.9, "nesterov": True}
    fields |= {"cautious": True, "per_head": True, "qk_clip_threshold": None, "beta2": 0.99}
    config = draccus.decode(TrainLmConfig, {"optimizer": fields}).optimizer
    assert config == MuonClipConfig(
        learning_rate=2e-4,
        momentum=0.9,
        nesterov=True,
        cautious=True,
        per_head=True,
        qk_clip_threshold=None,
        beta2=0.99,
    )


@pytest.mark.parametrize("cautious", [False, True])
def test_weight_decay_has_levanters_mask(cautious):
    """The first update of AdamW is the sign of the gradient; norms and embeddings do not decay."""
    model = eqx.filter(build("llama"), eqx.is_inexact_array)
    settings = dict(weight_decay=0.5, warmup=0, lr_schedule="constant", cautious=cautious)
    tx = MuonClipConfig(
        learning_rate=0.1, qk_clip_threshold=None, max_grad_norm=None, **settings
    ).build(10)
    grads = jax.tree.map(jnp.ones_like, model)
    updates, _ = eqx.filter_jit(tx.update)(grads, tx.init(model), model)
    w = np.asarray(model.lm_head.weight.array)
    decay = np.where(w > 0, w, 0) if cautious else w
    np.testing.assert_allclose(updates.lm_head.weight.array, -0.1 * (1 + 0.5 * decay), rtol=1e-5)
    for of in (lambda m: m.transformer.norm.weight, lambda m: m.embeddings.token_embeddings.weight):
        np.testing.assert_allclose(of(updates).array, -0.1, rtol=1e-5)


def test_per_head_trains(tmp_path):
    settings = dataclasses.replace(OPTIMIZER, per_head=True, nesterov=True)
    _, losses, _ = train(trainer_of(tmp_path, settings), stop=3)
    assert np.isfinite(losses).all()

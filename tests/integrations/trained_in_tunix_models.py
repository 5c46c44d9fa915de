"""Models of tunix: roles, what is clipped, and what raises."""

import math

import numpy as np
import optax
import pytest
import qwix
from flax import nnx
from tunix.models.gemma import model as gemma
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3

import muonclip_jax as mc
from tests.integrations.tunix_trainer import (
    LAYERS,
    QWEN,
    SIZES,
    TAU,
    VOCAB,
    batches,
    inputs,
    logged,
    make,
    mesh_of_all,
    tiny_model,
)
from tests.support.golden_tables import read

GEMMA = {
    "num_embed": VOCAB,
    "final_logit_softcap": 30.0,
    "attn_logits_soft_cap": 50.0,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
    "attention_types": (gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL),
    "sliding_window_size": 16,
}


def test_roles_equal_the_golden_table():
    model = nnx.eval_shape(lambda: llama3.Llama3(two_layers(), rngs=nnx.Rngs(0)))
    found = {row.path: row for row in mc.routing_table(nnx.state(model, nnx.Param)).rows}
    expected = read("tunix_llama3").rows
    assert found.keys() == {row.path for row in expected}
    for row in expected:
        assert (found[row.path].shape, found[row.path].optimizer) == (row.shape, *row.optimizers)
        assert not row.matrices or tuple(found[row.path])[3:6] in row.matrices


def two_layers():
    config = llama3.ModelConfig.llama3p1_8b()
    return type(config)(**{f: getattr(config, f) for f in config.__dict__} | {"num_layers": 2})


def test_other_models_are_clipped():
    for model in (
        qwen2.Qwen2(qwen2.ModelConfig(**SIZES, **QWEN), rngs=nnx.Rngs(0)),
        gemma.Gemma(gemma.ModelConfig(**SIZES, **GEMMA), rngs=nnx.Rngs(0)),
        gemma.Gemma(gemma.ModelConfig(**SIZES | {"num_kv_heads": 4}, **GEMMA), rngs=nnx.Rngs(0)),
    ):
        tx = optax.sgd(1e-12)
        trainer = make(model, tx, steps=1, threshold=math.inf)
        trainer.train(batches(1))
        largest = float(logged(trainer, "qk_clip/max_logit")[0])
        trainer = make(model, tx, steps=2 * LAYERS, threshold=largest / 2)
        trainer.train([*batches(1)] * (2 * LAYERS))
        np.testing.assert_allclose(
            logged(trainer, "qk_clip/max_logit")[[0, -1]], [largest, largest / 2], rtol=1e-5
        )


def test_attention_that_cannot_be_clipped_raises():
    trainer = make(qwen3.Qwen3(qwen3.ModelConfig(**SIZES, **QWEN), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="queries or keys are normalized after their projection"):
        trainer.train(batches(1))
    config = qwen2.ModelConfig(
        **SIZES | {"head_dim": 128},
        **QWEN,
        use_flash_attention=True,
        flash_attention_block_size=128,
    )
    with mesh_of_all():
        trainer = make(qwen2.Qwen2(config, rngs=nnx.Rngs(0)))
        with pytest.raises(ValueError, match="cannot be read"):
            trainer.train(batches(1, length=128))


@pytest.mark.parametrize("remat", ["BLOCK", "DECODER"])
def test_rematerialized_layers_train_equally(remat):
    losses = []
    for name in ("NONE", remat):
        trainer = make(tiny_model(remat_config=llama3.RematConfig[name]), steps=4)
        trainer.train(batches(4))
        losses.append([logged(trainer), logged(trainer, "qk_clip/max_logit")])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_lora_trains_adapters_and_refuses_to_clip():
    model = tiny_model()
    provider = qwix.LoraProvider(module_path=".*(q|k|v)_proj", rank=4, alpha=4.0)
    example = {k: v for k, v in inputs(next(batches(1))).items() if k != "input_mask"}
    model = qwix.apply_lora_to_model(model, provider, cache=None, **example)
    with pytest.raises(ValueError, match="add_qk_clip: the model has LoRA parameters"):
        make(model)
    attn = model.layers[0].attn
    frozen = np.asarray(attn.q_proj.w[...])
    trainer = make(model, steps=3, threshold=math.inf)
    trainer.train(batches(3))
    assert (logged(trainer, "qk_clip/max_logit") > TAU).all()
    assert (logged(trainer, "qk_clip/clipped_heads") == 0).all()
    np.testing.assert_array_equal(attn.q_proj.w[...], frozen)
    assert np.abs(attn.q_proj.w_lora_b[...]).max() > 0  # it begins as zeros

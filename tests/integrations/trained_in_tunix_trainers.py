"""Other trainers of tunix are clipped too: preferences, reinforcement learning and distillation."""

import jax
import numpy as np
from tunix.distillation import distillation_trainer, strategies
from tunix.rl import trainer as rl_trainer
from tunix.sft import peft_trainer
from tunix.sft.dpo import dpo_trainer

import muonclip_jax as mc
from muonclip_jax.integrations.tunix import add_qk_clip
from tests.integrations.tunix_trainer import (
    LENGTH,
    TAU,
    VOCAB,
    batches,
    inputs,
    logged,
    rows,
    tiny_model,
)


def test_preference_optimization_is_clipped_too():
    config = dpo_trainer.DPOTrainingConfig(
        max_steps=4, eval_every_n_steps=1000, max_prompt_length=16, max_response_length=16
    )
    model, tx = tiny_model(), mc.muon(1e-3, consistent_rms=0.2)
    trainer = dpo_trainer.DPOTrainer(model, tiny_model(), tx, config)
    trainer = add_qk_clip(trainer, threshold=TAU)
    tokens = rows(12, seed=3).reshape(3, 4, LENGTH)
    mask = np.ones((4, 16), bool)
    example = dpo_trainer.TrainingInput(
        prompt_ids=tokens[0, :, :16],
        prompt_mask=mask,
        chosen_ids=tokens[1, :, :16],
        chosen_mask=mask,
        rejected_ids=tokens[2, :, :16],
        rejected_mask=mask,
    )
    trainer.train([example] * 4)
    assert len(logged(trainer, "rewards/margin")) == 4
    assert logged(trainer, "qk_clip/max_logit")[-1] < 1.1 * TAU


def test_the_trainer_of_reinforcement_learning_is_clipped_too():
    config = peft_trainer.TrainingConfig(max_steps=3, eval_every_n_steps=1000)
    tx = mc.muon(1e-3, consistent_rms=0.2)
    trainer = rl_trainer.Trainer(tiny_model(), tx, config, lambda: {"global_step": 1})
    add_qk_clip(trainer, threshold=TAU)

    def loss_fn(model, train_example):
        loss = peft_trainer._default_loss_fn(model, **inputs(train_example))
        return loss, {"kl": loss * 0}

    trainer.with_loss_fn(loss_fn, has_aux=True)
    trainer.with_gen_model_input_fn(lambda example: {"train_example": example})
    trainer.with_rl_metrics_to_log({"kl": np.mean})
    trainer.train([*batches(1)] * 3)
    assert len(logged(trainer, "kl")) == 3
    assert logged(trainer, "qk_clip/max_logit")[-1] < 1.1 * TAU


def test_distillation_is_clipped_too():
    config = distillation_trainer.TrainingConfig(max_steps=3, eval_every_n_steps=1000)

    def logits(model, input_tokens, input_mask):
        example = peft_trainer.TrainingInput(input_tokens=input_tokens, input_mask=input_mask)
        given = inputs(example)
        del given["input_mask"]
        return model(cache=None, **given)[0]

    strategy = strategies.LogitStrategy(
        student_forward_fn=logits,
        teacher_forward_fn=logits,
        labels_fn=lambda input_tokens, input_mask: jax.nn.one_hot(input_tokens, VOCAB),
    )
    tx = mc.muon(1e-3, consistent_rms=0.2)
    trainer = distillation_trainer.DistillationTrainer(
        tiny_model(), tiny_model(loud=False), strategy, tx, config
    )
    add_qk_clip(trainer, threshold=TAU).train([*batches(1)] * 3)
    assert logged(trainer, "qk_clip/max_logit")[-1] < 1.1 * TAU

"""The trainers of tunix train a tiny Llama 3 with Muon and QK-clip. `run.sh tunix` runs this."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from orbax import checkpoint as ocp
from tunix.distillation import distillation_trainer, strategies
from tunix.models.gemma import model as gemma
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3
from tunix.rl import trainer as rl_trainer
from tunix.sft import peft_trainer
from tunix.sft.dpo import dpo_trainer

import muonclip_jax as mc
from muonclip_jax.integrations.tunix import add_qk_clip
from tests.support.golden_tables import read

jax.config.update("jax_numpy_rank_promotion", "allow")  # the models need it
LAYERS, VOCAB, LENGTH, BATCH, TAU = 2, 96, 32, 16, 2.0


SIZES = {
    "num_layers": LAYERS,
    "embed_dim": 64,
    "hidden_dim": 128,
    "num_heads": 4,
    "head_dim": 16,
    "num_kv_heads": 2,
}
QWEN = {"vocab_size": VOCAB, "rope_theta": 10_000, "norm_eps": 1e-5}
GEMMA = {
    "num_embed": VOCAB,
    "final_logit_softcap": 30.0,
    "attn_logits_soft_cap": 50.0,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
    "attention_types": (gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL),
    "sliding_window_size": 16,
}


def tiny_model(loud=True, **settings):
    """A Llama 3; its max logits begin above the threshold if its queries and keys are loud."""
    config = llama3.ModelConfig(**SIZES, **QWEN, **settings)
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))
    for layer in model.layers if loud else []:
        for weights in (layer.attn.q_proj.w, layer.attn.k_proj.w):
            weights[...] = weights[...] * 10
    return model


def rows(count, seed=0, length=LENGTH):
    """Counts in steps of 1 to 3."""
    rng = np.random.default_rng(seed)
    first, by = rng.integers(VOCAB, size=(count, 1)), rng.integers(1, 4, size=(count, 1))
    return ((first + by * np.arange(length)) % VOCAB).astype(np.int32)


def batches(count, size=BATCH, length=LENGTH):
    for tokens in rows(count * size, length=length).reshape(count, size, length):
        yield peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens, bool))


def inputs(example):
    size, length = example.input_tokens.shape
    return {
        "input_tokens": example.input_tokens,
        "input_mask": example.input_mask,
        "positions": jnp.broadcast_to(jnp.arange(length), (size, length)),
        "attention_mask": jnp.broadcast_to(jnp.tri(length, dtype=bool), (size, length, length)),
    }


def make(model, tx=None, *, clip=True, steps=20, threshold=TAU, **settings):
    tx = tx or mc.muon(0.01, consistent_rms=0.2)
    config = peft_trainer.TrainingConfig(max_steps=steps, eval_every_n_steps=1000, **settings)
    trainer = peft_trainer.PeftTrainer(model, tx, config).with_gen_model_input_fn(inputs)
    return add_qk_clip(trainer, threshold=threshold) if clip else trainer


def logged(trainer, name="loss"):
    return trainer.metrics_logger.get_metric_history("", name, "train")


def max_logits(model, tokens, monkeypatch):
    """The max logits [layers, heads] in float64, from what `apply_rope` of the model returns."""
    seen, rope = [], llama3.apply_rope
    with monkeypatch.context() as patch:
        patch.setattr(llama3, "apply_rope", lambda *a, **k: seen.append(rope(*a, **k)) or seen[-1])
        example = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=tokens >= 0)
        given = inputs(example)
        del given["input_mask"]
        model(cache=None, **given)
    found = []
    for query, key in zip(seen[::2], seen[1::2], strict=True):
        query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
        key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
        logits = np.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(query.shape[-1])
        logits = np.where(np.tri(LENGTH, dtype=bool), logits, -np.inf)
        found.append(logits.max((0, 2, 3)))
    return np.stack(found)


def test_trains_and_keeps_logits_at_the_threshold(monkeypatch):
    model, unclipped, fresh = tiny_model(), tiny_model(), rows(BATCH, seed=1)
    assert max_logits(model, fresh, monkeypatch).max() > 1.3 * TAU
    trainer = make(model)
    trainer.train(batches(20))
    losses = logged(trainer)
    assert len(losses) == 20
    assert losses[-1] < 0.5 * losses[0]
    make(unclipped, clip=False).train(batches(20))
    after, without = (max_logits(m, fresh, monkeypatch).max() for m in (model, unclipped))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, logit {after:.2f}, without {without:.2f}")
    assert after < 1.5 * TAU < 2 * TAU < without
    metrics = [logged(trainer, f"qk_clip/{n}") for n in ("max_logit", "min_gamma", "clipped_heads")]
    assert all(len(history) == 20 for history in metrics)
    np.testing.assert_allclose(metrics[1], np.minimum(1, TAU / metrics[0]), rtol=1e-5)
    assert metrics[2].max() > 0


def test_logits_are_at_the_threshold_after_the_clip(monkeypatch):
    model, tokens = tiny_model(), next(batches(1)).input_tokens
    before = max_logits(model, tokens, monkeypatch)
    trainer = make(model, optax.sgd(1e-12), steps=2 * LAYERS)
    trainer.train([*batches(1)] * (2 * LAYERS))  # a clip changes the inputs of later layers
    after = max_logits(model, tokens, monkeypatch)
    np.testing.assert_allclose(logged(trainer, "qk_clip/max_logit")[0], before.max(), rtol=1e-5)
    over = before[0] > TAU
    assert over.any()
    assert (before.max(1) > TAU).all()
    assert (after <= TAU * (1 + 1e-5)).all()
    np.testing.assert_allclose(after[0, over], TAU, rtol=1e-5)


def test_weights_below_the_threshold_keep_their_bits():
    model = tiny_model()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    make(model, optax.sgd(0.0), steps=2, threshold=1e4).train(batches(2))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, after, before)


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


def test_micro_batches_are_clipped_once_by_their_largest_logit():
    results = []
    for micro_batches in (1, 4):
        # SGD: Muon would amplify the rounding of the sum of gradients.
        model, tx = tiny_model(), optax.sgd(0.1)
        steps = micro_batches if micro_batches > 1 else None
        trainer = make(model, tx, steps=4, gradient_accumulation_steps=steps)
        trainer.train(batches(4 * micro_batches, BATCH // micro_batches))
        weights = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        results.append((weights, logged(trainer, "qk_clip/max_logit")))
    assert len(results[1][1]) == 4
    np.testing.assert_allclose(results[1][1], results[0][1], rtol=1e-4)
    assert results[0][1][0] > 1.2 * TAU
    for one, four in zip(*(jax.tree.leaves(weights) for weights, _ in results), strict=True):
        np.testing.assert_allclose(four, one, rtol=1e-3, atol=1e-5)


def test_a_run_that_is_resumed_equals_one_that_is_not(tmp_path):
    def run(steps, folder):
        always = ocp.checkpoint_managers.FixedIntervalPolicy(1)
        options = ocp.CheckpointManagerOptions(save_decision_policy=always)
        trainer = make(
            tiny_model(),
            steps=steps,
            checkpoint_root_directory=str(folder),
            checkpointing_options=options,
        )
        start = trainer.train_steps
        trainer.train(batches(8))  # a new trainer skips the batches that were trained on
        return start, logged(trainer), logged(trainer, "qk_clip/max_logit")

    _, *straight = run(8, tmp_path / "a")
    run(5, tmp_path / "b")
    start, *resumed = run(8, tmp_path / "b")
    assert start == 5
    np.testing.assert_allclose(resumed, np.array(straight)[:, 5:], rtol=1e-5)


@contextlib.contextmanager
def mesh_of_all():
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8, 1), ("fsdp", "tp"), axis_types=(auto, auto))
    with mesh:
        yield mesh


def test_eight_devices_train_as_one():
    trainer = make(tiny_model(), steps=6)
    trainer.train(batches(6))
    model = tiny_model()
    with mesh_of_all() as mesh:
        state = nnx.state(model)
        specs = nnx.get_partition_spec(state)
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            specs,
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )
        nnx.update(model, jax.device_put(state, shardings))
        before = jax.tree.map(lambda x: x.sharding, nnx.state(model, nnx.Param))
        sharded = make(model, steps=6)
        sharded.train(batches(6))
        after = jax.tree.map(lambda x: x.sharding, nnx.state(model, nnx.Param))
    for name in ("loss", "qk_clip/max_logit"):
        np.testing.assert_allclose(logged(sharded, name), logged(trainer, name), rtol=2e-3)
    query = model.layers[0].attn.q_proj.w[...]
    assert not query.sharding.is_fully_replicated
    assert len(query.sharding.device_set) == 8
    leaves = zip(*map(jax.tree.leaves, (before, after, nnx.state(model, nnx.Param))), strict=True)
    # The step of tunix shards vectors anew, with and without the clip.
    assert all(old.is_equivalent_to(new, x.ndim) for old, new, x in leaves if x.ndim > 1)


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


def test_evaluation_is_unchanged():
    trainer = make(tiny_model(), steps=2)
    trainer.config.eval_every_n_steps = 1
    trainer.train(batches(2), [*batches(1)])
    assert trainer.metrics_logger.metric_exists("", "loss", "eval")

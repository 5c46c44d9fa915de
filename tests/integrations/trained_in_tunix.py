"""The trainer of tunix trains a tiny Llama 3 with Muon and QK-clip. `run.sh tunix` runs this."""

import math

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from orbax import checkpoint as ocp
from tunix.models.llama3 import model as llama3
from tunix.sft import peft_trainer

from tests.integrations.tunix_trainer import (
    BATCH,
    LAYERS,
    LENGTH,
    TAU,
    batches,
    inputs,
    logged,
    make,
    mesh_of_all,
    rows,
    tiny_model,
)


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


def test_evaluation_is_unchanged():
    trainer = make(tiny_model(), steps=2)
    trainer.config.eval_every_n_steps = 1
    trainer.train(batches(2), [*batches(1)])
    assert trainer.metrics_logger.metric_exists("", "loss", "eval")

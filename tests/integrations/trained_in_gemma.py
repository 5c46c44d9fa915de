"""The trainer of kauldron trains a tiny Gemma with Muon and QK-clip. `run.sh gemma` runs this."""

import json
import math
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gemma import gm
from gemma.gm.math import _positional_embeddings as positional
from kauldron import kd, konfig
from kauldron.train import metric_writer

import muonclip_jax as mc
from muonclip_jax.integrations.gemma import QKClipTrainStep
from tests.support.golden_tables import read

jax.config.update("jax_numpy_rank_promotion", "allow")  # the models need it
LAYERS, VOCAB, LENGTH, BATCH, TAU = 2, 96, 32, 16, 2.0
D, N, H = 64, 4, 16
LOSS = kd.losses.SoftmaxCrossEntropyWithIntLabels(logits="preds.logits", labels="batch.target")


def tiny_model(kv_heads=2, **settings):
    config = gm.nn.config.TransformerConfig(
        num_embed=VOCAB,
        embed_dim=D,
        hidden_dim=128,
        num_heads=N,
        head_dim=H,
        num_kv_heads=kv_heads,
        final_logit_softcap=None,
        use_post_attn_norm=False,
        use_post_ffw_norm=False,
        attention_types=(gm.nn.AttentionType.GLOBAL,) * LAYERS,
        **settings,
    )
    return gm.nn.Transformer(config=config, dtype=jnp.float32, tokens="batch.input")


def rows(count=BATCH * 32):
    """Counts in steps of 1 to 3; 0 would be padding."""
    rng = np.random.default_rng(0)
    first, by = rng.integers(VOCAB, size=(count, 1)), rng.integers(1, 4, size=(count, 1))
    tokens = 1 + (first + by * np.arange(LENGTH + 1)) % (VOCAB - 1)
    return {
        "input": tokens[:, :-1].astype(np.int32),
        "target": tokens[:, 1:, None].astype(np.int32),
    }


class Loud(kd.ckpts.InitTransform):
    """Multiplies queries and keys, so that the max logits begin above the threshold."""

    def transform(self, state):
        def louder(path, x):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if "attn/qkv_einsum" in name:
                return x.at[:2].multiply(30)
            return x.at[:1].multiply(30) if "attn/kv_" in name else x * (30 if "/q_" in name else 1)

        return state.replace(params=jax.tree_util.tree_map_with_path(louder, state.params))


class Writer(metric_writer.NoopWriter):
    """Keeps the scalars of each step."""

    def write_step_metrics(self, *, step, aux, **others):
        values = aux.compute()
        SCALARS.append(values.loss_values | values.metric_values)


SCALARS = []


def make(steps=20, tx=None, clip=True, model=None, batch=BATCH, threshold=TAU, **settings):
    clip_or_not = {"trainstep": QKClipTrainStep(threshold=threshold)} if clip else {}
    defaults = {"workdir": tempfile.mkdtemp(), "init_transform": Loud(), "examples": 32 * BATCH}
    settings = defaults | clip_or_not | settings
    examples = rows(settings.pop("examples"))
    return kd.train.Trainer(
        seed=0,
        train_ds=kd.data.InMemoryPipeline(loader=lambda: examples, batch_size=batch),
        model=model or tiny_model(),
        train_losses={"xentropy": LOSS},
        num_train_steps=steps - 1,  # kauldron takes one more
        log_metrics_every=1,
        optimizer=tx or mc.muon(0.01, consistent_rms=0.2),
        writer=Writer(),
        **settings,
    )


def train(trainer):
    """Returns the last state, and the logged losses and max logits."""
    SCALARS.clear()
    state, _ = trainer.train()
    logged = {name: np.array([step[name] for step in SCALARS]) for name in SCALARS[0]}
    largest = logged.get("metrics/qk_clip/max_logit", np.zeros(0))
    return state, logged["losses/xentropy"], largest, logged


def max_logits(model, params, tokens, monkeypatch):
    """The max logits [layers, heads] in float64, from what `apply_rope` of the model returns."""
    seen, rope = [], positional.apply_rope
    with monkeypatch.context() as patch, jax.disable_jit():
        record = lambda *a, **k: seen.append(rope(*a, **k)) or seen[-1]  # noqa: E731
        patch.setattr(positional, "apply_rope", record)
        model.apply({"params": params}, jnp.asarray(tokens))
    found = []
    for query, key in zip(seen[::2], seen[1::2], strict=True):
        query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
        key = np.repeat(key, N // key.shape[2], axis=2)
        logits = np.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(H)
        found.append(np.where(np.tri(LENGTH, dtype=bool), logits, -np.inf).max((0, 2, 3)))
    return np.stack(found)


def test_trains_and_keeps_logits_at_the_threshold(monkeypatch):
    model, tokens = tiny_model(), rows()["input"][-BATCH:]
    begin = make().init_state().params
    assert max_logits(model, begin, tokens, monkeypatch).max() > 1.3 * TAU
    state, losses, largest, logged = train(make())
    assert len(losses) == 20
    assert losses[-1] < 0.5 * losses[0]
    unclipped, *_ = train(make(clip=False))
    after, without = (
        max_logits(model, s.params, tokens, monkeypatch).max() for s in (state, unclipped)
    )
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, logit {after:.2f}, without {without:.2f}")
    assert after < 1.5 * TAU < 2 * TAU < without
    np.testing.assert_allclose(
        logged["metrics/qk_clip/min_gamma"], np.minimum(1, TAU / largest), rtol=1e-5
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_are_at_the_threshold_after_the_clip(kv_heads, monkeypatch):
    cap = {"attn_logits_soft_cap": 5.0} if kv_heads == 1 else {}  # as Gemma 2 has it
    model, tokens = tiny_model(kv_heads, **cap), rows(BATCH)["input"]
    trainer = make(2 * LAYERS, optax.sgd(1e-12), model=model, examples=BATCH)
    before = max_logits(model, trainer.init_state().params, tokens, monkeypatch)
    state, _, largest, _ = train(trainer)  # the same batch again: a clip changes later layers
    after = max_logits(model, state.params, tokens, monkeypatch)
    np.testing.assert_allclose(largest[0], before.max(), rtol=1e-5)
    over = before[0] > TAU
    assert over.any()
    assert (before.max(1) > TAU).all()
    assert (after <= TAU * (1 + 1e-5)).all()
    np.testing.assert_allclose(after[0, over], TAU, rtol=1e-5)


def test_values_and_weights_below_the_threshold_keep_their_bits():
    trainer = make(2, optax.sgd(0.0), threshold=1e4)
    state, *_ = train(trainer)
    jax.tree.map(np.testing.assert_array_equal, state.params, trainer.init_state().params)
    trainer = make(2, optax.sgd(0.0), model=tiny_model(kv_heads=4))
    state, *_ = train(trainer)
    new, old = (s.params["layer_0"]["attn"] for s in (state, trainer.init_state()))
    for changed, kept in zip(new["qkv_einsum"]["w"][:2], old["qkv_einsum"]["w"][:2], strict=True):
        assert not np.array_equal(changed, kept)
    np.testing.assert_array_equal(new["qkv_einsum"]["w"][2], old["qkv_einsum"]["w"][2])


def test_roles_equal_the_golden_table():
    config = gm.nn.Gemma2_2B.config
    config = type(config)(**vars(config) | {"attention_types": config.attention_types[:2]})
    model = gm.nn.Transformer(config=config, tokens="batch.input")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 8), int))
    found = {row.path: row for row in mc.routing_table(shapes["params"]).rows}
    expected = read("gemma2_linen").rows
    assert found.keys() == {row.path for row in expected}
    for row in expected:
        assert (found[row.path].shape, found[row.path].optimizer) == (row.shape, *row.optimizers)
        assert not row.matrices or tuple(found[row.path])[3:6] in row.matrices


def test_micro_batches_are_clipped_once_by_their_largest_logit():
    # SGD: Muon would amplify the rounding of the sum of gradients.
    whole, _, largest, _ = train(make(4, optax.sgd(0.1)))
    tx = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    parts, _, found, logged = train(make(8, tx, batch=BATCH // 2))
    np.testing.assert_allclose(found[1::2], largest, rtol=1e-4)
    gammas = logged["metrics/qk_clip/min_gamma"]
    assert largest[0] > 1.2 * TAU
    assert (gammas[::2] == 1).all()
    assert gammas[1] < 1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        parts.params,
        whole.params,
    )


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_run_that_is_resumed_equals_one_that_is_not(tmp_path, micro_batches):
    def run(steps, folder):
        checkpointer = kd.ckpts.Checkpointer(save_interval_steps=1)
        tx = mc.muon(0.01, consistent_rms=0.2)
        tx = tx if micro_batches == 1 else optax.MultiSteps(tx, 2).gradient_transformation()
        # One batch: this data pipeline starts from the beginning.
        trainer = make(steps, tx, examples=BATCH, checkpointer=checkpointer, workdir=folder)
        return train(trainer)[1:3]

    straight = run(8, tmp_path / "a")
    run(6, tmp_path / "b")
    resumed = run(8, tmp_path / "b")
    assert len(resumed[0]) == 3  # from the checkpoint before the sixth step
    np.testing.assert_allclose(resumed, np.array(straight)[:, 5:], rtol=1e-5)


def losses_and_logits(**settings):
    _, losses, largest, _ = train(make(6, **settings))
    return np.stack([losses, largest]).tolist()


def test_eight_devices_train_as_one():
    assert jax.device_count() == 8
    shards = kd.sharding.FSDPSharding(min_size_to_shard_mb=0)
    trainer = make(6, sharding=kd.sharding.ShardingStrategy(params=shards))
    state, losses, largest, _ = train(trainer)
    query = state.params["layer_0"]["attn"]["q_einsum"]["w"]
    assert not query.sharding.is_fully_replicated
    assert len(query.sharding.device_set) == 8
    module = "tests.integrations.trained_in_gemma"
    code = f"import json, {module} as t; print(json.dumps(t.losses_and_logits()))"
    one = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
    )
    alone = json.loads(one.stdout.splitlines()[-1])
    np.testing.assert_allclose([losses, largest], alone, rtol=2e-3)


def test_lora_trains_adapters_and_refuses_to_clip():
    model = gm.nn.LoRA(rank=4, model=tiny_model(), dtype=jnp.float32)
    tx = kd.optim.partial_updates(mc.muon(0.01), mask=kd.optim.select("lora"))
    with pytest.raises(ValueError, match="QKClipTrainStep: the model has LoRA parameters"):
        make(3, tx, model=model).init_state()
    trainer = make(3, tx, model=model, threshold=math.inf)
    begin = jax.tree.leaves_with_path(trainer.init_state().params)
    state, _, largest, logged = train(trainer)
    assert (largest > TAU).all()
    assert (logged["metrics/qk_clip/clipped_heads"] == 0).all()
    for (path, old), new in zip(begin, jax.tree.leaves(state.params), strict=True):
        frozen = "lora" not in jax.tree_util.keystr(path)
        assert np.array_equal(old, new) == frozen, path


def test_norms_of_queries_and_keys_raise():
    trainer = make(2, model=tiny_model(use_qk_norm=True))
    with pytest.raises(ValueError, match="queries or keys are normalized after their projection"):
        train(trainer)
    _, _, largest, _ = train(make(2, model=tiny_model(use_qk_norm=True), threshold=math.inf))
    assert np.isfinite(largest).all()


def test_a_config_of_kauldron_resolves():
    with konfig.imports():
        import muonclip_jax as lazy_mc
        from muonclip_jax.integrations import gemma as lazy_gemma
    config = konfig.ConfigDict(
        {
            "optimizer": lazy_mc.muon(learning_rate=0.01, consistent_rms=0.2),
            "trainstep": lazy_gemma.QKClipTrainStep(threshold=TAU),
        }
    )
    config = konfig.ConfigDict(json.loads(config.to_json()))
    resolved = konfig.resolve(config)
    assert isinstance(resolved["trainstep"], QKClipTrainStep)
    assert isinstance(resolved["optimizer"], optax.GradientTransformation)

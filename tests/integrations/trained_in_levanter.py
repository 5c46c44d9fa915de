"""Levanter's own trainer with MuonClip on tiny models: `bash tests/integrations/run.sh levanter`.

The process has eight devices; `python -m tests.integrations.trained_in_levanter FOLDER` trains on
one, for comparison.
"""

import dataclasses
import itertools
import json
import pathlib
import shutil
import subprocess
import sys

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from haliax.state_dict import to_torch_compatible_state_dict
from levanter.checkpoint import CheckpointerConfig
from levanter.layers.attention import Attention, AttentionConfig, AttentionMask, materialize_mask
from levanter.main.train_lm import TrainLmConfig
from levanter.models.lm_model import LmExample
from levanter.optim.config import AdamConfig
from levanter.optim.model_averaging import EmaModelAveragingConfig
from levanter.tracker import NoopConfig, Tracker
from levanter.trainer import Trainer, TrainerConfig

from muonclip_jax.integrations.levanter import (
    MuonClipConfig,
    MuonClipTrainer,
    attention as clip_of_attention,
    dimension_numbers,
)
from tests.integrations.levanter_cases import GOLDEN, lines
from tests.integrations.levanter_models import LENGTH, MODELS, VOCAB, build, parameters

ROOT = pathlib.Path(__file__).parents[2]
BATCH, STEPS, TAU = 32, 20, 1.5
OPTIMIZER = MuonClipConfig(learning_rate=0.01, qk_clip_threshold=TAU)
SMALL_RATE = dataclasses.replace(
    OPTIMIZER, learning_rate=1e-9, weight_decay=0.0, warmup=0, lr_schedule="constant"
)


@pytest.fixture(autouse=True)
def ranks_of_levanter():
    with jax.numpy_rank_promotion("allow"):
        yield


class Log(Tracker):
    """Keeps what the trainer logs, by step."""

    name = "log"

    def __init__(self):
        self.steps = {}

    def log(self, metrics, *, step, commit=None):
        if step is not None:
            self.steps.setdefault(int(step), {}).update(metrics)

    def log_hyperparameters(self, hparams):
        pass

    def log_summary(self, metrics):
        pass

    def log_artifact(self, artifact_path, *, name=None, type=None):
        pass

    def finish(self):
        pass

    def series(self, name):
        return [float(np.asarray(m[name])) for _, m in sorted(self.steps.items()) if name in m]


def batches(skip=0, constant=False):
    """Sequences that count up by 1, 2 or 3."""
    Batch, Pos = hax.Axis("batch", BATCH), hax.Axis("position", LENGTH)
    for index in itertools.count(skip):
        rng = np.random.default_rng(0 if constant else index)
        start, by = rng.integers(VOCAB, size=(BATCH, 1)), rng.integers(1, 4, size=(BATCH, 1))
        tokens = jnp.asarray((start + by * np.arange(LENGTH)) % VOCAB, jnp.int32)
        yield hax.vmap(LmExample.causal, Batch)(hax.named(tokens, (Batch, Pos)))


def next_token_loss(model, example, *, key=None):
    return model.compute_next_token_loss(example, key=key)


def trainer_of(folder, optimizer=OPTIMIZER, cls=MuonClipTrainer, loss=next_token_loss, **config):
    if not isinstance(optimizer, optax.GradientTransformation):
        optimizer = optimizer.build(STEPS)
    settings = TrainerConfig(
        id="run",
        num_train_steps=STEPS,
        train_batch_size=BATCH,
        tracker=NoopConfig(),
        require_accelerator=False,
        log_jaxprs=False,
        log_xla_hlo=False,
        log_dir=folder / "logs",
        checkpointer=CheckpointerConfig(base_path=str(folder / "steps"), keep=[dict(every=10)]),
        **config,
    )
    settings.initialize()
    trainer = cls(settings, optimizer, loss)
    trainer.tracker = Log()
    return trainer


def loud(model, by=4.0):
    """Multiplies queries and keys, so that there is something to clip."""

    def louder(x):
        if not isinstance(x, Attention):
            return x
        where = lambda a: (a.q_proj.weight, a.k_proj.weight)  # noqa: E731
        return eqx.tree_at(where, x, tuple(w * by for w in where(x)))

    return jax.tree.map(louder, model, is_leaf=lambda x: isinstance(x, Attention))


def state_of(trainer, model="llama", **arguments):
    init = (lambda: loud(build(model))) if isinstance(model, str) else (lambda: model)
    return trainer.initial_state(jax.random.PRNGKey(1), model_init=init, **arguments)


def train(trainer, model="llama", stop=STEPS, constant=False, **arguments):
    """Trains to the step `stop`; returns the state, the losses and the log."""
    with trainer:
        state, losses = state_of(trainer, model, **arguments), []
        data = batches(int(state.step), constant)
        while int(state.step) < stop:
            info = trainer.train_step(state, next(data))
            state = info.state
            losses.append(info.loss)
    return state, losses, trainer.tracker


def gradients(trainer, model="llama"):
    """Computes the gradients of one step, and the metrics with the slots."""
    with trainer:
        state = state_of(trainer, model)
        compute = eqx.filter_jit(trainer._compute_gradients_microbatched)
        return compute(trainer.loss_fn, state.model, next(batches()), key=jax.random.PRNGKey(0))


def equal(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    with jax.numpy_rank_promotion("allow"):
        return folder, *train(trainer_of(folder))


def max_logits_by_hand(model, example):
    """The max logits of the first layer of a Llama, in float64."""
    first = model.transformer.layers.get_layer(0)
    x = model.embeddings.embed(example.tokens)
    query, key, _ = first.self_attn._compute_qkv(first.input_layernorm(x), key=None)
    return masked_maximum(query, key, example.attn_mask)


def masked_maximum(query, key, mask):
    """Largest logit of each head, [key_heads, groups], of all logits in NumPy."""
    key = key.rename({"position": "key_position"})
    axes = [*query.axes[:1], "kv_head", "q_heads_per_group", "position", "head_size"]
    q = np.asarray(query.rearrange(axes).array, np.float64)
    k = np.asarray(key.rearrange([axes[0], "kv_head", "key_position", "head_size"]).array)
    logits = np.einsum("bkgth,bksh->bkgts", q, k.astype(np.float64)) / np.sqrt(q.shape[-1])
    position, key_position = query.resolve_axis("position"), key.resolve_axis("key_position")
    seen = materialize_mask(mask, position, key_position)
    if seen is not None:
        pairs = (*query.resolve_axis(tuple(axes[:1])), position, key_position)
        seen = np.asarray(seen.broadcast_to(pairs).rearrange(pairs).array)[:, None, None]
        logits = np.where(seen, logits, -np.inf)
    return logits.max(axis=(0, 3, 4))


def run_module(*arguments):
    """Runs a module in a process with one device; returns all that it prints."""
    command = [sys.executable, "-m", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


# --- training -------------------------------------------------------------------------------------


def test_llama_trains_and_is_clipped(llama):
    _, _, losses, log = llama
    largest = log.series("qk_clip/max_logit")
    assert len(losses) == len(largest) == STEPS
    assert losses[-1] < 0.8 * losses[0]
    assert largest[0] > 10 * TAU
    assert max(largest[STEPS // 2 :]) < 1.3 * TAU
    assert log.series("qk_clip/clipped_heads")[0] > 0
    assert log.series("qk_clip/nonfinite_heads") == [0] * STEPS
    rate = OPTIMIZER.lr_scheduler(STEPS)
    np.testing.assert_allclose(
        log.series("optim/learning_rate"), [rate(i) for i in range(STEPS)], rtol=1e-6
    )


def test_without_the_clip_logits_stay_large(tmp_path):
    watching = dataclasses.replace(OPTIMIZER, qk_clip_threshold=float("inf"))
    _, _, log = train(trainer_of(tmp_path, watching), stop=3)
    assert min(log.series("qk_clip/max_logit")) > 10 * TAU
    assert log.series("qk_clip/clipped_heads") == [0] * 3


def test_the_clip_reaches_the_threshold(tmp_path):
    example = next(batches())
    before = max_logits_by_hand(loud(build("llama")), example)
    state, _, log = train(trainer_of(tmp_path, SMALL_RATE), stop=4, constant=True)
    after = max_logits_by_hand(state.model, example)
    assert (before > TAU).all()
    np.testing.assert_allclose(after, TAU, rtol=1e-5)  # of each head of the first layer
    largest = log.series("qk_clip/max_logit")
    assert largest[0] >= before.max() * (1 - 1e-6)
    assert largest[-1] <= TAU * (1 + 1e-5)


def test_qwen_with_biases_trains_and_is_clipped(tmp_path):
    _, losses, log = train(trainer_of(tmp_path), "qwen")
    largest = log.series("qk_clip/max_logit")
    assert losses[-1] < 0.8 * losses[0]
    assert largest[0] > 10 * TAU
    assert max(largest[STEPS // 2 :]) < 1.3 * TAU


def test_a_resumed_run_equals_a_run_without_a_stop(llama, tmp_path):
    folder, state, losses, _ = llama
    saved = sorted(path.name for path in (folder / "steps/run").iterdir())
    assert "step-10" in saved
    shutil.copytree(folder / "steps/run/step-10", tmp_path / "steps/run/step-10")
    resumed, again, _ = train(trainer_of(tmp_path))
    assert again == losses[-len(again) :]
    assert 0 < len(again) < STEPS
    assert equal(resumed.model, state.model)
    assert equal(resumed.opt_state, state.opt_state)


def test_eight_devices_equal_one(llama, tmp_path):
    _, state, losses, log = llama
    weight = state.model.transformer.layers.stacked.self_attn.q_proj.weight.array
    assert len(weight.sharding.device_set) == jax.device_count() == 8
    output = run_module("tests.integrations.trained_in_levanter", str(tmp_path))
    one = json.loads(next(x for x in output.splitlines() if x.startswith('{"devices"')))
    assert one["devices"] == 1
    assert one["micro_batches_equal_one_batch"]  # bit for bit
    count = len(one["losses"])
    np.testing.assert_allclose(one["losses"], losses[:count], rtol=1e-4)
    largest = log.series("qk_clip/max_logit")[:count]
    np.testing.assert_allclose(one["max_logits"], largest, rtol=1e-4)


def test_train_lm_runs_from_yaml(tmp_path):
    write_files_of_train_lm(tmp_path)
    config = str(tmp_path / "config.yaml")
    text = run_module("muonclip_jax.integrations.levanter", "train_lm", "--config_path", config)
    assert "qk_clip/max_logit" in text
    assert "optim/learning_rate" in text
    (exported,) = (tmp_path / "exported").glob("**/model.safetensors")
    assert b"model.layers.0.self_attn.q_proj.weight" in exported.read_bytes()
    assert b"max_logits" not in exported.read_bytes()
    index = json.loads(next((tmp_path / "exported").glob("**/config.json")).read_text())
    assert index["num_hidden_layers"] == 2


def write_files_of_train_lm(folder):
    """A tokenizer of the numbers below 128, sequences that count, and a config."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(unk_token="0", eos_token="1", bos_token="2")
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder / "tokenizer")
    rows = [[(start + i) % VOCAB for i in range(LENGTH)] for start in range(400)]
    text = "\n".join(json.dumps({"input_ids": row}) for row in rows)
    (folder / "train.jsonl").write_text(text)
    tokenizer = str(folder / "tokenizer")
    counting = {
        "source": {"type": "url", "train_urls": [str(folder / "train.jsonl")]},
        "format": {"type": "prebuilt"},
    }
    config = {
        "data": {
            "tokenizer": tokenizer,
            "cache_dir": str(folder / "cache"),
            "components": {"counting": counting},
        },
        "model": {
            "type": "llama",
            "tokenizer": tokenizer,
            "reference_checkpoint": tokenizer,
            "max_seq_len": LENGTH,
            "hidden_dim": 32,
            "intermediate_dim": 48,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
        },
        "optimizer": {"type": "muonclip", "learning_rate": 0.01, "qk_clip_threshold": 1.0},
        "trainer": {
            "tracker": {"type": "json_logger"},
            "num_train_steps": 4,
            "train_batch_size": 16,
            "require_accelerator": False,
            "log_jaxprs": False,
            "log_xla_hlo": False,
            "log_dir": str(folder / "logs"),
            "checkpointer": {"base_path": str(folder / "steps")},
        },
        "hf_save_path": str(folder / "exported"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


# --- roles and settings ---------------------------------------------------------------------------


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


# --- the statistic --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with jax.numpy_rank_promotion("allow"):
        return gradients(trainer_of(tmp_path_factory.mktemp("whole")))


def test_micro_batches_equal_one_batch(whole, tmp_path):
    """Eight devices multiply parts of other sizes, so that products differ in the last bit."""
    trainer = trainer_of(tmp_path, per_device_parallelism=1)
    assert trainer.config.microbatch_size * 4 == BATCH
    _, _, metrics = gradients(trainer)
    (slot,), (expected,) = metrics["qk_clip_slots"], whole[2]["qk_clip_slots"]
    np.testing.assert_allclose(slot.value.array, expected.value.array, rtol=1e-6)
    assert (slot.count.array == 1).all()
    by_hand = max_logits_by_hand(loud(build("llama")), next(batches()))
    np.testing.assert_allclose(slot.value.array[0], by_hand, rtol=1e-5)


def test_layers_without_a_scan_have_slots_of_their_own(tmp_path):
    _, _, metrics = gradients(trainer_of(tmp_path), "llama_unscanned")
    first, second = metrics["qk_clip_slots"]
    by_hand = max_logits_by_hand(loud(build("llama_unscanned")), next(batches()))
    np.testing.assert_allclose(first.value.array, by_hand, rtol=1e-5)
    assert (first.count.array == 1).all()
    assert (second.count.array == 1).all()


def test_slots_stay_out_of_gradients_and_the_optimizer(whole, tmp_path):
    plain = dataclasses.replace(OPTIMIZER, qk_clip_threshold=None)
    _, grads, _ = gradients(trainer_of(tmp_path, plain, Trainer))
    assert jax.tree.structure(grads) == jax.tree.structure(whole[1])
    assert equal(grads, whole[1])
    # max_grad_norm is in front of Muon: with slots in the gradient, its norm would differ.
    watching = dataclasses.replace(OPTIMIZER, qk_clip_threshold=float("inf"))
    clipped, *_ = train(trainer_of(tmp_path / "a", watching), stop=2)
    expected, *_ = train(trainer_of(tmp_path / "b", plain, Trainer), stop=2)
    assert equal(clipped.model, expected.model)
    assert equal(clipped.opt_state, expected.opt_state)
    names = [to_torch_compatible_state_dict(state.model).keys() for state in (clipped, expected)]
    assert names[0] == names[1]


def test_bfloat16_does_not_round_the_statistic(tmp_path):
    import jmp

    policy = jmp.get_policy("params=float32,compute=bfloat16,output=float32")
    _, _, metrics = gradients(trainer_of(tmp_path, mp=policy))
    s = metrics["qk_clip_slots"][0].value.array
    assert s.dtype == jnp.float32
    assert not np.array_equal(s, s.astype(jnp.bfloat16).astype(jnp.float32))


def masks():
    Batch, Pos = hax.Axis("batch", 2), hax.Axis("position", 16)
    Key = Pos.alias("key_position")
    rng = np.random.default_rng(1)
    ids = hax.named(np.sort(rng.integers(3, size=(2, 16)), axis=1), (Batch, Pos))
    pairs = hax.named((rng.random((16, 16)) < 0.3) | np.eye(16, dtype=bool), (Pos, Key))
    causal = AttentionMask.causal()
    return {
        "none": None,
        "causal": causal,
        "offset": AttentionMask.causal(offset=2),
        "window": AttentionMask.causal(sliding_window=3),
        "both ways": AttentionMask.bidirectional_sliding_window(2),
        "segments": causal.with_segment_ids(ids),
        "segments of keys": causal.with_segment_ids(ids, ids.rename({"position": "key_position"})),
        "explicit": AttentionMask.explicit(pairs),
        "array": pairs,
        "array of the batch": pairs.broadcast_axis(Batch),
        "causal and explicit": causal & AttentionMask.explicit(pairs),
    }


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("name", masks())
def test_max_logits_see_the_pairs_of_the_mask(name, window):
    mask = masks()[name]
    config = AttentionConfig(hax.Axis("embed", 32), 4, 2, sliding_window=window)
    axes = (hax.Axis("batch", 2), hax.Axis("position", 16), config.KVHeads)
    of_queries, of_keys = (config.QHeadsPerGroup, config.HeadSize), (config.HeadSize,)
    query = hax.random.normal(jax.random.PRNGKey(0), (*axes, *of_queries))
    key = hax.random.normal(jax.random.PRNGKey(1), (*axes, *of_keys))
    found = clip_of_attention._max_logits(query, key, mask, config)
    if window is not None and isinstance(mask, AttentionMask):  # as Attention does
        mask = mask.with_sliding_window(window)
    np.testing.assert_allclose(found, masked_maximum(query, key, mask), rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen"])
def test_a_clip_scales_weights_and_biases(name):
    model = build(name)
    layer = lambda m: m.transformer.layers.stacked.self_attn  # noqa: E731
    attention = layer(model)
    if attention.q_proj.bias is not None:  # biases start as zeros
        where = lambda a: (a.q_proj.bias, a.k_proj.bias)  # noqa: E731
        attention = eqx.tree_at(where, attention, tuple(x + 1 for x in where(attention)))
        model = eqx.tree_at(layer, model, attention)
    s = hax.named(np.array([[[2, 1], [8, 0.5]]] * 2, np.float32), attention.q_proj.weight.axes[:3])
    slot = clip_of_attention.MaxLogits(s, s * 0 + 1)
    new, metrics, counts = clip_of_attention.clipped(model, model, [slot], 2.0)
    factor = np.array([[[1, 1], [0.25, 1]]] * 2)
    assert metrics["qk_clip/clipped_heads"] == 2
    assert counts == {"transformer/layers/stacked/self_attn": pytest.approx([1, 1])}
    for leaf in ("weight", "bias"):
        old = getattr(attention.q_proj, leaf)
        if old is not None:
            scaled = getattr(layer(new).q_proj, leaf)
            assert scaled.axes == old.axes
            by = factor.reshape(*factor.shape, *(1,) * (old.array.ndim - 3))
            np.testing.assert_allclose(scaled.array, old.array * by, rtol=1e-6)
    assert equal(layer(new).k_proj, attention.k_proj)  # its queries share the key
    assert equal(layer(new).v_proj, attention.v_proj)


def test_the_average_of_the_model_is_of_clipped_weights(tmp_path):
    settings = EmaModelAveragingConfig(beta=0.5)
    trainer = trainer_of(tmp_path, SMALL_RATE, model_averaging=settings)
    state, *_ = train(trainer, stop=1)
    attention = lambda m: m.transformer.layers.stacked.self_attn.q_proj.weight.array  # noqa: E731
    before, after = attention(loud(build("llama"))), attention(state.model)
    average = attention(state.model_averaging.model_params)
    np.testing.assert_allclose(average, 0.5 * before + 0.5 * after, rtol=1e-5)
    assert np.abs(after - before).max() > 0.1


# --- guards ---------------------------------------------------------------------------------------


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


if __name__ == "__main__":
    scratch = pathlib.Path(sys.argv[1])
    _, one_losses, one_log = train(trainer_of(scratch / "one"), stop=6)
    parts = trainer_of(scratch / "parts", per_device_parallelism=BATCH // 4)
    runs = [trainer_of(scratch / "whole"), parts]
    slots = [gradients(run)[2]["qk_clip_slots"] for run in runs]
    found = {
        "devices": jax.device_count(),
        "losses": one_losses,
        "max_logits": one_log.series("qk_clip/max_logit"),
        "micro_batches_equal_one_batch": equal(*slots),
    }
    print(json.dumps(found))

"""Levanter's own trainer with MuonClip on tiny models: `bash tests/integrations/run.sh levanter`.

The process has eight devices; `python -m tests.integrations.trained_in_levanter FOLDER` trains on
one, for comparison.
"""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml

from tests.integrations.levanter_models import LENGTH, VOCAB, build
from tests.integrations.levanter_trainer import (
    BATCH,
    OPTIMIZER,
    SMALL_RATE,
    STEPS,
    TAU,
    batches,
    equal,
    gradients,
    loud,
    max_logits_by_hand,
    train,
    trainer_of,
)

pytestmark = pytest.mark.usefixtures("rank_promotion")
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    with jax.numpy_rank_promotion("allow"):
        return folder, *train(trainer_of(folder))


def run_module(*arguments):
    """Runs a module in a process with one device; returns all that it prints."""
    command = [sys.executable, "-m", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


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

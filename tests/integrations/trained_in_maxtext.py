"""MaxText's own trainer with `muonclip_jax.integrations.maxtext`: tiny models on CPU devices.

    bash tests/integrations/run.sh maxtext

MaxText's synthetic data is one constant batch, so that losses fall fast, and steps with a learning
rate of 0 show what the clip alone does.
"""

import functools
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest

from muonclip_jax.integrations import maxtext
from tests.support.pages import ROOT

TAU = 0.5
BASE = """src/maxtext/configs/base.yml
hardware=cpu dataset_type=synthetic skip_jax_distributed_system=true enable_goodput_recording=false
monitor_goodput=false enable_tensorboard=false gcs_metrics=false log_period=1 max_target_length=32
vocab_size=256 base_emb_dim=64 base_mlp_dim=128 base_num_query_heads=4 head_dim=16
base_num_decoder_layers=3 attention=dot_product dtype=float32 weight_dtype=float32
enable_checkpointing=false per_device_batch_size=8 warmup_steps_fraction=0 learning_rate=0.01
opt_type=muon muon_consistent_rms=0.2 muon_weight_decay=0.1
"""
GQA = "decoder_block=llama2 base_num_kv_heads=2"
MLA = """
decoder_block=deepseek base_num_kv_heads=4 attention_type=mla q_lora_rank=16 kv_lora_rank=16
qk_nope_head_dim=8 qk_rope_head_dim=4 v_head_dim=8 num_experts=4 num_experts_per_tok=2
shared_experts=1 base_moe_mlp_dim=32 first_num_dense_layers=1 megablox=false sparse_matmul=false
"""
CLIP = f"qk_clip_threshold={TAU}"
OURS = "-m muonclip_jax.integrations.maxtext"
OPTAX = "-m maxtext.trainers.pre_train.train"
TWO_LINES = """
from absl import app
from maxtext.trainers.pre_train import train
from muonclip_jax.integrations import maxtext
maxtext.install({})
app.run(train.main)
"""
EIGHT = "--xla_force_host_platform_device_count=8"
FSDP = "per_device_batch_size=1 ici_fsdp_parallelism=4 ici_tensor_parallelism=2"


class Run(NamedTuple):
    """The metrics of MaxText for each step, and its log."""

    loss: list[float]
    max_logit: list[float]
    clipped_heads: list[float]
    rate: list[float]
    log: str


NAMES = {
    "loss": "learning/loss",
    "max_logit": "qk_clip/max_logit",
    "clipped_heads": "qk_clip/clipped_heads",
    "rate": "learning/current_learning_rate",
}
_number = itertools.count()


@pytest.fixture(scope="session")
def train(tmp_path_factory):
    """Trains in a process of its own, at most once with each arguments."""
    folder = tmp_path_factory.mktemp("maxtext")

    @functools.cache
    def run(settings, program=OURS, flags="", name=None):
        name = name or f"run{next(_number)}"
        metrics = folder / f"{name}_{next(_number)}.jsonl"
        arguments = [f"base_output_directory={folder}", f"run_name={name}"]
        arguments.append(f"metrics_file={metrics}")
        code = ["-c", program] if "\n" in program else program.split()
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "DECOUPLE_GCLOUD": "TRUE",
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"--xla_backend_optimization_level=0 {flags}",
        }
        done = subprocess.run(
            [sys.executable, *code, *BASE.split(), *settings.split(), *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        columns = {key: [row.get(name) for row in rows] for key, name in NAMES.items()}
        return Run(**columns, log=done.stderr)

    return run


MODELS = {
    "GQA": GQA,
    "MLA": MLA,
    "MLA without low rank of queries": f"{MLA} q_lora_rank=0",
    "GQA unscanned": f"{GQA} scan_layers=false",
    "MLA unscanned": f"{MLA} scan_layers=false",
}


@pytest.mark.parametrize("model", MODELS)
def test_trains_and_clips_to_the_threshold(train, model):
    run = train(f"{MODELS[model]} {CLIP} steps=20 learning_rate_schedule_steps=16")
    assert run.loss[-1] < 0.25 * run.loss[0]
    assert run.max_logit[0] > 8 * TAU
    assert run.clipped_heads[0] == 12
    assert max(run.max_logit[2:]) < 2 * TAU
    # Without updates the clip settles layer by layer: each one changes the inputs of the next.
    assert run.rate[16:] == [0] * 4
    assert run.max_logit[19] <= TAU * (1 + 1e-6)


def test_without_the_clip_logits_grow_and_losses_are_those_of_optax(train):
    reported = train(f"{GQA} qk_clip_threshold=inf steps=20")
    stock = train(f"{GQA} steps=20", OPTAX)
    np.testing.assert_allclose(reported.loss, stock.loss, rtol=2e-3)
    assert reported.loss[-1] < 0.1 * reported.loss[0]
    assert reported.clipped_heads == [0] * 20
    assert reported.max_logit[-1] > 10 * TAU


@pytest.mark.parametrize("model", ["GQA", "MLA"])
def test_roles_are_those_of_the_golden_file(train, model):
    run = train(f"{MODELS[model]} {CLIP} steps=20 learning_rate_schedule_steps=16")
    lines = iter(run.log.splitlines())
    assert any(line.endswith("muonclip_jax.muon") for line in lines)
    printed = list(itertools.takewhile(lambda line: not line.startswith("I1"), lines))
    golden = (pathlib.Path(__file__).parent / "maxtext_roles.txt").read_text()
    expected = golden.split(f"# {model}\n")[1].split("\n# ")[0].rstrip().splitlines()
    assert printed[: len(expected)] == expected


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_eight_devices_equal_one_and_exchange_matrices(train, tmp_path, mode):
    settings = f"{GQA} {CLIP} steps=12"
    one = train(settings)
    dump = f"--xla_dump_to={tmp_path} --xla_dump_hlo_module_re=train_step"
    eight = train(f"{settings} {FSDP} shard_mode={mode}", flags=f"{EIGHT} {dump}")
    np.testing.assert_allclose(eight.loss, one.loss, rtol=1e-3)
    np.testing.assert_allclose(eight.max_logit, one.max_logit, rtol=1e-3)
    assert eight.clipped_heads[0] == 12
    assert exchanges(tmp_path) == 6  # of three shapes, there and back


def test_on_an_auto_mesh_the_shardings_are_what_makes_it_exchange_matrices(train, tmp_path):
    dump = f"--xla_dump_to={tmp_path} --xla_dump_hlo_module_re=train_step"
    settings = f"{GQA} {CLIP} steps=1 {FSDP}"
    train(settings, TWO_LINES.format("shardings=None"), flags=f"{EIGHT} {dump}")
    assert exchanges(tmp_path) == 0


def exchanges(folder):
    """The number of all-to-alls that the plan of `mc.muon` has put into a program."""
    (program,) = folder.glob("*train_step*after_optimizations.txt")
    return len(re.findall(r' all-to-all\(.*/shard_map/all_to_all"', program.read_text()))


def test_eight_devices_equal_one_in_latent_attention(train):
    settings = f"{MLA} {CLIP} steps=12"
    one, eight = train(settings), train(f"{settings} {FSDP}", flags=EIGHT)
    np.testing.assert_allclose(eight.loss, one.loss, rtol=1e-3)
    np.testing.assert_allclose(eight.max_logit, one.max_logit, rtol=1e-3)


def test_sharding_the_optimizer_over_data_changes_nothing(train):
    settings = f"{GQA} {CLIP} steps=12"
    sharded = f"{settings} per_device_batch_size=1 ici_data_parallelism=8 ici_fsdp_parallelism=1"
    one, eight = train(settings), train(f"{sharded} shard_optimizer_over_data=true", flags=EIGHT)
    np.testing.assert_allclose(eight.loss, one.loss, rtol=1e-3)
    np.testing.assert_allclose(eight.max_logit, one.max_logit, rtol=1e-3)


@pytest.mark.parametrize("model", ["GQA", "MLA"])
def test_micro_batches_have_the_max_logits_of_the_batch(train, model):
    settings = f"{MODELS[model]} {CLIP} steps=12"
    micro = f"{settings} per_device_batch_size=2 gradient_accumulation_steps=4"
    one, four = train(settings), train(micro)
    np.testing.assert_allclose(four.max_logit[0], one.max_logit[0], rtol=1e-6)
    np.testing.assert_allclose(four.max_logit, one.max_logit, rtol=1e-3)
    np.testing.assert_allclose(four.loss, one.loss, rtol=1e-3)


def test_a_run_that_was_stopped_goes_on_as_the_whole_one(train):
    settings = f"{GQA} {CLIP} learning_rate_schedule_steps=14"
    saving = "enable_checkpointing=true async_checkpointing=false checkpoint_period=6"
    first = train(f"{settings} {saving} steps=7", name="stopped")
    second = train(f"{settings} {saving} steps=14", name="stopped")
    whole = train(f"{settings} steps=14")
    assert len(second.loss) == 7
    assert first.loss + second.loss == whole.loss
    assert first.max_logit + second.max_logit == whole.max_logit


def test_a_skipped_step_is_not_clipped(train):
    # A negative factor calls every step a spike, from half the interval on.
    skip = "skip_step_on_spikes=true skip_step_interval=16 skip_step_scaling_factor=-1e6"
    run = train(f"{GQA} {CLIP} steps=12 {skip}")
    assert run.clipped_heads[0] == 12
    assert run.clipped_heads[6] > 0
    assert run.clipped_heads[7:] == [0] * 5
    assert run.max_logit[7:] == [run.max_logit[7]] * 5
    assert run.max_logit[7] > TAU


# --- In this process ------------------------------------------------------------------------------


@pytest.fixture
def maxtext_allows():
    """MaxText broadcasts ranks; whatever is installed goes."""
    with jax.numpy_rank_promotion("allow"):
        yield
    maxtext.uninstall()


def build(settings):
    """Builds MaxText's optimizer."""
    from maxtext.configs import pyconfig
    from maxtext.utils import maxtext_utils, model_creation_utils, train_utils

    config = pyconfig.initialize(["", *BASE.split(), *settings.split(), "run_name=built"])
    mesh = maxtext_utils.get_mesh_from_config(config)
    _, model = model_creation_utils.create_nnx_abstract_model(config, mesh)
    return train_utils.create_training_optimizer(config, model, mesh=mesh)[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("attn_logits_soft_cap=50.0", "Set attn_logits_soft_cap=0.0, or train without the clip"),
        ("use_qk_norm=true", "Set use_qk_norm=false, or train without the clip"),
        ("trainable_parameters_mask=['mlp']", "Train all parameters, or train without the clip"),
        ("fused_qkv=true", "Set fused_qkv=false, or train without the clip"),
        ("share_kv_projections=true", r"install\(alpha=1\)"),
        ("muon_type=maxtext_muon", "set muon_type=optax_muon"),
    ],
)
def test_settings_that_raise(maxtext_allows, settings, message):
    maxtext.install()
    with pytest.raises(ValueError, match=message):
        build(f"{GQA} {settings}")


def test_attention_that_cannot_record_raises(train):
    with pytest.raises(AssertionError, match="ValueError: attention='flash' records no max logits"):
        train(f"{GQA} {CLIP} steps=1 attention=flash")


def test_more_arguments_reach_muon(maxtext_allows, monkeypatch):
    from maxtext.utils import max_logging

    logged = []
    monkeypatch.setattr(max_logging, "log", logged.append)
    maxtext.install(per_head=True, overrides={"*/mlp/wo/kernel": None})
    build(GQA)
    (table,) = (text for text in logged if text.startswith("muonclip_jax.muon"))
    rows = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert "12 heads x 64 x 16" in rows["decoder/layers/self_attention/query/kernel"]
    assert "6 heads x 64 x 16" in rows["decoder/layers/self_attention/key/kernel"]
    assert "adamw" in rows["decoder/layers/mlp/wo/kernel"]


def test_installing_twice_and_uninstalling(maxtext_allows):
    from maxtext.layers.attention_op import AttentionOp
    from maxtext.optimizers import optimizers
    from maxtext.trainers.pre_train import train as trainer

    def replaced():
        return optimizers.get_optimizer, AttentionOp.__call__, trainer.train_step

    stock = replaced()
    maxtext.install()
    uninstall = maxtext.install(qk_clip=False)
    assert [new is old for new, old in zip(replaced(), stock, strict=True)] == [False, True, True]
    uninstall()
    assert replaced() == stock

"""EasyDeL's own trainer with `muonclip_jax.integrations.easydel`: tiny models on CPU devices.

bash tests/integrations/run.sh easydel
"""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.support.pages import ROOT

TAU = 2.0
WHOLE = {
    "model": "llama",
    "name": "whole",
    "threshold": TAU,
    "steps": 20,
    "learning_rate": 0.01,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
}
# EasyDeL does not save `attn_dtype`: a resumed model has its default, bfloat16.
SAVED = WHOLE | {"name": "saved", "save_steps": 10, "attn_dtype": None}
# A tiny rate: the clip alone changes the weights.
STILL = {"threshold": TAU, "steps": 4, "learning_rate": 1e-9, "weight_decay": 0.0, "oracle": True}
PLAIN = {"model": "llama", "steps": 3, "learning_rate": 0.01, "clip_grad": 1.0}
GROUPS = {  # each trains in a process of its own
    "llama": {
        "llama roles": {"model": "llama", "roles": True},
        "whole": WHOLE,
        "llama": STILL | {"model": "llama", "name": "still"},
        "llama, micro-batches and clip_grad": STILL
        | {"model": "llama", "name": "micro", "gradient_accumulation_steps": 4, "clip_grad": 1.0},
        "reported": PLAIN | {"name": "reported", "threshold": 1e30},
        "plain": PLAIN | {"name": "plain", "threshold": None},
    },
    "mla": {
        "mla roles": {"model": "mla", "roles": True},
        "mla": STILL | {"model": "mla", "name": "mla"},
        "mla trained": WHOLE | {"model": "mla", "name": "mla_trained"},
    },
    "saved": {"saved": SAVED},
}


def run(folder, name, cases, devices=1):
    """Trains in a process of its own; returns what the worker gave, and its log."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps(list(cases.values())))
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count="
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags}{devices}",
        "PYTHONPATH": str(ROOT),
        "COMPILE_FUNC_DIR": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.integrations.easydel_worker", str(file)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    return dict(zip(cases, json.loads(file.with_suffix(".out").read_text()), strict=True)), log


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("easydel")


@pytest.fixture(scope="session")
def result(folder):
    """Returns the result of a case; trains its group at most once."""
    group = functools.cache(lambda name: run(folder, name, GROUPS[name])[0])
    return lambda case: group(next(name for name in GROUPS if case in GROUPS[name]))[case]


def column(found, name):
    return [step[name] for step in found["log"]]


@pytest.mark.parametrize("case", ["whole", "mla trained", "saved"])
def test_trains_and_clips(result, case):
    found = result(case)
    loss, top = column(found, "loss"), column(found, "qk_clip/max_logit")
    assert len(loss) == 20
    assert loss[-1] < 0.5 * loss[0]
    assert top[0] > 2 * TAU
    assert max(top[4:]) < 1.5 * TAU
    assert column(found, "qk_clip/clipped_heads")[0] == 8
    assert not any(column(found, "qk_clip/skipped_modules"))


@pytest.mark.parametrize("case", ["llama", "llama, micro-batches and clip_grad", "mla"])
def test_max_logits_are_exact_and_the_clip_reaches_the_threshold(result, case):
    before, after = (np.array(result(case)[name]) for name in ("before", "after"))
    assert before.min() > TAU
    reported = column(result(case), "qk_clip/max_logit")
    np.testing.assert_allclose(reported[0], before.max(), rtol=1e-5)
    # The clip settles layer by layer: each one changes the inputs of the next.
    np.testing.assert_allclose(after[0], TAU, rtol=1e-5)
    assert after.max() <= TAU * (1 + 1e-5)
    np.testing.assert_allclose(reported[-1], TAU, rtol=1e-5)


def test_without_a_clip_the_training_step_is_that_of_easydel_bit_for_bit(result):
    reported, plain = result("reported"), result("plain")
    assert column(reported, "loss") == column(plain, "loss")
    assert reported["checksums"] == plain["checksums"]
    assert column(reported, "qk_clip/clipped_heads") == [0, 0, 0]
    assert column(reported, "qk_clip/max_logit")[-1] > 4 * TAU


def test_roles_are_those_of_the_golden_file(result):
    tables = []
    for model in ("llama", "mla"):
        table, differing = result(f"{model} roles")
        assert not differing
        tables.append(f"# {model}\n{table}\n")
    golden = pathlib.Path(__file__).with_name("easydel_roles.txt")
    assert golden.read_text() == "\n".join(tables)


def test_resumes_from_a_checkpoint(result, folder):
    whole = result("saved")
    shutil.copytree(folder / "saved" / "run-10", folder / "resumed" / "run-10")
    case = SAVED | {"name": "resumed", "resume_if_possible": True}
    found, log = run(folder, "resumed", {"resumed": case})
    assert "resumed training at step 10" in log
    assert column(found["resumed"], "step") == list(range(11, 21))
    for name in ("loss", "qk_clip/max_logit"):
        np.testing.assert_allclose(
            column(found["resumed"], name), column(whole, name)[10:], rtol=1e-6
        )


def test_eight_devices_equal_one(result, folder):
    sharded, _ = run(folder, "sharded", {"whole": WHOLE | {"name": "sharded"}}, devices=8)
    for name in ("loss", "qk_clip/max_logit"):
        one, eight = column(result("whole"), name), column(sharded["whole"], name)
        np.testing.assert_allclose(eight[:3], one[:3], rtol=1e-5)
        np.testing.assert_allclose(eight, one, rtol=1e-2)

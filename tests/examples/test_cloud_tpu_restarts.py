"""The launch scripts of examples/cloud_tpu start a run again after a preemption or a failure."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.support.launch_scripts import FOLDER, call
from tests.support.processes import free_port

# --- After a preemption ---------------------------------------------------------------------------


@pytest.fixture
def cloud(tmp_path):
    """A gcloud that returns one state after the other, and records its arguments."""
    script = tmp_path / "gcloud"
    script.write_text(
        f"""#!{sys.executable}
import json, pathlib, sys
folder = pathlib.Path({str(tmp_path)!r})
line = " ".join(sys.argv[1:])
with (folder / "log").open("a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
if " describe " in line:
    states = json.loads((folder / "states").read_text())
    state = states.pop(0)
    (folder / "states").write_text(json.dumps(states))
    (folder / "now").write_text(state)
    print(state.split()[0]) if state else sys.exit(1)
elif "test -e" in line:
    now = (folder / "now").read_text()
    present = {{"ACTIVE": ["installed"], "ACTIVE ended": ["summary.json"]}}
    sys.exit(not any(line.endswith(name) for name in present.get(now, [])))
"""
    )
    script.chmod(0o755)
    (tmp_path / "git").symlink_to("/bin/true")

    def keep(*states):
        (tmp_path / "states").write_text(json.dumps(states))
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = call("tpu_vm.sh", "keep", PATH=path, POLL="0")
        log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        return done, [_step(words) for words in log if "describe" not in words]

    return keep


def _step(words):
    """Names the purpose of a call of gcloud in a word."""
    line = " ".join(words)
    for sign, step in {
        "queued-resources create": "create",
        "queued-resources delete": "delete",
        " scp ": "copy",
        "tpu_vm_host.sh": "install",
        "systemd-run": "start",
        "test -e": "look",
    }.items():
        if sign in line:
            return step
    return line


def test_keep_asks_installs_starts_and_ends_with_the_run(cloud):
    done, steps = cloud(
        "", "WAITING_FOR_RESOURCES", "ACTIVE new", "ACTIVE", "ACTIVE", "ACTIVE ended"
    )
    assert (done.returncode, done.stderr) == (0, "")
    installing, training = ["copy", "install", "start"], ["look", "look"]
    assert steps == ["create", *training, *installing, *training, *training, "look"]
    assert done.stdout.endswith("the run has ended: /mnt/runs/a-run on 10.0.0.2:/runs\n")


def test_keep_starts_over_on_a_new_tpu_after_a_preemption(cloud):
    done, steps = cloud("ACTIVE", "SUSPENDED", "", "ACTIVE new", "ACTIVE ended")
    assert done.returncode == 0
    steps = [step for step in steps if step != "look"]
    assert steps == ["delete", "create", "copy", "install", "start"]


# --- Exit codes of train.sh -----------------------------------------------------------------------


@pytest.fixture
def program(tmp_path):
    """A stand-in for Python: it records its arguments, waits if asked, and exits as asked."""
    script = tmp_path / "python"

    def write(body):
        script.write_text(f"#!/usr/bin/env bash\nrun={tmp_path}/run\nmkdir -p $run\n{body}\n")
        script.chmod(0o755)
        return {"PYTHON": str(script), "PATH": os.environ["PATH"]}

    return write


ENDED = "touch $run/summary.json"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (f"{ENDED}; exit 0", 0),
        ("exit 0", 42),
        ("exit 1", 1),
        ("exit 2", 2),
        ("kill -KILL $$", 128 + signal.SIGKILL),
    ],
    ids=["ended", "stopped", "failed", "bad input", "killed"],
)
def test_exit_code_decides_on_a_restart(program, tmp_path, body, code):
    done = call("train.sh", str(tmp_path / "run"), "--steps", "3", **program(body))
    assert done.returncode == code


@pytest.mark.parametrize(("last", "code"), [("exit 0", 42), (f"{ENDED}; exit 0", 0)])
def test_a_signal_reaches_the_program_once_and_its_end_is_awaited(program, tmp_path, last, code):
    body = f"""
    trap 'echo stop >> $run/signals; sleep 0.2; echo saved >> $run/signals; {last}' TERM
    touch $run/ready
    while true; do sleep 0.05; done"""
    command = ["bash", FOLDER / "train.sh", tmp_path / "run"]
    with subprocess.Popen(command, env=program(body)) as script:
        while not (tmp_path / "run" / "ready").exists():
            assert script.poll() is None
        script.terminate()
        assert script.wait(timeout=60) == code
    assert (tmp_path / "run" / "signals").read_text() == "stop\nsaved\n"


def test_train_needs_a_folder(program):
    done = call("train.sh", "--steps", "3", **program("exit 0"))
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1


@pytest.mark.nightly
def test_train_trains(tmp_path):
    (tmp_path / "text").write_text("to be or not to be, that is the question\n" * 99)
    alone = f"127.0.0.1:{free_port()},1,0"
    flags = f"--preset tiny --steps 3 --seq-len 16 --batch-size 4 --distributed {alone}"
    arguments = [*flags.split(), "--data", str(tmp_path / "text")]
    python = {"PYTHON": sys.executable, "PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"}
    for said in ("validation loss", "this run has ended"):
        done = call("train.sh", str(tmp_path / "run"), *arguments, **python)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout

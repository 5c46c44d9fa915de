"""The command line of the training program: folders, exit codes, messages, signals."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import train_lm
from lm import rundir, training
from lm.checkpoint import Checkpoints
from lm.config import Config
from lm_cases import TEXT, TINY, compiled_once

# Compiles in half the time; speed and the last bits do not matter where this is used.
FAST = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
EXAMPLES = pathlib.Path(train_lm.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    yield from compiled_once(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def program(monkeypatch, tmp_path):
    """The program in this process, with a tiny model, in an empty folder; signals as before."""
    monkeypatch.setitem(training.MODELS, "gqa", lambda: TINY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_bytes(TEXT)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    flags = "--data text --steps 4 --batch-size 4 --seq-len 16 --no-progress".split()
    yield lambda *arguments: train_lm.main([*flags, *arguments])
    for number, handler in before.items():
        signal.signal(number, handler)


def test_program_ends_with_the_loss_and_the_plots(program, tmp_path, capsys):
    assert program() == 0
    summary = json.loads((tmp_path / "runs/gqa-muonclip/summary.json").read_text())
    *_, loss, logits, first, second = capsys.readouterr().out.splitlines()
    assert loss.startswith(f"validation loss {summary['validation_loss']:.3f} nats per byte")
    assert "after 4 steps on 256 bytes" in loss
    assert logits.startswith("largest attention logit ")
    assert (first, second) == ("runs/gqa-muonclip/loss.png", "runs/gqa-muonclip/max_logits.png")


def test_taken_default_folder_is_followed_by_the_next(program, tmp_path):
    for _ in range(3):
        assert program() == 0
    names = ["gqa-muonclip", "gqa-muonclip-2", "gqa-muonclip-3"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == names


def test_resume_without_a_run_starts_one(program, tmp_path, capsys):
    assert program("--resume") == 0
    assert "no checkpoint yet: starting at step 0" in capsys.readouterr().out
    assert (tmp_path / "runs/gqa-muonclip/summary.json").exists()


def test_resume_takes_the_last_default_folder(program, tmp_path, capsys):
    for _ in range(2):
        program()
    capsys.readouterr()
    assert program("--resume") == 0
    assert capsys.readouterr().out.startswith("runs/gqa-muonclip-2: this run has ended")


def test_resume_of_a_finished_run_changes_nothing(program, tmp_path):
    program("--out", "run")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert program("--out", "run", "--resume") == 0
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_existing_folder_without_a_run_is_used(program, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("kept")
    assert program("--out", "out") == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == "kept"


def test_diverged_program_exits_1_with_one_line(program, capsys):
    assert program("--learning-rate", "1e30") == 1
    error = capsys.readouterr().err
    assert error.startswith("train_lm.py: runs/gqa-muonclip: loss is nan at step ")
    assert error.endswith("; lower --learning-rate\n")
    assert len(error.splitlines()) == 1
    assert not pathlib.Path("runs/gqa-muonclip/summary.json").exists()


def test_files_that_are_not_text_are_counted_for_the_user(program, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "good").write_bytes(TEXT)
    (tmp_path / "folder" / "bad").write_bytes(b"\0")
    assert program("--data", "folder") == 0
    assert "left out 1 file that is not text" in capsys.readouterr().out


def test_refused_resume_in_the_program_exits_2(program, capsys):
    program("--out", "run")
    with pytest.raises(SystemExit) as leave:
        program("--out", "run", "--resume", "--seed", "1")
    assert leave.value.code == 2
    assert "--seed was 0, now 1" in capsys.readouterr().err


def start(folder, *arguments):
    """Starts the real program at its default size."""
    (folder / "text").write_bytes(TEXT)
    flags = "--data text --batch-size 1 --seq-len 16 --out run".split()
    return subprocess.Popen(
        [sys.executable, "-W", "error", EXAMPLES / "train_lm.py", *flags, *arguments],
        cwd=folder,
        env=os.environ | FAST,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_twenty_steps_from_the_command_line(tmp_path):
    process = start(tmp_path, "--steps", "20")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.splitlines()[-2:] == ["run/loss.png", "run/max_logits.png"]
    assert "20/20" in err
    assert all(word in err for word in ("loss", "tokens/s", "largest logit", "heads clipped"))
    assert len(rundir.read_metrics(tmp_path / "run")) == 20


@pytest.mark.slow
def test_default_run_learns_and_holds_its_heads_at_the_threshold(tmp_path):
    arguments = [sys.executable, EXAMPLES / "train_lm.py", "--out", "run", "--no-progress"]
    subprocess.run(arguments, cwd=tmp_path, check=True, timeout=900)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation_loss"] < 1.55  # measured 1.479
    logits = [line["max_logit"] for line in rundir.read_metrics(tmp_path / "run")]
    assert 1 < max(logits) / Config().threshold < 1.4  # measured 1.23; 2.8 with muon
    clipped = sum(line["heads_clipped"] > 0 for line in rundir.read_metrics(tmp_path / "run"))
    assert clipped > 200  # measured 361 of 600


def test_sigterm_saves_the_running_step_and_exits_0(tmp_path):
    process = start(tmp_path, "--steps", "1000000", "--no-progress")
    metrics = tmp_path / "run" / "metrics.jsonl"
    limit = time.monotonic() + 200
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < limit:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert err == ""
    steps = [line["step"] for line in rundir.read_metrics(tmp_path / "run")]
    assert out.splitlines()[1:] == [f"stopped after step {steps[-1]}; --resume --out run goes on"]
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.steps()[-1] == steps[-1]
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once(number):
    code = (
        "import os, time; from lm.stop import StopFlag; flag = StopFlag(); assert not flag\n"
        f"os.kill(os.getpid(), {number:d}); assert flag; print('first', flush=True)\n"
        f"os.kill(os.getpid(), {number:d}); time.sleep(60)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(EXAMPLES)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (result.stdout, result.stderr) == ("first\n", "")
    assert result.returncode == 128 + number

"""The training program as two processes: it trains as one, stops as one and fails as one."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from examples.language_model import config
from examples.language_model.run_folder import files
from tests.support.processes import free_port
from tests.support.program_command import environment as with_program
from tests.support.strict import STRICT
from tests.support.tiny_run import TEXT, trainer

WORKER = pathlib.Path(__file__).parents[1] / "support" / "training_worker.py"
LIMIT = 400  # seconds; 15 s on two idle cores, and three heartbeats of 10 s where a peer is dead
FLAGS = "--preset tiny --data text --steps 6 --batch-size 8 --seq-len 16 --out run --no-progress"
PAIR = "--mesh data=2 --accumulate 2 --checkpoint-every 3".split()


@pytest.fixture(scope="module")
def environment():
    return with_program(JAX_PLATFORMS="cpu")


class Ended:
    """The results of two processes: exit codes, and the output of each."""

    def __init__(self, folder, processes):
        self.codes = [process.returncode for process in processes]
        self.out, self.err = (
            [(folder / f"{rank}.{name}").read_text(errors="replace") for rank in range(2)]
            for name in ("out", "err")
        )


def together(folder, environment, *flags, fault=("none", 0, 0), own=((), ())):
    """Runs two processes until both have ended; at the limit they are killed."""
    folder.mkdir(exist_ok=True)
    (folder / "text").write_bytes(TEXT)
    address = f"127.0.0.1:{free_port()}"
    environment = environment | {"JAX_COORDINATOR_BIND_ADDRESS": address}
    processes = []
    try:
        for rank in range(2):
            connect = ["--distributed", f"{address},2,{rank}", "--simulate-devices", "1"]
            arguments = [*map(str, fault), *FLAGS.split(), *connect, *flags, *own[rank]]
            # To files: a full pipe would stop the process. Its own session: its children end too.
            with (
                (folder / f"{rank}.out").open("wb") as out,
                (folder / f"{rank}.err").open("wb") as err,
            ):
                process = subprocess.Popen(
                    [sys.executable, *STRICT, WORKER, *arguments],
                    cwd=folder,
                    env=environment,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
            processes.append(process)
        end = time.monotonic() + LIMIT
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Ended(folder, processes)


def own_words(text):
    """Without what gloo writes to stdout about its connections."""
    return "".join(line for line in text.splitlines(True) if not line.startswith("[Gloo]"))


def alone(folder, **changes):
    """The same run in one process on one device."""
    return trainer(folder, steps=6, batch_size=8, **changes)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, environment):
    folder = tmp_path_factory.mktemp("pair")
    ended = together(folder, environment, *PAIR)
    assert ended.codes == [0, 0], ended.err
    return folder / "run", ended


@pytest.mark.nightly
def test_two_processes_train_as_one(pair, tmp_path):
    alone(tmp_path / "alone").train()
    ours, reference = (files.read_metrics(run) for run in (pair[0], tmp_path / "alone"))
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]
    for line, expected in zip(ours, reference, strict=True):
        np.testing.assert_allclose(line["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(line["max_logits"], expected["max_logits"], rtol=1e-5)


@pytest.mark.nightly
def test_only_the_first_process_prints_and_writes(pair):
    run, ended = pair
    assert own_words(ended.out[0]).splitlines()[:2] == [
        "training gqa with muonclip on text; output: run",
        "mesh data=2",
    ]
    assert own_words(ended.out[1]) == ""
    assert ended.err[1] == ""
    assert len([path for path in run.iterdir() if "events" in path.name]) == 1
    assert (run / "summary.json").exists()


@pytest.mark.nightly
@pytest.mark.parametrize(
    "name",
    ["sigterm", pytest.param("sigint", marks=pytest.mark.nightly)],
)
def test_sigterm_one_of_two(tmp_path, environment, name):
    ended = together(tmp_path, environment, "--optimizer", "adamw", fault=(name, 1, 2))
    assert ended.codes == [0, 0], ended.err
    assert ended.err == ["", ""]
    (step,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"stopped after step {step}; to resume: " in own_words(ended.out[0])
    assert [line["step"] for line in files.read_metrics(tmp_path / "run")][-1] == step < 6


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.nightly)])
def test_dead_peer(tmp_path, environment, rank):
    ended = together(tmp_path, environment, "--optimizer", "adamw", fault=("kill", rank, 2))
    assert ended.codes[rank] == -signal.SIGKILL
    assert ended.codes[1 - rank] not in (0, None, -signal.SIGKILL), ended.err
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.nightly)])
def test_error_on_one(tmp_path, environment, rank):
    ended = together(tmp_path, environment, "--optimizer", "adamw", fault=("error", rank, 2))
    assert ended.codes[rank] == 1
    assert ended.codes[1 - rank] not in (0, None, -signal.SIGKILL), ended.err
    assert ended.err[rank] == (
        f"language_model: process {rank} of 2 failed, and all will exit: RuntimeError: injected;"
        " start all of them again with --resume\n"
    )


@pytest.mark.nightly
def test_full_disk_of_the_first(tmp_path, environment):
    """The metrics are written by process 0 alone."""
    ended = together(tmp_path, environment, "--optimizer", "adamw", fault=("failed", 0, 2))
    assert ended.codes[0] == 1
    assert ended.codes[1] not in (0, None, -signal.SIGKILL), ended.err
    assert ended.err[0] == (
        "language_model: run: step 2: metrics.jsonl could not be written (injected)\n"
    )


def flip(path):
    """Changes one bit of the largest file of a checkpoint."""
    largest = max((file for file in path.rglob("*") if file.is_file()), key=_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def _size(path):
    return path.stat().st_size


@pytest.mark.nightly
@pytest.mark.parametrize(
    "seen", ["by both", pytest.param("by process 1 alone", marks=pytest.mark.nightly)]
)
def test_damaged_checkpoint(pair, tmp_path, environment, seen):
    run = shutil.copytree(pair[0], tmp_path / "run")
    (run / "summary.json").unlink()
    fault = ("unreadable", 1, 6)
    if seen == "by both":
        flip(run / "checkpoints" / "6")
        fault = ("none", 0, 0)
    ended = together(tmp_path, environment, *PAIR, "--resume", fault=fault)
    assert ended.codes == [0, 0], ended.err
    reason = "files differ from those written" if seen == "by both" else "found by process 1"
    (line,) = ended.err[0].splitlines()
    assert f"/run/checkpoints: step 6 is damaged ({reason}" in line
    assert line.endswith("); resuming from step 3 instead")
    assert ended.err[1] == ""
    assert "resumed after step 3\n" in ended.out[0]
    assert (run / "metrics.jsonl").read_bytes() == (pair[0] / "metrics.jsonl").read_bytes()


@pytest.mark.nightly
def test_no_intact_checkpoint_fails_on_all(pair, tmp_path, environment):
    run = shutil.copytree(pair[0], tmp_path / "run")
    (run / "summary.json").unlink()
    for step in (3, 6):
        flip(run / "checkpoints" / str(step))
    ended = together(tmp_path, environment, *PAIR, "--resume")
    assert ended.codes == [2, 2]
    assert ended.err[0] == ended.err[1]
    assert "no intact checkpoint: step 6 is damaged (files differ" in ended.err[0]
    assert (run / "checkpoints" / "6").exists()


@pytest.mark.nightly
def test_different_flags_fail_on_all(tmp_path, environment):
    ended = together(tmp_path, environment, own=((), ("--seed", "1")))
    assert ended.codes == [2, 2]
    line = (
        "language_model: argument --distributed: processes [1] have other flags or another text"
        " than process 0; pass the same to all\n"
    )
    assert ended.err == [line, line]
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
def test_folder_that_holds_a_run_fails_on_all(tmp_path, environment):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    ended = together(tmp_path, environment)
    assert ended.codes == [2, 2]
    assert ended.err[0] == ended.err[1]
    assert re.fullmatch("language_model: --out run: already holds a run; .*\n", ended.err[0])


@pytest.mark.parametrize("text", ["", "here", "host:1", "host:1,2", "host:1,2,2", "host,2,1"])
def test_invalid_address_is_one_line(capsys, text):
    with pytest.raises(SystemExit) as leave:
        config.parse([f"--distributed={text}"])
    assert leave.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"argument --distributed: got {text!r}, expected no value, or HOST:PORT," in line


def test_address_is_optional():
    assert config.parse(["--distributed"]).distributed == (None, None, None)
    assert config.parse(["--distributed", "host:1,2,0"]).distributed == ("host:1", 2, 0)

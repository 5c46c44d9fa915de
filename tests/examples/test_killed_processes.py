"""A process that is killed or stopped at any moment resumes bitwise identical."""

import random
import signal
import subprocess

import pytest

from examples.language_model.run_folder import files
from tests.support import tiny_run
from tests.support.interruption_cases import (
    assert_equal_runs,
    ended,
    environment,
    kill_after,
    start,
    wait_for,
)

STEPS = 120  # all with one schedule, and so one compiled program


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A run of `STEPS` in a process of its own, without a pause."""
    folder = tmp_path_factory.mktemp("long")
    ended(start(folder, "--steps", str(STEPS), "--out", "whole"))
    return folder / "whole"


def kill_and_resume(folder, kills, steps, whole, model="gqa"):
    """Kills a run at random times, and compares it with an uninterrupted run."""
    flags = ["--steps", str(steps), "--model", model]
    flags += ["--checkpoint-every", "2"]  # most of the time one is being written
    draw = random.Random(0)
    for n in range(kills):
        process = start(folder, *flags, "--out", "run", "--resume")
        lines = 0 if n == 0 else draw.randrange(1, steps // kills)
        assert kill_after(process, folder / "run/metrics.jsonl", lines, 0.05 * draw.random())
        process.communicate()
    ended(start(folder, *flags, "--out", "run", "--resume"))
    assert_equal_runs(folder / "run", whole, steps=steps, model=model)
    logged = [step for step, _ in tiny_run.scalars(folder / "run")["loss"]]
    assert logged == list(range(1, steps + 1))


@pytest.mark.nightly
@pytest.mark.parametrize("kills", [1, 3])
def test_kill_nine(tmp_path, long, kills):
    kill_and_resume(tmp_path, kills, STEPS, long)


@pytest.mark.nightly
@pytest.mark.parametrize("model", ["gqa", "mla", "moe"])
def test_kill_nine_at_twenty_moments(tmp_path, model):
    ended(start(tmp_path, "--steps", "240", "--model", model, "--out", "whole"))
    kill_and_resume(tmp_path, 20, 240, tmp_path / "whole", model)


@pytest.mark.nightly
def test_command_that_is_printed_after_a_stop_works_as_printed(tmp_path, long):
    """The flags of the run, such as --steps and --preset, are not in the command."""
    flags = ["--steps", str(STEPS), "--checkpoint-every", "5"]  # each waits for the one before
    process = start(tmp_path, *flags, "--out", "run")
    wait_for(tmp_path / "run" / "checkpoints" / "5")
    process.send_signal(signal.SIGTERM)
    _, last = ended(process).splitlines()
    steps = [line["step"] for line in files.read_metrics(tmp_path / "run")]
    assert (tmp_path / "run" / "checkpoints" / str(steps[-1])).exists()
    assert not (tmp_path / "run" / "summary.json").exists()
    stopped, command = last.split("; to resume: ")
    assert stopped == f"stopped after step {steps[-1]}"
    resume = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert resume.returncode == 0, resume.stderr
    assert_equal_runs(tmp_path / "run", long, steps=STEPS)

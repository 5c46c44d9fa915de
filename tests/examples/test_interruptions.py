"""An interrupted or damaged run resumes bitwise identical, or exits with the reason."""

import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from examples.language_model.config import BadInput
from examples.language_model.run_folder import digests, files
from examples.language_model.training import loop
from tests.support import program_command, tiny_run
from tests.support.by_day import by_day
from tests.support.interruption_cases import (
    Killed,
    after,
    assert_equal_runs,
    kill,
    limit_files,
    unlimited_files,
    wait_for,
)
from tests.support.tiny_run import CONFIG, CORPUS, TINY, trainer

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 20 steps, with checkpoints of steps 7, 14 and 20, without a pause."""
    path = tmp_path_factory.mktemp("whole") / "run"
    assert trainer(path).train() == CONFIG.steps
    return path


@pytest.fixture
def cut(whole, tmp_path):
    """A copy of that run as a kill before its summary leaves it."""
    path = shutil.copytree(whole, tmp_path / "run")
    (path / "summary.json").unlink()
    return path


# Kills and signals, in this process


@pytest.mark.nightly
def test_stopped_run_resumes_bit_for_bit(whole, tmp_path):
    stopped = trainer(tmp_path, should_stop=after(9, lambda: True))
    assert stopped.train() == 9
    assert not (tmp_path / "summary.json").exists()
    assert (tmp_path / "checkpoints" / "9").exists()
    trainer(tmp_path, resume=True).train()
    assert_equal_runs(tmp_path, whole)


TORN = b'{"step": 11, "lo'


@pytest.mark.parametrize("torn", by_day([b"", TORN], TORN), ids=["clean", "torn"])
def test_killed_run_resumes_bit_for_bit(whole, tmp_path, torn):
    with pytest.raises(Killed):
        trainer(tmp_path, should_stop=after(11, kill)).train()
    with (tmp_path / "metrics.jsonl").open("ab") as log:
        log.write(torn)
    trainer(tmp_path, resume=True).train()
    assert_equal_runs(tmp_path, whole)


@pytest.mark.nightly
def test_run_killed_before_its_first_checkpoint_starts_again(whole, tmp_path, capsys):
    with pytest.raises(Killed):
        trainer(tmp_path, should_stop=after(3, kill)).train()
    trainer(tmp_path, resume=True).train()
    assert "no checkpoint yet: starting at step 0" in capsys.readouterr().out
    assert_equal_runs(tmp_path, whole)


def test_run_killed_before_its_summary_gets_it(whole, cut):
    trainer(cut, resume=True).train()
    assert_equal_runs(cut, whole)


@pytest.mark.nightly
def test_accumulate(tmp_path):
    """Micro-batches are inside one step: no cut falls between them."""
    trainer(tmp_path / "whole", accumulate=2, steps=10).train()
    with pytest.raises(Killed):
        trainer(tmp_path / "cut", accumulate=2, steps=10, should_stop=after(9, kill)).train()
    trainer(tmp_path / "cut", accumulate=2, steps=10, resume=True).train()
    assert_equal_runs(tmp_path / "cut", tmp_path / "whole", accumulate=2, steps=10)


@pytest.fixture
def program(monkeypatch, tmp_path):
    yield from tiny_run.program(monkeypatch, tmp_path, "--steps", "20", "--out", "run")


@pytest.mark.parametrize("number", by_day([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_signal_saves_the_running_step(program, tmp_path, monkeypatch, capfd, number):
    def send(step):
        if step == 5:
            os.kill(os.getpid(), number)
        return True

    monkeypatch.setattr("examples.language_model.run_folder.files.is_logged", send)
    assert program() == 0
    captured = capfd.readouterr()
    assert captured.out.splitlines()[-1].startswith("stopped after step 5; to resume: ")
    assert captured.err == ""
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["5"]
    assert len(files.read_metrics(tmp_path / "run")) == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once(number):
    code = (
        "import os, time; from examples.language_model.training.stop import StopFlag\n"
        "flag = StopFlag(); assert not flag\n"
        f"os.kill(os.getpid(), {number:d}); assert flag; print('first', flush=True)\n"
        f"os.kill(os.getpid(), {number:d}); time.sleep(60)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=program_command.environment(),
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (result.stdout, result.stderr) == ("first\n", "")
    assert result.returncode == 128 + number


# A full disk: a file may not grow beyond a limit, which needs no rights; Python ignores SIGXFSZ


@pytest.mark.nightly
def test_disk_full(whole, program, tmp_path, monkeypatch, capfd):
    def fill(step):
        if step == 10:
            wait_for(tmp_path / "run" / "checkpoints" / "7")
            limit_files(20_000)  # less than a checkpoint has, and more than the metrics
        return True

    with unlimited_files(), monkeypatch.context() as patch:
        patch.setattr("examples.language_model.run_folder.files.is_logged", fill)
        assert program("--checkpoint-every", "7") == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("language_model: run: step 14: the checkpoint could not be written (")
    assert line.endswith("; free disk space, then resume from the previous one with --resume")
    assert program("--checkpoint-every", "7", "--resume") == 0
    assert "resumed after step 7" in capfd.readouterr().out
    assert_equal_runs(tmp_path / "run", whole)


@pytest.mark.nightly
def test_disk_full_of_metrics(program, tmp_path, monkeypatch, capfd):
    def fill(step):
        if step == 3:
            limit_files((tmp_path / "run" / "metrics.jsonl").stat().st_size)
        return True

    monkeypatch.setattr("examples.language_model.run_folder.files.is_logged", fill)
    with unlimited_files():
        assert program() == 1
    assert capfd.readouterr().err == (
        "language_model: run: step 3: metrics.jsonl could not be written (File too large); free"
        " disk space, then continue with --resume\n"
    )


# Folders that were touched


def newest(path, pattern):
    return max((path / "checkpoints" / "20").glob(pattern), key=lambda file: file.stat().st_size)


def truncated(path):
    file = newest(path, "d/*")
    file.write_bytes(file.read_bytes()[:-10])


def absent(path):
    newest(path, "ocdbt.process_0/d/*").unlink()


def flipped(path):
    file = newest(path, "ocdbt.process_0/d/*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flipped_digest(path):
    file = path / "checkpoints" / "20" / "digests.json"
    content = file.read_text()
    at = content.index('"sha256": "') + len('"sha256": "')
    file.write_text(content[:at] + ("1" if content[at] == "0" else "0") + content[at + 1 :])


DAMAGES = [truncated, absent, flipped, flipped_digest]


@pytest.mark.parametrize("damage", by_day(DAMAGES, flipped))
def test_damaged(whole, cut, capfd, damage):
    damage(cut)
    trainer(cut, resume=True).train()
    captured = capfd.readouterr()
    (line,) = captured.err.splitlines()
    folder = cut / "checkpoints"
    assert line.startswith(f"language_model: warning: {folder}: step 20 is damaged (")
    assert line.endswith("); resuming from step 14 instead")
    assert "resumed after step 14" in captured.out
    assert_equal_runs(cut, whole)


def test_all_damaged(cut, program, capfd):
    for path in (cut / "checkpoints").iterdir():
        (path / "digests.json").unlink()
    with pytest.raises(SystemExit) as leave:
        program("--resume")
    assert leave.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "no intact checkpoint: step 20 is damaged (digests.json: " in line
    assert all(f"step {n} is damaged (digests.json: " in line for n in (14, 7))
    assert line.endswith("; start a new run with another --out")


@pytest.mark.nightly
def test_leftovers(whole, cut, capfd):
    folder = cut / "checkpoints"
    (folder / "20").rename(folder / "20.orbax-checkpoint-tmp")
    trainer(cut, resume=True).train()
    assert capfd.readouterr().err == ""
    assert sorted(path.name for path in folder.iterdir()) == ["14", "20", "7"]
    assert_equal_runs(cut, whole)


def test_foreign(whole, cut, tmp_path, capfd):
    folder = cut / "checkpoints"
    elsewhere = shutil.copytree(folder / "14", tmp_path / "elsewhere")
    (folder / "999").mkdir()
    (folder / "abc").mkdir()
    (folder / "notes").write_text("kept")
    (folder / "998").symlink_to(elsewhere)
    trainer(cut, resume=True).train()
    captured = capfd.readouterr()
    assert captured.err.splitlines() == [
        f"language_model: warning: {folder / name}: not a checkpoint of this run; ignored"
        for name in ("998", "999")
    ]
    assert "resumed after step 20" in captured.out
    assert digests.DIGESTS in [path.name for path in elsewhere.iterdir()]
    assert (folder / "notes").read_text() == "kept"
    assert_equal_runs(cut, whole)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x: x.astype(jnp.bfloat16), "was float32[2, 16, 2, 8], now bfloat16[2, 16, 2, 8]"),
        (lambda x: x[..., :4], "was float32[2, 16, 2, 8], now float32[2, 16, 2, 4]"),
    ],
    ids=["dtype", "shape"],
)
def test_changed_dtype(whole, change, text):
    made = loop.Trainer(CONFIG, CORPUS, whole, TINY, devices=jax.devices()[:1])
    target = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.eval_shape(change, x) if "key" in str(path[-2:]) else x, made.target
    )
    with made.checkpoints() as checkpoints, pytest.raises(BadInput) as error:
        checkpoints.restore_newest(target)
    assert f"params/blocks/attn/key/kernel {text}; " in str(error.value)

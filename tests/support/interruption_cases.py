"""How the tests of interruptions kill a run, fill its disk, and compare it with another."""

import contextlib
import dataclasses
import json
import resource
import signal
import subprocess
import time

import chex
import jax

from examples.language_model.training import loop
from tests.support import program_command
from tests.support.tiny_run import CONFIG, CORPUS, TEXT


class Killed(BaseException):
    """Ends a run as a kill would: nothing else is executed."""


def kill(*_):
    raise Killed


def after(calls, then):
    """A `should_stop` that calls `then` from its n-th call on."""
    count = iter(range(1, 1_000))
    return lambda: next(count) >= calls and then()


def final_state(path, **changes):
    config = dataclasses.replace(CONFIG, preset="tiny", **changes)
    model = loop.make_model(config)
    made = loop.Trainer(config, CORPUS, path, model, devices=jax.devices()[:1])
    with made.checkpoints() as checkpoints:
        return checkpoints.restore(config.steps, made.target)


def assert_equal_runs(path, reference, **changes):
    assert (path / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    chex.assert_trees_all_equal(final_state(path, **changes), final_state(reference, **changes))
    summaries = [json.loads((run / "summary.json").read_text()) for run in (path, reference)]
    first, second = ({k: v for k, v in s.items() if k != "seconds"} for s in summaries)
    assert first == second


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextlib.contextmanager
def unlimited_files():
    """Removes the limit at the end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wait_for(path):
    limit = time.monotonic() + 100
    while not path.exists() and time.monotonic() < limit:
        time.sleep(0.01)


def environment():
    return program_command.environment(
        JAX_PLATFORMS="cpu",  # libtpu, if it is installed, writes to stderr
    )


def start(folder, *arguments, **options):
    """Starts the program with the tiny model; programs that were compiled before are not again."""
    (folder / "text").write_bytes(TEXT)
    flags = "--preset tiny --data text --batch-size 4 --seq-len 16 --no-progress".split()
    return subprocess.Popen(
        [*program_command.COMMAND, *flags, *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def ended(process):
    try:
        out, err = process.communicate(timeout=500)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert err == ""
    return out


def kill_after(process, metrics, lines, seconds):
    """Kills after a number of new lines and a short time; returns whether it was still running."""
    size = metrics.stat().st_size if metrics.exists() else 0
    limit, seen = time.monotonic() + 200, 0
    while process.poll() is None and seen < lines and time.monotonic() < limit:
        if metrics.exists() and metrics.stat().st_size < size:  # cut back at the start
            size = 0
        seen = metrics.read_bytes()[size:].count(b"\n") if metrics.exists() else 0
        time.sleep(0.001)
    time.sleep(seconds)
    process.kill()
    return process.wait() == -signal.SIGKILL

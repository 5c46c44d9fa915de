"""The folder of a run: which one, what it pins (`run.json`), its metrics and its summary."""

import dataclasses
import itertools
import json
import os
import pathlib
from typing import Any

from lm.config import BadInput, Config
from lm.data import Corpus

SETTINGS, METRICS, SUMMARY, CHECKPOINTS = "run.json", "metrics.jsonl", "summary.json", "checkpoints"
# --steps is among them as the learning rate falls to zero at the last one.
PINNED = (
    "model",
    "preset",
    "dtype",
    "optimizer",
    "steps",
    "batch_size",
    "seq_len",
    "threshold",
    "seed",
    "accumulate",
)
LOGGED_WITHOUT_GAP = 1_000  # a curve is read from its start
LOG_EVERY = 10  # after that; a step that is not logged does not wait for the device


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder that is ready for its run.

    Attributes:
      path: The folder; it exists and holds `run.json`.
      done: Whether the run has ended, that is, `summary.json` is there.
    """

    path: pathlib.Path
    done: bool


def is_logged(step: int) -> bool:
    """Says whether a step has a line in the metrics; steps count from 1."""
    return step <= LOGGED_WITHOUT_GAP or step % LOG_EVERY == 0


def open_run(config: Config, corpus: Corpus) -> Run:
    """Finds or makes the folder of a run.

    Args:
      config: Settings, checked on their own.
      corpus: The text, whose digest is pinned.

    Returns:
      The folder. Nothing was made if this raises.

    Raises:
      BadInput: if the folder cannot be made, holds another run, or holds one with other settings.
    """
    pinned = _pinned(config, corpus)
    path = config.out or _default(config)
    if not _holds_run(path):
        taken_is_ours = config.out is not None or config.resume
        return Run(_start(path, pinned, exist_ok=taken_is_ours), done=False)
    if not config.resume:
        raise BadInput(f"--out {path}: holds a run; give another folder, or --resume to go on")
    _check_settings(path, pinned)
    return Run(path, done=(path / SUMMARY).exists())


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Writes a file whole or not at all: beside its place first, then moved there."""
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)  # a full disk must not keep half a file
        raise


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes one JSON object, atomically; refuses NaN and infinity, which JSON does not have."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def read_metrics(run: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the logged steps in order; a last line torn by a kill is left out."""
    path = run / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def cut_metrics(run: pathlib.Path, step: int) -> None:
    """Drops the lines after a step, and a torn one: a resumed run writes them again."""
    kept = [line for line in read_metrics(run) if line["step"] <= step]
    write_atomically(run / METRICS, b"".join(metrics_line(line) for line in kept))


def metrics_line(metrics: dict[str, Any]) -> bytes:
    """Formats the metrics of one step; floats keep every bit, as JSON has Python's `repr`."""
    return (json.dumps(metrics, allow_nan=False) + "\n").encode()


def _pinned(config: Config, corpus: Corpus) -> dict[str, Any]:
    pinned = {name: getattr(config, name) for name in PINNED}
    size = len(corpus.train) + len(corpus.validation)
    text = f"{size} bytes with SHA-256 {corpus.sha256}"
    return pinned | {"learning_rate": config.peak, "data": text}


def _default(config: Config) -> pathlib.Path:
    """The first free folder; on resume the last that is taken, or the first if none is."""

    def folder(number: int) -> pathlib.Path:
        suffix = f"-{number}" if number > 1 else ""
        return pathlib.Path("runs", f"{config.model}-{config.optimizer}{suffix}")

    free = next(number for number in itertools.count(1) if not os.path.lexists(folder(number)))
    return folder(max(free - 1, 1) if config.resume else free)


def _holds_run(path: pathlib.Path) -> bool:
    return any(os.path.lexists(path / name) for name in (SETTINGS, METRICS, SUMMARY, CHECKPOINTS))


def _start(path: pathlib.Path, pinned: dict[str, Any], exist_ok: bool) -> pathlib.Path:
    """Makes the folder with `run.json`, or leaves the disk as it was."""
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
        write_json(path / SETTINGS, pinned)
    except OSError as error:
        # If it exists now, another program has just taken it, and it is not ours to remove.
        for folder in [] if isinstance(error, FileExistsError) else missing:
            if os.path.isdir(folder):  # not pathlib, which raises on a name too long
                folder.rmdir()
        raise BadInput(
            f"--out {path}: cannot be made ({error.strerror}); name a folder that can be written"
        ) from error
    return path


def _check_settings(path: pathlib.Path, pinned: dict[str, Any]) -> None:
    try:
        before = json.loads((path / SETTINGS).read_bytes())
        if not isinstance(before, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{path / SETTINGS}: not readable, so the settings of this run cannot be compared;"
            " start a new one with another --out"
        ) from error
    changed = [
        f"--{name.replace('_', '-')} was {before.get(name)}, now {value}"
        for name, value in pinned.items()
        if before.get(name) != value
    ]
    if changed:
        raise BadInput(
            f"--resume {path}: {'; '.join(changed)}; give the old values, or another --out"
        )

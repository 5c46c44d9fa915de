"""The folder of a run: which one, its settings (`run.json`), its metrics and its summary."""

import dataclasses
import itertools
import json
import os
import pathlib
from typing import Any

from lm.config import BadInput, Config, check
from lm.data import Corpus

SETTINGS, METRICS, SUMMARY, CHECKPOINTS = "run.json", "metrics.jsonl", "summary.json", "checkpoints"
# A resume may not change these. --steps is among them: the learning rate reaches 0 at the last.
PINNED = (
    "model",
    "preset",
    "dtype",
    "optimizer",
    "steps",
    "batch_size",
    "seq_len",
    "seed",
    "accumulate",
    "learning_rate",
)
# A resume may change these; without the flag it takes the value of the run.
CHANGEABLE = ("threshold", "checkpoint_every", "mesh", "simulate_devices")
TEXT = "text"  # size and digest of the text in `run.json`, which are pinned too
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


def resumed(config: Config) -> Config:
    """Completes the settings of a run that is resumed with those in its folder.

    Args:
      config: Settings as typed.

    Returns:
      With `resume` and a run in the folder: the settings of that run, replaced by the flags that
      were typed and may change. Otherwise `config`.

    Raises:
      BadInput: if a flag was typed with another value than the run has, if the settings of the run
        cannot be read, or if two settings contradict each other.
    """
    if not config.resume:
        return config
    path = config.out or _default(config)
    if not _holds_run(path):
        check(config)
        return config
    before = _read_settings(path)
    _check_pinned(path, before, {n: getattr(config, n) for n in PINNED if n in config.given})
    kept = {n: before[n] for n in (*PINNED, *CHANGEABLE) if n not in config.given}
    if "data" not in config.given and before["data"] is not None:
        kept["data"] = pathlib.Path(before["data"])
    return dataclasses.replace(config, out=path, **kept)


def open_run(config: Config, corpus: Corpus) -> Run:
    """Finds or makes the folder of a run.

    Args:
      config: Settings, from `resumed`.
      corpus: The text, whose digest is pinned.

    Returns:
      The folder. Nothing was made if this raises.

    Raises:
      BadInput: if the folder cannot be made, holds another run, or holds one with other settings.
    """
    now = _settings(config, corpus)
    path = config.out or _default(config)
    if not _holds_run(path):
        taken_is_ours = config.out is not None or config.resume
        return Run(_start(path, now, exist_ok=taken_is_ours), done=False)
    if not config.resume:
        raise BadInput(f"--out {path}: holds a run; give another folder, or --resume to go on")
    before = _read_settings(path)
    _check_pinned(path, before, {name: now[name] for name in (*PINNED, TEXT)})
    done = (path / SUMMARY).exists()
    if now != before and not done:
        _rewrite(path, now)
    return Run(path, done)


def identity(path: pathlib.Path) -> bytes:
    """Returns the pinned settings of a run, to which its checkpoints belong."""
    before = _read_settings(path)
    return json.dumps({name: before[name] for name in (*PINNED, TEXT)}).encode()


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


def _settings(config: Config, corpus: Corpus) -> dict[str, Any]:
    """Returns the content of `run.json`."""
    size = len(corpus.train) + len(corpus.validation)
    settings = {name: getattr(config, name) for name in (*PINNED, *CHANGEABLE)}
    return settings | {
        "learning_rate": config.peak,
        "data": None if config.data is None else os.path.abspath(config.data),
        TEXT: f"{size} bytes with SHA-256 {corpus.sha256}",
    }


def _default(config: Config) -> pathlib.Path:
    """The first free folder; on resume the last that is taken, or the first if none is."""

    def folder(number: int) -> pathlib.Path:
        suffix = f"-{number}" if number > 1 else ""
        return pathlib.Path("runs", f"{config.model}-{config.optimizer}{suffix}")

    free = next(number for number in itertools.count(1) if not os.path.lexists(folder(number)))
    return folder(max(free - 1, 1) if config.resume else free)


def _holds_run(path: pathlib.Path) -> bool:
    return any(os.path.lexists(path / name) for name in (SETTINGS, METRICS, SUMMARY, CHECKPOINTS))


def _start(path: pathlib.Path, settings: dict[str, Any], exist_ok: bool) -> pathlib.Path:
    """Makes the folder with `run.json`, or leaves the disk as it was."""
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
        write_json(path / SETTINGS, settings)
    except OSError as error:
        # If it exists now, another program has just taken it, and it is not ours to remove.
        for folder in [] if isinstance(error, FileExistsError) else missing:
            if os.path.isdir(folder):  # not pathlib, which raises on a name too long
                folder.rmdir()
        raise BadInput(
            f"--out {path}: cannot be made ({error.strerror}); name a folder that can be written"
        ) from error
    return path


def _rewrite(path: pathlib.Path, settings: dict[str, Any]) -> None:
    try:
        write_json(path / SETTINGS, settings)
    except OSError as error:
        raise BadInput(
            f"{path / SETTINGS}: cannot be written ({error.strerror}); make room, then --resume"
        ) from error


def _read_settings(path: pathlib.Path) -> dict[str, Any]:
    try:
        before = json.loads((path / SETTINGS).read_bytes())
        if not isinstance(before, dict):
            raise ValueError("not an object")
        if absent := {*PINNED, *CHANGEABLE, "data", TEXT} - before.keys():
            raise ValueError(f"no {', '.join(sorted(absent))}")
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{path / SETTINGS}: not readable, so the settings of this run are unknown;"
            " start a new one with another --out"
        ) from error
    return before


def _check_pinned(path: pathlib.Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises with both values of each setting that a resume may not change."""
    changed = [
        f"{_flag(name)} was {before[name]}, now {value}"
        for name, value in now.items()
        if before[name] != value
    ]
    if changed:
        raise BadInput(
            f"--resume {path}: {'; '.join(changed)}; give the old values, or another --out"
        )


def _flag(name: str) -> str:
    return "--data" if name == TEXT else f"--{name.replace('_', '-')}"

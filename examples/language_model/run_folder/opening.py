"""Choosing and opening the folder of a run, and comparing its settings (`run.json`) on resume."""

import dataclasses
import itertools
import json
import os
import pathlib
from typing import Any

from examples.language_model.config import BadInput, Config, check
from examples.language_model.data import Corpus
from examples.language_model.run_folder.files import (
    CHECKPOINTS,
    METRICS,
    SETTINGS,
    SUMMARY,
    write_json,
)

# A resume may not change these. --steps is among them: the learning rate is 0 after the last step.
PINNED = (
    "model",
    "preset",
    "dtype",
    "optimizer",
    "per_head",
    "schedule",
    "steps",
    "batch_size",
    "seq_len",
    "seed",
    "accumulate",
    "learning_rate",
)
# The values of these settings in runs that were started without them.
ADDED = {"per_head": False, "schedule": "linear"}
# A resume may change these; without the flag, the value of the run is used.
CHANGEABLE = ("threshold", "checkpoint_every", "mesh", "simulate_devices")
TEXT = "text"  # size and digest of the text in `run.json`, which are pinned too


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder that is ready for its run.

    Attributes:
      path: The folder; it exists and holds `run.json`.
      complete: Whether the run has ended, that is, `summary.json` exists.
    """

    path: pathlib.Path
    complete: bool


def resumed(config: Config) -> Config:
    """Fills in the settings of a run that is resumed from its folder.

    Args:
      config: Settings from the command line.

    Returns:
      With `resume` and a run in the folder: the settings of that run, replaced by the flags that
      were passed and may change. Otherwise `config`.

    Raises:
      BadInput: if a flag has another value than the run, if the settings of the run cannot be read,
        or if two settings contradict each other.
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
    """Finds or creates the folder of a run.

    Args:
      config: Settings, from `resumed`.
      corpus: The text; its digest is pinned.

    Returns:
      The folder.

    Raises:
      BadInput: if the folder cannot be created, holds another run, or holds one with other
        settings. In these cases nothing is created.
    """
    now = _settings(config, corpus)
    path = config.out or _default(config)
    if not _holds_run(path):
        may_exist = config.out is not None or config.resume
        return Run(_create(path, now, may_exist), complete=False)
    if not config.resume:
        raise BadInput(
            f"--out {path}: already holds a run; pass another folder, or --resume to continue it"
        )
    before = _read_settings(path)
    _check_pinned(path, before, {name: now[name] for name in (*PINNED, TEXT)})
    complete = (path / SUMMARY).exists()
    if now != before and not complete:
        _rewrite(path, now)
    return Run(path, complete)


def identity(path: pathlib.Path) -> bytes:
    """Returns the pinned settings of a run, which its checkpoints have to match."""
    before = _read_settings(path)
    pinned = {name: before[name] for name in (*PINNED, TEXT)}
    since = {name for name, value in ADDED.items() if before[name] == value}
    return json.dumps({k: v for k, v in pinned.items() if k not in since}).encode()


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
    """Returns the first free folder; on resume the last one that exists, or the first."""

    def folder(number: int) -> pathlib.Path:
        suffix = f"-{number}" if number > 1 else ""
        return pathlib.Path("runs", f"{config.model}-{config.optimizer}{suffix}")

    free = next(number for number in itertools.count(1) if not os.path.lexists(folder(number)))
    return folder(max(free - 1, 1) if config.resume else free)


def _holds_run(path: pathlib.Path) -> bool:
    return any(os.path.lexists(path / name) for name in (SETTINGS, METRICS, SUMMARY, CHECKPOINTS))


def _create(path: pathlib.Path, settings: dict[str, Any], may_exist: bool) -> pathlib.Path:
    """Creates the folder with `run.json`; on an error, removes what it created."""
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        path.mkdir(parents=True, exist_ok=may_exist)
        write_json(path / SETTINGS, settings)
    except OSError as error:
        # If it exists now, another program has just created it, and must keep it.
        for folder in [] if isinstance(error, FileExistsError) else missing:
            if os.path.isdir(folder):  # not pathlib, which raises on a name that is too long
                folder.rmdir()
        raise BadInput(
            f"--out {path}: cannot be created ({error.strerror}); pass a folder that is writable"
        ) from error
    return path


def _rewrite(path: pathlib.Path, settings: dict[str, Any]) -> None:
    try:
        write_json(path / SETTINGS, settings)
    except OSError as error:
        raise BadInput(
            f"{path / SETTINGS}: cannot be written ({error.strerror}); free disk space, then"
            " --resume"
        ) from error


def _read_settings(path: pathlib.Path) -> dict[str, Any]:
    try:
        before = json.loads((path / SETTINGS).read_bytes())
        if not isinstance(before, dict):
            raise ValueError("not an object")
        before = ADDED | before
        if absent := {*PINNED, *CHANGEABLE, "data", TEXT} - before.keys():
            raise ValueError(f"no {', '.join(sorted(absent))}")
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{path / SETTINGS}: not readable, so the settings of this run are unknown;"
            " start a new run with another --out"
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
            f"--resume {path}: {'; '.join(changed)}; pass the old values, or another --out"
        )


def _flag(name: str) -> str:
    return "--data" if name == TEXT else f"--{name.replace('_', '-')}"

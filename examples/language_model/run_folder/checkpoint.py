"""Checkpoints: orbax writes them while training continues, and digests detect damage on reading.

A checkpoint is the folder `<step>/` with the files of orbax and `digests.json`: the SHA-256 of
every leaf, of the settings, of every file, and of the digests themselves. Orbax writes into a
folder with a temporary name, and the digests are added just before the rename. A kill at any time
therefore leaves a folder with both, or no checkpoint.

The files are checked before orbax opens them, because its parallel readers are not robust to
damage: they print tracebacks, and do not detect flipped bits. The leaves are checked before use.
"""

import functools
import hashlib
import json
import logging
import pathlib
import re
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from examples.language_model.config import BadInput, Failed, warn
from examples.language_model.run_folder.digests import (
    DIGESTS,
    file_digests,
    leaf_digests,
    seal,
    signature_differences,
)

KEPT = 3  # if the newest is damaged, there is an older one
_UNFINISHED = ".orbax-checkpoint-tmp"  # suffix of a folder that orbax has not finished
_TIMES = "_CHECKPOINT_METADATA"  # orbax adds the time of the commit later, and never reads it

# After a failed save, absl prints a traceback to stderr; `wait` raises the error itself.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class Damaged(Exception):
    """A checkpoint differs from what was saved; the message names the difference."""


class _Handler(ocp.StandardCheckpointHandler):
    """Adds the digests to a checkpoint just before orbax renames it."""

    content: dict[str, Any]  # of the digests, except the files

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        folder = pathlib.Path(directory)
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != _TIMES]
        names = [path.relative_to(folder).as_posix() for path in files]
        content = self.content | {"files": file_digests(folder, names)}
        (folder / DIGESTS).write_bytes(seal(content))


@ocp.args.register_with_handler(_Handler, for_save=True)
class _Save(ocp.args.StandardSave):
    """A pytree to save; orbax finds the handler by the type of its arguments."""


@ocp.args.register_with_handler(_Handler, for_restore=True)
class _Restore(ocp.args.StandardRestore):
    """A pytree to restore."""


class Checkpoints:
    """The checkpoints of one run, `<folder>/<step>`.

    Used as a context manager. Its exit waits for the last save, because only waiting shows that an
    asynchronous save has failed.

    With several processes, all call the same methods at the same time. They share one folder, and
    only process 0 removes folders and warns. Leaves that are sharded over processes are gathered
    for their digests, one leaf at a time.
    """

    def __init__(self, folder: pathlib.Path, settings: bytes = b"") -> None:
        self._folder = folder.resolve()  # orbax accepts absolute paths only
        self._settings = settings
        _ignore_closed_loops()
        self._handler = _Handler()
        self._orbax = ocp.AsyncCheckpointer(self._handler)
        self._saving = 0
        if _is_first():
            for leftover in self._folder.glob(f"*{_UNFINISHED}*"):
                _remove(leftover)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._orbax.close()

    def steps(self) -> list[int]:
        """Lists the saved steps, oldest first; `restore` checks whether they are intact."""
        return sorted(int(path.name) for path in self._numbered() if _is_candidate(path))

    def save(self, step: int, state: Any) -> None:
        """Starts to save a step, once the previous save has ended, and removes the oldest.

        Args:
          step: Finished optimizer steps.
          state: Pytree of arrays; it may be donated as soon as this returns.

        Raises:
          Failed: if this or the previous save could not be written.
        """
        self.wait()
        path = self._folder / str(step)
        if _is_first():
            # A later step was damaged when this run resumed from an older one.
            older = [old for old in self.steps() if old < step]
            for old in older[: -(KEPT - 1)]:
                _remove(self._folder / str(old))
            _remove(path)
        self._saving = step
        self._handler.content = self._owner(step) | {"leaves": leaf_digests(state)}
        try:
            self._orbax.save(path, args=_Save(state))
        except Exception as error:  # a full disk raises one of a dozen types
            raise self._failed(error) from error

    def wait(self) -> None:
        """Waits until the last save is on disk; raises `Failed` if it could not be written."""
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def restore_newest(self, target: Any) -> tuple[int, Any] | None:
        """Restores the newest step that is intact, and warns about damaged ones.

        Args:
          target: Pytree of arrays or of `jax.ShapeDtypeStruct` with the structure, shapes, dtypes
            and, on several devices, shardings to restore.

        Returns:
          The step and its state; None if there is no checkpoint.

        Raises:
          BadInput: if the saved leaves have other paths, shapes or dtypes, or if all checkpoints
            are damaged.
        """
        self._warn_about_others()
        damages = []
        for step in reversed(self.steps()):
            try:
                state = self.restore(step, target)
            except Damaged as error:
                damages.append(f"step {step} is damaged ({error})")
                continue
            if damages and _is_first():
                warn(f"{self._folder}: {', '.join(damages)}; resuming from step {step} instead")
            return step, state
        if damages:
            raise BadInput(
                f"--resume {self._folder}: no intact checkpoint: {', '.join(damages)};"
                " start a new run with another --out"
            )
        return None

    def restore(self, step: int, target: Any) -> Any:
        """Restores a step.

        Args:
          step: One of `steps()`.
          target: As in `restore_newest`.

        Returns:
          Pytree of arrays with the structure, shapes, dtypes and shardings of `target`.

        Raises:
          BadInput: if the saved leaves have other paths, shapes or dtypes.
          Damaged: if the files or the restored leaves differ from what was saved.
        """
        path = self._folder / str(step)
        saved = _in_all_processes(lambda: self._read_digests(step))
        differences = signature_differences(saved, target)
        if differences:
            raise BadInput(f"--resume {path}: {'; '.join(differences)}; pass another --out")
        try:
            restored = self._orbax.restore(path, args=_Restore(target))
        except Exception as error:  # damage raises one of a dozen types
            raise Damaged(_reason(error)) from error
        changed = [leaf for leaf, digest in leaf_digests(restored).items() if digest != saved[leaf]]
        if changed:
            raise Damaged(f"leaves differ from those saved: {', '.join(changed)}")
        return restored

    def _owner(self, step: int) -> dict[str, Any]:
        return {"step": step, "settings": hashlib.sha256(self._settings).hexdigest()}

    def _read_digests(self, step: int) -> dict[str, dict[str, Any]]:
        """Returns the digests of the leaves, after checking the files and the settings."""
        path = self._folder / str(step)
        try:
            text = (path / DIGESTS).read_bytes()
            content = json.loads(text)
            if not isinstance(content, dict) or text != seal(content):
                raise ValueError("changed since it was written")
        except (OSError, ValueError) as error:
            raise Damaged(f"{DIGESTS}: {_reason(error)}") from error
        if content != content | self._owner(step):
            raise Damaged(f"{DIGESTS}: belongs to another step, or to a run with other settings")
        files = file_digests(path, content["files"])
        changed = [name for name, digest in content["files"].items() if digest != files[name]]
        if changed:
            raise Damaged(f"files differ from those written: {', '.join(changed)}")
        return content["leaves"]

    def _failed(self, error: Exception) -> Failed:
        return Failed(
            f"step {self._saving}: the checkpoint could not be written ({_reason(error)});"
            " free disk space, then resume from the previous one with --resume"
        )

    def _numbered(self) -> list[pathlib.Path]:
        return [path for path in self._folder.glob("*") if re.fullmatch("[0-9]+", path.name)]

    def _warn_about_others(self) -> None:
        for path in sorted(self._numbered()):
            if _is_first() and not _is_candidate(path):
                warn(f"{path}: not a checkpoint of this run; ignored")


def _in_all_processes(read: Callable[[], Any]) -> Any:
    """Reads on all processes; damage that one of them finds is raised on all."""
    content, damage = None, ""
    try:
        content = read()
    except Damaged as error:
        damage = str(error)
    if jax.process_count() > 1:
        damaged: Any = multihost_utils.process_allgather(np.array(bool(damage)))
        if not damage and damaged.any():
            damage = f"found by process {int(np.argmax(damaged))}"
    if damage:
        raise Damaged(damage)
    return content


def _is_candidate(path: pathlib.Path) -> bool:
    """Returns whether this may be a checkpoint; orbax itself accepts an empty 999 as the latest."""
    canonical = path.name == str(int(path.name))  # not 007
    return canonical and path.is_dir() and not path.is_symlink() and any(path.iterdir())


@functools.cache
def _ignore_closed_loops() -> None:
    """Drops the tracebacks of pending writes after orbax has closed its event loop on a failure."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _remove(path: pathlib.Path) -> None:
    """Removes a folder by way of a temporary name, so that a kill leaves no partial checkpoint.

    Does not follow links.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        unfinished = _UNFINISHED in path.name
        leftover = path if unfinished else path.with_name(f"{path.name}{_UNFINISHED}-old")
        shutil.rmtree(path.replace(leftover))


def _is_first() -> bool:
    return jax.process_index() == 0


def _reason(error: Exception) -> str:
    """Returns one line; tensorstore puts the paths of several files before the reason."""
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return line.rpartition('": ')[2]

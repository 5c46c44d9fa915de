"""Checkpoints: written by orbax while training goes on; digests tell on reading what was damaged.

A checkpoint is the folder `<step>/` with the files of orbax and `digests.json`: the SHA-256 of
every leaf, of the settings, of every file, and of all that together. Orbax writes into a folder of
another name, and the digests go in just before it gets its own: whenever the program is killed, a
folder has both or is not a checkpoint.

The files are checked before orbax opens them, as what reads them in parallel is not made for
damage: it prints tracebacks, and does not find bits that flipped. The leaves are checked before
they are used.
"""

import functools
import hashlib
import json
import logging
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lm.config import BadInput, Failed, warn

KEPT = 3  # if the newest is damaged, there is one to fall back on
DIGESTS = "digests.json"
_LEFTOVER = ".orbax-checkpoint-tmp"  # how orbax ends the name of a folder that it has not finished
_TIMES = "_CHECKPOINT_METADATA"  # orbax adds the time of the commit later, and reads it never

# Of a failed save, absl writes a traceback to stderr; the error itself is raised on `wait`.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class Damaged(Exception):
    """A checkpoint is not what was saved; the text says what differs."""


class _Handler(ocp.StandardCheckpointHandler):
    """Puts the digests into a checkpoint just before orbax gives it its name."""

    content: dict[str, Any]  # of the digests, but for those of the files

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        folder = pathlib.Path(directory)
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != _TIMES]
        names = [path.relative_to(folder).as_posix() for path in files]
        content = self.content | {"files": _file_digests(folder, names)}
        (folder / DIGESTS).write_bytes(_sealed(content))


@ocp.args.register_with_handler(_Handler, for_save=True)
class _Save(ocp.args.StandardSave):
    """A tree to save; orbax finds the handler by the type of its arguments."""


@ocp.args.register_with_handler(_Handler, for_restore=True)
class _Restore(ocp.args.StandardRestore):
    """A tree to restore."""


class Checkpoints:
    """The checkpoints of one run, `<folder>/<step>`.

    Used as a context manager: leaving it waits for the last save, as an asynchronous save that
    fails is seen only by who waits for it.

    With several processes all call the same methods at the same time. They see one folder, and the
    first of them alone removes and warns. A leaf that is divided among them is gathered, one leaf
    at a time, for its digest.
    """

    def __init__(self, folder: pathlib.Path, settings: bytes = b"") -> None:
        self._folder = folder.resolve()  # orbax takes absolute paths only
        self._settings = settings
        _hush_closed_loops()
        self._handler = _Handler()
        self._orbax = ocp.AsyncCheckpointer(self._handler)
        self._saving = 0
        if _is_first():
            for leftover in self._folder.glob(f"*{_LEFTOVER}*"):
                _remove(leftover)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._orbax.close()

    def steps(self) -> list[int]:
        """Lists the saved steps, oldest first; whether they are whole, reading them tells."""
        return sorted(int(path.name) for path in self._numbered() if _may_be_whole(path))

    def save(self, step: int, state: Any) -> None:
        """Starts to save a step, after the save before it has ended, and drops the oldest.

        Args:
          step: Finished optimizer steps.
          state: Tree of arrays; it may change as soon as this returns.

        Raises:
          Failed: if this or the save before it could not be written.
        """
        self.wait()
        path = self._folder / str(step)
        if _is_first():
            # A later step is one that was damaged when this run went back to an older one.
            older = [old for old in self.steps() if old < step]
            for old in older[: -(KEPT - 1)]:
                _remove(self._folder / str(old))
            _remove(path)
        self._saving = step
        self._handler.content = self._owner(step) | {"leaves": digests(state)}
        try:
            self._orbax.save(path, args=_Save(state))
        except Exception as error:  # a full disk shows as any of a dozen types
            raise self._failed(error) from error

    def wait(self) -> None:
        """Returns when the last save is on disk; raises `Failed` if it could not be written."""
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def restore_newest(self, target: Any) -> tuple[int, Any] | None:
        """Reads the newest step that is whole, and warns of those that are not.

        Args:
          target: Tree of arrays or of `jax.ShapeDtypeStruct` with the wanted structure and, if
            there are several devices, shardings.

        Returns:
          The step and its state; None if there is no checkpoint.

        Raises:
          BadInput: if the leaves are others than those saved, or if every checkpoint is damaged.
        """
        self._warn_of_foreign()
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
                f"--resume {self._folder}: no checkpoint is left: {', '.join(damages)};"
                " start again with another --out"
            )
        return None

    def restore(self, step: int, target: Any) -> Any:
        """Reads a step.

        Args:
          step: One of `steps()`.
          target: As in `restore_newest`.

        Returns:
          Tree of arrays with the structure, shapes, dtypes and shardings of `target`.

        Raises:
          BadInput: if the leaves are others than those saved.
          Damaged: if what was read is not what was saved.
        """
        path = self._folder / str(step)
        saved = _in_all_processes(lambda: self._read_digests(step))
        faults = _differences(saved, _signatures(target))
        if faults:
            raise BadInput(f"--resume {path}: {'; '.join(faults)}; give another --out")
        try:
            restored = self._orbax.restore(path, args=_Restore(target))
        except Exception as error:  # damage shows as any of a dozen types
            raise Damaged(_reason(error)) from error
        changed = [leaf for leaf, digest in digests(restored).items() if digest != saved[leaf]]
        if changed:
            raise Damaged(f"not the bytes that were saved: {', '.join(changed)}")
        return restored

    def _owner(self, step: int) -> dict[str, Any]:
        return {"step": step, "settings": hashlib.sha256(self._settings).hexdigest()}

    def _read_digests(self, step: int) -> dict[str, dict[str, Any]]:
        """Gives the digests of the leaves, once those of the files and of this run are right."""
        path = self._folder / str(step)
        try:
            text = (path / DIGESTS).read_bytes()
            content = json.loads(text)
            if not isinstance(content, dict) or text != _sealed(content):
                raise ValueError("not as it was written")
        except (OSError, ValueError) as error:
            raise Damaged(f"{DIGESTS}: {_reason(error)}") from error
        if content != content | self._owner(step):
            raise Damaged(f"{DIGESTS}: of another step, or of a run with other settings")
        files = _file_digests(path, content["files"])
        changed = [name for name, digest in content["files"].items() if digest != files[name]]
        if changed:
            raise Damaged(f"not the files that were written: {', '.join(changed)}")
        return content["leaves"]

    def _failed(self, error: Exception) -> Failed:
        return Failed(
            f"step {self._saving}: the checkpoint could not be written ({_reason(error)});"
            " make room, then --resume goes on from the one before"
        )

    def _numbered(self) -> list[pathlib.Path]:
        return [path for path in self._folder.glob("*") if re.fullmatch("[0-9]+", path.name)]

    def _warn_of_foreign(self) -> None:
        for path in sorted(self._numbered()):
            if _is_first() and not _may_be_whole(path):
                warn(f"{path}: holds no checkpoint of this run; left out")


def _in_all_processes(read: Callable[[], Any]) -> Any:
    """Reads what all processes have to find whole: damage that one of them sees counts for all."""
    content, damage = None, ""
    try:
        content = read()
    except Damaged as error:
        damage = str(error)
    if jax.process_count() > 1:
        damaged: Any = multihost_utils.process_allgather(np.array(bool(damage)))
        if not damage and damaged.any():
            damage = f"as process {int(np.argmax(damaged))} reads it"
    if damage:
        raise Damaged(damage)
    return content


def digests(tree: Any) -> dict[str, dict[str, Any]]:
    """Computes the digest of every leaf.

    Args:
      tree: Of arrays; if they are divided among processes, all processes have to call this.

    Returns:
      By path of a leaf its shape, dtype, and the SHA-256 of its bytes in row-major order.
    """
    return {
        path: _signature(leaf) | {"sha256": hashlib.sha256(_bytes(leaf).data).hexdigest()}
        for path, leaf in _leaves(tree).items()
    }


def _sealed(content: dict[str, Any]) -> bytes:
    """Writes `digests.json`, with a digest of its own content."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    seal = hashlib.sha256(json.dumps(rest).encode()).hexdigest()
    return (json.dumps(rest | {"sha256": seal}) + "\n").encode()


def _file_digests(folder: pathlib.Path, names: Iterable[str]) -> dict[str, str | None]:
    """Gives the SHA-256 of files by name; None for one that is no longer there."""
    return {name: _file_digest(folder / name) for name in sorted(names)}


def _file_digest(path: pathlib.Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)


def _differences(saved: dict[str, dict[str, Any]], target: dict[str, dict[str, Any]]) -> list[str]:
    """Leaves whose shape or dtype differs; orbax would cast and pad without a word."""

    def text(leaf: dict[str, Any] | None) -> str:
        return "absent" if leaf is None else f"{leaf['dtype']}{leaf['shape']}"

    before = {path: text(leaf) for path, leaf in saved.items()}
    now = {path: text(leaf) for path, leaf in target.items()}
    return [
        f"{path} was {before.get(path, text(None))}, now {now.get(path, text(None))}"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path)
    ]


def _signatures(tree: Any) -> dict[str, dict[str, Any]]:
    return {path: _signature(leaf) for path, leaf in _leaves(tree).items()}


def _signature(leaf: Any) -> dict[str, Any]:
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def _leaves(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _may_be_whole(path: pathlib.Path) -> bool:
    """Says whether it is worth to read; orbax itself takes an empty 999 for the latest step."""
    named = path.name == str(int(path.name))  # not 007
    return named and path.is_dir() and not path.is_symlink() and any(path.iterdir())


@functools.cache
def _hush_closed_loops() -> None:
    """Drops the tracebacks of the other writes, when one has failed and orbax has left its loop."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _remove(path: pathlib.Path) -> None:
    """Removes a folder, so that a kill leaves it whole or as a leftover; does not follow links."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        leftover = path if _LEFTOVER in path.name else path.with_name(f"{path.name}{_LEFTOVER}-old")
        shutil.rmtree(path.replace(leftover))


def _is_first() -> bool:
    return jax.process_index() == 0


def _reason(error: Exception) -> str:
    """One line; tensorstore puts the paths of several files before the reason."""
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return line.rpartition('": ')[2]

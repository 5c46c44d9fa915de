"""Checkpoints: written by orbax while training goes on, listed and pruned here."""

import pathlib
import re
import shutil
import warnings
from typing import Any

import jax
import orbax.checkpoint as ocp

from lm.config import BadInput

KEPT = 3  # if the newest is damaged, there is one to fall back on
_COMMITTED = "_CHECKPOINT_METADATA"  # orbax writes it last, before it renames the folder


class Checkpoints:
    """The checkpoints of one run, `<folder>/<step>`.

    Used as a context manager: leaving it waits for the last save, as an asynchronous save that
    fails is seen only by who waits for it.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder.resolve()  # orbax takes absolute paths only
        self._orbax = ocp.StandardCheckpointer()
        for leftover in self._folder.glob("*.orbax-checkpoint-tmp*"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._orbax.close()  # waits

    def steps(self) -> list[int]:
        """Lists the saved steps, oldest first; links and folders without a checkpoint are not."""
        found = []
        for path in self._folder.glob("*"):
            if not re.fullmatch("[0-9]+", path.name) or path.is_symlink():
                continue
            if (path / _COMMITTED).is_file():
                found.append(int(path.name))
            else:
                warnings.warn(f"{path}: holds no finished checkpoint, left out", stacklevel=2)
        return sorted(found)

    def save(self, step: int, state: Any) -> None:
        """Starts to save a step, after the save before it has ended, and drops the oldest.

        Args:
          step: Finished optimizer steps.
          state: Tree of arrays; it may change as soon as this returns.
        """
        self.wait()
        for old in self.steps()[: -(KEPT - 1)]:
            shutil.rmtree(self._folder / str(old))
        # force: an empty folder of that name, which `steps` leaves out, must not stop the run
        self._orbax.save(self._folder / str(step), state, force=True)

    def wait(self) -> None:
        """Returns when the last save is on disk; raises if it failed."""
        self._orbax.wait_until_finished()

    def restore(self, step: int, target: Any) -> Any:
        """Reads a step.

        Args:
          step: One of `steps()`.
          target: Tree of arrays or of `jax.ShapeDtypeStruct` with the wanted structure.

        Returns:
          Tree of arrays with the structure, shapes and dtypes of `target`.

        Raises:
          BadInput: if the saved leaves are others, or cannot be read.
        """
        path = self._folder / str(step)
        try:
            faults = _differences(self._saved(path), target)
            restored = None if faults else self._orbax.restore(path, target)
        except Exception as error:  # damage shows as any of a dozen types
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            raise BadInput(
                f"--resume {path}: damaged ({text}); remove this folder to resume from an older one"
            ) from error
        if faults:
            raise BadInput(f"--resume {path}: {'; '.join(faults)}; give another --out")
        return restored

    def _saved(self, path: pathlib.Path) -> Any:
        metadata = self._orbax.metadata(path).item_metadata
        if metadata is None:
            raise ValueError("no metadata")
        return metadata.tree


def _differences(saved: Any, target: Any) -> list[str]:
    """Leaves whose shape or dtype differs; orbax would cast and pad without a word."""
    before, now = _signatures(saved), _signatures(target)
    return [
        f"{path} was {before.get(path, 'absent')}, now {now.get(path, 'absent')}"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path)
    ]


def _signatures(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }

"""The checkpoint of one unfinished training: its state, and the metrics of every finished step."""

import hashlib
import io
import json
import pathlib
from typing import Any

import jax
import numpy as np

from benchmarks import report

Metrics = list[dict[str, Any]]


def path_of(folder: pathlib.Path, identity: dict[str, Any]) -> pathlib.Path:
    """Returns the file of a training.

    Args:
      folder: Folder of all checkpoints.
      identity: The settings of the training, and the versions that its result depends on.
    """
    text = json.dumps(identity, sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"


def save(path: pathlib.Path, state: Any, metrics: Metrics) -> None:
    """Writes a checkpoint completely, or leaves the old one.

    Args:
      path: The file; its folder is made.
      state: Pytree of arrays whose dtypes NumPy has.
      metrics: Pytree of arrays for each finished step, at least one.
    """
    stacked = jax.tree.map(lambda *steps: np.stack(steps), *jax.device_get(metrics))
    content = io.BytesIO()
    np.savez(content, *jax.tree.leaves((jax.device_get(state), stacked)))
    path.parent.mkdir(parents=True, exist_ok=True)
    report.write(path, content.getvalue())


def load(path: pathlib.Path, shapes: Any) -> tuple[Any, Metrics]:
    """Reads a checkpoint.

    Args:
      path: The file.
      shapes: Pytree of the state and of the metrics of one step, as a pair.

    Returns:
      The state and the metrics of every finished step, bitwise identical to what was saved.
    """
    with np.load(path) as file:
        leaves = [file[name] for name in file.files]
    state, stacked = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    steps = len(jax.tree.leaves(stacked)[0])
    return state, [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(steps)]

"""SHA-256 digests of the leaves and files of a checkpoint."""

import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

DIGESTS = "digests.json"


def leaf_digests(tree: Any) -> dict[str, dict[str, Any]]:
    """Computes the digest of every leaf.

    Args:
      tree: Pytree of arrays; if they are sharded over processes, all processes have to call this.

    Returns:
      By path of a leaf its shape, dtype, and the SHA-256 of its bytes in row-major order.
    """
    return {
        path: _signature(leaf) | {"sha256": hashlib.sha256(_bytes(leaf).data).hexdigest()}
        for path, leaf in _leaves(tree).items()
    }


def file_digests(folder: pathlib.Path, names: Iterable[str]) -> dict[str, str | None]:
    """Returns the SHA-256 of files by name; None for a file that is missing."""
    return {name: _file_digest(folder / name) for name in sorted(names)}


def seal(content: dict[str, Any]) -> bytes:
    """Formats `digests.json`, including a digest of its own content."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(rest).encode()).hexdigest()
    return (json.dumps(rest | {"sha256": digest}) + "\n").encode()


def signature_differences(saved: dict[str, dict[str, Any]], target: Any) -> list[str]:
    """Lists the leaves with another shape or dtype; orbax would cast and pad them silently.

    Args:
      saved: By path of a leaf its shape and dtype.
      target: Pytree of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
      One line per leaf, with both shapes and dtypes.
    """

    def text(leaf: dict[str, Any] | None) -> str:
        return "absent" if leaf is None else f"{leaf['dtype']}{leaf['shape']}"

    before = {path: text(leaf) for path, leaf in saved.items()}
    now = {path: text(_signature(leaf)) for path, leaf in _leaves(target).items()}
    return [
        f"{path} was {before.get(path, text(None))}, now {now.get(path, text(None))}"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path)
    ]


def _file_digest(path: pathlib.Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)


def _signature(leaf: Any) -> dict[str, Any]:
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def _leaves(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }

"""Reads what a model has sown: max logits by the path of their module."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from muonclip_jax._attention.flax_attention import BOUND
from muonclip_jax._common.paths import components
from muonclip_jax._common.types import ArrayTree

Path: TypeAlias = tuple[str, ...]
# By path of a module and name of its max logits: one array per call.
MaxLogits: TypeAlias = dict[tuple[Path, str], list[Array]]


def sown_arrays(
    max_logits: ArrayTree, names: Collection[str]
) -> tuple[MaxLogits, set[tuple[Path, str]], dict[Path, list[str]]]:
    """Collects the arrays sown under these names, by path of the module and name.

    Args:
      max_logits: The max logits.
      names: The names.

    Returns:
      The arrays of all calls, the keys of those that are upper bounds, and all other names by path.

    Raises:
      TypeError: for numbers of Python in place of arrays.
    """
    sown: MaxLogits = {}
    unread: dict[Path, list[str]] = {}
    bounds = set()
    known = {suffixed: name for name in names for suffixed in (name + BOUND, name)}
    flat = jax.tree_util.tree_flatten_with_path(max_logits)[0]
    paths = [without_index(path) for path, _ in flat]
    paths = [p[:-1] if p[-1:] == ("value",) and p[-2:-1] and p[-2] in known else p for p in paths]
    for index, path in below_root("intermediates", paths):
        if path and path[-1] in known:
            key = (path[:-1], known[path[-1]])
            sown.setdefault(key, []).append(_checked("/".join(path), flat[index][1]))
            if path[-1].endswith(BOUND):
                bounds.add(key)
        elif path:
            unread.setdefault(path[:-1], []).append(path[-1])
    return sown, bounds, unread


def _checked(path: str, value: Any) -> Array:
    """Returns an array of max logits; raises for a number of a list, which has no axis of heads."""
    if isinstance(value, (bool, int, float)):
        raise TypeError(
            f"qk_clip: {path} is or holds the number {value}, expected arrays [..., heads]: pass a "
            "list through jnp.asarray."
        )
    return jnp.asarray(value)


def without_index(path: Sequence[Any]) -> Path:
    """Drops the index in the tuple that `sow` makes of several calls."""
    keys = tuple(path)
    while keys and isinstance(keys[-1], jax.tree_util.SequenceKey):
        keys = keys[:-1]
    return components(keys)


def below_root(root: str, paths: Sequence[Path]) -> Iterator[tuple[int, Path]]:
    """Numbers the paths; if there is a root key of this name, only the paths below it.

    Args:
      root: The key.
      paths: The paths.

    Yields:
      The index of each path, and the path without the key.
    """
    wrapped = any(path[:1] == (root,) for path in paths)
    for index, path in enumerate(paths):
        if not wrapped:
            yield index, path
        elif path[:1] == (root,):
            yield index, path[1:]

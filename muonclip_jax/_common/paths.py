"""The path of a leaf, as the plain strings that messages and tables print and rules match."""

import collections
from collections.abc import Sequence
from typing import Any

import jax


def components(path: Sequence[Any]) -> tuple[str, ...]:
    """Returns the components of the path of a leaf.

    A dict key that holds a whole path is split: at slashes (Haiku's `a/~/b`, whose `~` is dropped,
    and `flax.traverse_util.flatten_dict(sep="/")`), then at dots if the first part is an identifier
    and the others are identifiers or integers (`layers.0.weight`), and a tuple of keys
    (`flatten_dict`) into its keys. A trailing *attribute* named `value` is the inside of a Flax box
    or variable and is left out; a *key* named `value` is a module of
    `flax.linen.MultiHeadDotProductAttention` and stays.

    Args:
      path: Key path, as `jax.tree_util.tree_flatten_with_path` returns it.

    Returns:
      One string per component, outermost first.

    Example:
      >>> ((path, _),), _ = jax.tree_util.tree_flatten_with_path({"block/~/attn": {"value": [1.0]}})
      >>> components(path)
      ('block', 'attn', 'value', '0')
    """
    return tuple(part for key in _without_value(path) for part in _split(key))


def leaf_paths(tree: Any, is_leaf: Any = None) -> list[tuple[str, ...]]:
    """Returns the components of the path of each leaf.

    Where two leaves would have the same components, their dict keys are not split.

    Args:
      tree: A pytree.
      is_leaf: As for `jax.tree.leaves`.

    Returns:
      One tuple for each leaf, in the order of `jax.tree.leaves`.

    Example:
      >>> leaf_paths({"a": {"b": 1.0}, "a/b": 2.0, "c/d": 3.0})
      [('a', 'b'), ('a/b',), ('c', 'd')]
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]
    split = [components(path) for path in paths]
    if len(set(split)) == len(split):
        return split
    count = collections.Counter(split)
    return [
        names if count[names] == 1 else tuple(map(_string, _without_value(path)))
        for names, path in zip(split, paths, strict=True)
    ]


def path_string(path: Sequence[Any]) -> str:
    """Names a leaf in one string, components joined by slashes."""
    return "/".join(components(path))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Formats a table, a line for each row.

    Args:
      rows: The cells of each row, the same number in each.

    Returns:
      The rows, with columns that begin below each other.

    Example:
      >>> print(aligned([("path", "rows"), ("attn/query", "64")]))
      path        rows
      attn/query  64
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _without_value(path: Sequence[Any]) -> tuple[Any, ...]:
    keys = tuple(path)
    if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    return keys


def _string(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _split(key: Any) -> tuple[str, ...]:
    """Splits a dict key that holds a whole path."""
    name = getattr(key, "key", None) if isinstance(key, jax.tree_util.DictKey) else None
    if isinstance(name, tuple) and name and all(isinstance(part, str | int) for part in name):
        return sum((_split_name(str(part)) for part in name), ())
    return _split_name(name) if isinstance(name, str) else (_string(key),)


def _split_name(name: str) -> tuple[str, ...]:
    parts = [_split_dots(part) for part in name.split("/") if part not in ("", "~")]
    return sum(parts, ()) or (name,)


def _split_dots(name: str) -> tuple[str, ...]:
    """Splits `layers.0.weight`, and nothing that has other characters or begins with a number."""
    first, *others = (part for part in name.split(".") if part != "~" or name == "~")
    if others and first.isidentifier() and all(p.isidentifier() or p.isdigit() for p in others):
        return (first, *others)
    return (name,)

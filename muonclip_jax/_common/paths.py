"""The path of a leaf, as the plain strings that messages and tables print and rules match."""

import collections
import re
from collections.abc import Sequence
from typing import Any

import jax

# Components that hold the array of a parameter and have no other name: Flax boxes and variables,
# Penzai, Haliax.
_BOXES = ("_value", "raw_value", "unboxed", "data_array", "array")
# The same where the component around it names an array: Orbax and `flax.serialization` write
# `kernel/value`, but `attention/value` is a projection.
_PERHAPS_BOXES = ("value", "data", "param")
_ARRAYS = re.compile(
    r"(\w+_)?(kernel|weights?|w|bias(es)?|b|scale|offset|gamma|beta|alpha|embeddings?|table|tokens?"
    r"|proj(ection)?|einsum|lora_[ab])(_\d+)?|w?(q|k|v|o|kv|qkv)|to_(q|k|v|o|kv|qkv|out)|w\d*|w_\w+"
    r"|query|key|value|wte|wpe|cls|probe|up|gate|down|out|a_log|d|dt_bias|(\w+_)?sinks?|coefficients"
    r"|freqs?|decay|mu|u|gain|sigma|lambda|temperature|codebooks?"
)


def components(path: Sequence[Any]) -> tuple[str, ...]:
    """Returns the components of the path of a leaf.

    A dict key that holds a whole path is split: at slashes (Haiku's `a/~/b`, whose `~` is dropped,
    and `flax.traverse_util.flatten_dict(sep="/")`), then at dots if the first part is an identifier
    and the others are identifiers or integers (`layers.0.weight`), and a tuple of keys
    (`flatten_dict`) into its keys. A trailing *attribute* named `value` is the inside of a Flax box
    or variable and is left out; a *key* named `value` is a module of
    `flax.linen.MultiHeadDotProductAttention` and stays. `all_components` sees whether the attribute
    has siblings, and is better where several paths are known.

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
    split = all_components(paths)
    if len(set(split)) == len(split):
        return split
    count = collections.Counter(split)
    return [
        names if count[names] == 1 else tuple(map(_string, _without_value(path)))
        for names, path in zip(split, paths, strict=True)
    ]


def all_components(paths: Sequence[Sequence[Any]]) -> list[tuple[str, ...]]:
    """Returns the components of the paths of all leaves of a pytree.

    An attribute `value` that has siblings, as in an attention module of raw arrays, is no box.

    Args:
      paths: Key paths, as `jax.tree_util.tree_flatten_with_path` returns them.

    Returns:
      One tuple for each path.

    Example:
      >>> Key = jax.tree_util.GetAttrKey
      >>> all_components([(Key("key"),), (Key("value"),)])
      [('key',), ('value',)]
      >>> all_components([(Key("w"), Key("value"))])
      [('w',)]
    """
    count = collections.Counter(tuple(path[:-1]) for path in paths)
    return [
        components(path)
        if count[tuple(path[:-1])] == 1
        else tuple(part for key in path for part in _split(key))
        for path in paths
    ]


def without_boxes(paths: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Returns paths without trailing components that name the box of an array.

    A box holds one array, so that a component with siblings is none. `value`, `data` and `param`
    are boxes below the name of an array, or if all paths end in this component.

    Args:
      paths: Components of the paths of all leaves of a pytree.

    Returns:
      One tuple for each path.

    Example:
      >>> without_boxes([("attn", "q", "kernel", "value"), ("attn", "value", "kernel", "value")])
      [('attn', 'q', 'kernel'), ('attn', 'value', 'kernel')]
      >>> without_boxes([("attn", "query"), ("attn", "value")])
      [('attn', 'query'), ('attn', 'value')]
    """
    found = list(paths)
    while True:
        count = collections.Counter(path[:end] for path in found for end in range(1, len(path)))
        is_last = len({path[-1:] for path in found}) == 1 < len({path[-2:] for path in found})
        shorter = [path[:-1] if _ends_in_box(path, count, is_last) else path for path in found]
        if shorter == found:
            return found
        found = shorter


def _ends_in_box(
    path: tuple[str, ...], count: collections.Counter[tuple[str, ...]], is_last: bool
) -> bool:
    """Returns whether the last component is a box; `is_last` if all paths have this last one."""
    if len(path) < 2 or count[path[:-1]] > 1:
        return False
    if path[-1] not in _PERHAPS_BOXES:
        return path[-1] in _BOXES
    return is_last or path[-2] in _BOXES or _ARRAYS.fullmatch(path[-2].lower()) is not None


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
    """Splits `layers.0.weight` and `0.weight`, and nothing with other characters, nor `0.5`."""
    parts = tuple(part for part in name.split(".") if part != "~" or name == "~")
    is_path = all(p.isidentifier() or p.isdigit() for p in parts)
    return parts if is_path and any(map(str.isidentifier, parts)) else (name,)

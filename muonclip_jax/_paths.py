"""Where a leaf is, in the plain strings that messages and tables show and rules match."""

from collections.abc import Sequence
from typing import Any

import jax


def components(path: Sequence[Any]) -> tuple[str, ...]:
    """Names a leaf by its path components.

    A trailing *attribute* named `value` is the inside of a Flax box or variable and is left out;
    a *key* named `value` is a real module of `flax.linen.MultiHeadDotProductAttention` and stays.

    Args:
      path: Key path, as `jax.tree_util.tree_flatten_with_path` gives it.

    Returns:
      One string per component, outermost first.

    Example:
      >>> ((path, _),), _ = jax.tree_util.tree_flatten_with_path({"attn": {"value": [1.0]}})
      >>> components(path)
      ('attn', 'value', '0')
    """
    keys = tuple(path)
    if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def path_string(path: Sequence[Any]) -> str:
    """Names a leaf in one string, components joined by slashes."""
    return "/".join(components(path))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lays out a table, a line for each row.

    Args:
      rows: Its cells, as many in each.

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

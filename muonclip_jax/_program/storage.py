"""Views and containers as JSON, which has no tuples and no names of classes."""

from collections.abc import Mapping
from typing import Any

from muonclip_jax._program.axes import Axis, Digit, Part, View

_CLASSES: dict[str, Any] = {cls.__name__: cls for cls in (Axis, Digit, Part, View)}


def view_to_json(value: Any) -> Any:
    """Returns a view, or what is in one: tuples as lists, classes as keys."""
    if isinstance(value, Axis | Digit | Part | View):
        return {type(value).__name__: [view_to_json(field) for field in value]}
    if isinstance(value, frozenset):
        return {"set": [view_to_json(name) for name in sorted(value, key=str)]}
    return [view_to_json(item) for item in value] if isinstance(value, tuple) else value


def view_from_json(data: Any) -> Any:
    """Reads what `view_to_json` returned."""
    if isinstance(data, list):
        return tuple(map(view_from_json, data))
    if not isinstance(data, Mapping):
        return data
    ((name, items),) = data.items()
    values = map(view_from_json, items)
    return frozenset(values) if name == "set" else _CLASSES[name](*values)


def tree_to_json(tree: Any) -> Any:
    """Returns nested dicts, lists and tuples of paths; None if there are other containers."""
    if tree is None or isinstance(tree, str):
        return {"leaf": tree}
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        kind, items = "dict", tree
    elif type(tree) in (list, tuple):
        kind, items = type(tree).__name__, dict(enumerate(tree))
    else:
        return None
    inner = {key: tree_to_json(value) for key, value in items.items()}
    if any(value is None for value in inner.values()):
        return None
    return {kind: inner if kind == "dict" else [*inner.values()]}


def tree_from_json(data: Any) -> Any:
    """Reads what `tree_to_json` returned."""
    ((kind, items),) = data.items()
    if kind == "leaf":
        return items
    if kind == "dict":
        return {key: tree_from_json(value) for key, value in items.items()}
    values = [tree_from_json(value) for value in items]
    return tuple(values) if kind == "tuple" else values

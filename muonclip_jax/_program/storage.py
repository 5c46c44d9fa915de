"""Views and containers as JSON: tuples become lists, and named indices lists too."""

from collections.abc import Hashable, Mapping
from typing import Any

from muonclip_jax._program.axes import Axis, Digit, Part, View


def view_to_json(view: View) -> Any:
    """Returns a view as lists and dicts."""
    axes = [
        {
            "offset": axis.offset,
            "terms": [[stride, _digit_to_json(digit)] for stride, digit in axis.terms],
            "lost": None if axis.lost is None else sorted(map(_name_to_json, axis.lost), key=str),
        }
        for axis in view.axes
    ]
    parts = [_part_to_json(part) for part in view.parts]
    return {"axes": axes, "parts": parts, "is_partial": view.is_partial}


def view_from_json(data: Mapping[str, Any]) -> View:
    """Reads what `view_to_json` returned."""
    axes = tuple(
        Axis(
            axis["offset"],
            tuple((stride, _digit_from_json(digit)) for stride, digit in axis["terms"]),
            None if axis["lost"] is None else frozenset(map(_name_from_json, axis["lost"])),
        )
        for axis in data["axes"]
    )
    return View(axes, tuple(map(_part_from_json, data["parts"])), data["is_partial"])


def _digit_to_json(digit: Digit) -> Any:
    return [_name_to_json(digit.name), digit.div, digit.size]


def _digit_from_json(data: Any) -> Digit:
    name, div, size = data
    return Digit(_name_from_json(name), div, size)


def _part_to_json(part: Part) -> Any:
    return {"digit": _digit_to_json(part.digit), "start": part.start, "size": part.size}


def _part_from_json(data: Any) -> Part:
    return Part(_digit_from_json(data["digit"]), data["start"], data["size"])


def _name_to_json(name: Hashable) -> Any:
    return _part_to_json(name) if isinstance(name, Part) else name


def _name_from_json(data: Any) -> Hashable:
    return _part_from_json(data) if isinstance(data, dict) else tuple(data)


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

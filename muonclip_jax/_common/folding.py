"""Folds equal layers into one line: in a table, `layers_{0…31}/attn/query/kernel`; in an error."""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence

_INDEX = re.compile(r"^(.*?)(\d+)$")


def fold(
    paths: Sequence[Sequence[str]], cells: Sequence[Hashable]
) -> list[tuple[tuple[str, ...], list[int]]]:
    """Groups rows that differ in nothing but the number of a path component.

    Args:
      paths: Path components of each row.
      cells: The other cells of each row.

    Returns:
      For each group, in the order of first rows: its path, with `{0…31}` for several numbers, and
      the indices of its rows.

    Example:
      >>> fold([("h_0", "w"), ("h_1", "w"), ("b",)], ["x", "x", "x"])
      [(('h_{0…1}', 'w'), [0, 1]), (('b',), [2])]
    """
    groups = [(tuple(path), [index]) for index, path in enumerate(paths)]
    depth = 0
    while depth < max((len(path) for path, _ in groups), default=0):
        groups = _fold_at(depth, groups, cells)
        depth += 1
    return groups


def fold_faults(faults: Iterable[tuple[str, str]]) -> list[str]:
    """Writes a line of an error for each fault; layers that differ only in numbers share a line.

    Args:
      faults: The path and the text of each fault. Numbers in quotes may differ too.

    Returns:
      The lines, indented, in the order of first faults.

    Example:
      >>> fold_faults([("h_0/w", "got 2."), ("h_1/w", "got 2."), ("b", "got 3.")])
      ['  h_0/w and 1 more layer: got 2.', '  b: got 3.']
    """
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for path, text in faults:
        quoted = re.sub(r"'[^']*'", lambda match: re.sub(r"\d+", "#", match[0]), text)
        groups.setdefault((re.sub(r"\d+", "#", path), quoted), []).append((path, text))
    lines = []
    for (path, text), *others in groups.values():
        more = f" and {len(others)} more layer{'s' * (len(others) > 1)}" if others else ""
        lines.append(f"  {path or '(root)'}{more}: {text}")
    return lines


def differences(
    got: Mapping[tuple[str, ...], str],
    expected: Mapping[tuple[str, ...], str],
    names: tuple[str, str],
) -> list[str]:
    """Lists where two pytrees differ, a line for each subtree that only one of them has.

    Args:
      got: What one pytree has at each path.
      expected: What the other has.
      names: The noun for what a path has, and its plural.

    Returns:
      The lines of an error, see `fold_faults`.

    Example:
      >>> differences({("w",): "(2,)", ("b",): "(3,)"}, {("w",): "(2,)"}, ("leaf", "leaves"))
      ['  b: got (3,), expected no leaf.']
    """
    trees = got, expected
    inside = [{path[:end] for path in tree for end in range(len(path))} for tree in trees]
    groups: dict[tuple[tuple[str, ...], bool, bool], list[tuple[str, ...]]] = {}
    for path in sorted({**got, **expected}, key=_by_number):
        if got.get(path) != expected.get(path):
            is_got, is_expected = path in got, path in expected
            other = inside[1] if is_got else inside[0]
            ends = (path[:end] for end in range(1, len(path) + 1) if path[:end] not in other)
            start = path if is_got == is_expected else next(ends, path)
            groups.setdefault((start, is_got, is_expected), []).append(path)
    faults = []
    for (start, *_), (path, *others) in groups.items():
        absent, many = f"no {names[0]}", f"{len(others) + 1} {names[1]}"
        shown = (many if others and path in tree else tree.get(path, absent) for tree in trees)
        faults.append(("/".join(start if others else path), "got {}, expected {}.".format(*shown)))
    return fold_faults(faults)


def _by_number(path: Sequence[str]) -> str:
    return re.sub(r"\d+", lambda match: match[0].zfill(9), "/".join(path))


def _fold_at(depth, groups, cells):
    found: dict[Hashable, list[tuple[int | None, tuple[str, ...], list[int]]]] = {}
    for path, rows in groups:
        match = _INDEX.match(path[depth]) if depth < len(path) else None
        if match is None:
            key = (path, cells[rows[0]])
            number = None
        else:
            key = ((*path[:depth], match[1], None, *path[depth + 1 :]), cells[rows[0]])
            number = int(match[2])
        found.setdefault(key, []).append((number, path, rows))
    return [_merged(depth, members) for members in found.values()]


def _merged(depth, members):
    number, path, _ = members[0]
    if len(members) == 1 or number is None:
        return path, [index for _, _, some in members for index in some]
    stem = path[depth][: len(path[depth]) - len(str(number))]
    numbers = sorted(n for n, _, _ in members)
    folded = (*path[:depth], stem + "{" + _runs(numbers) + "}", *path[depth + 1 :])
    return folded, sorted(index for _, _, some in members for index in some)


def _runs(numbers: Sequence[int]) -> str:
    """Writes numbers with `…` for runs of neighbors."""
    parts, start = [], 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            run = numbers[start:end]
            parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}…{run[-1]}")
            start = end
    return ",".join(parts)

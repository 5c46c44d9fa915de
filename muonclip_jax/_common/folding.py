"""Folds equal layers of a table into one line: `layers_{0…31}/attn/query/kernel`."""

import re
from collections.abc import Hashable, Sequence

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

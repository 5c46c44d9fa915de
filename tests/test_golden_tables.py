"""Routing tables of public models against tests/golden, where each row has its justification."""

import re
from typing import Any

import pytest

import muonclip_jax as mc
from golden_tables import FOLDER, Expected, read

TABLES = {path.stem: read(path.stem) for path in FOLDER.glob("*.txt") if path.stem != "routing"}
CALLS = [(name, {}) for name in TABLES]
CALLS += [(name, table.arguments) for name, table in TABLES.items() if table.arguments]


@pytest.mark.parametrize(("name", "arguments"), sorted(CALLS, key=str))
def test_no_parameter_of_a_public_model_is_silently_wrong(name, arguments):
    table = TABLES[name]
    routes = mc.routing_table(table.params(), **arguments)
    expected = table.expected()
    assert [row.shape for row in routes.rows] == [row.shape for row in expected]
    pairs = zip(routes.rows, expected, strict=True)
    wrong = [line for got, row in pairs if (line := _fault(got, row, routes.warnings))]
    assert not wrong, "\n".join([f"{name}: {len(wrong)} of {len(expected)} rows:", *wrong])


def _fault(got: Any, row: Expected, warnings: tuple[str, ...]) -> str:
    """Describes what is wrong with a row, or returns an empty string."""
    if row.warned and is_named(row.path, warnings):
        return ""
    sizes = (got.num_matrices, got.n_in, got.n_out)
    if got.optimizer in row.optimizers and (got.optimizer == "adamw" or sizes in row.matrices):
        return ""
    right = " or ".join([*row.optimizers, *map(str, row.matrices)])
    return f"  {row.path} {row.shape}: {got.optimizer} {sizes} ({got.reason}), right is {right}."


def is_named(path: str, warnings: tuple[str, ...]) -> bool:
    """Returns True if a warning contains the path, with any number for a number."""
    numbers = r"(\d+|\{[^}]*\}|\d+…\d+|\*)"
    pattern = numbers.join(map(re.escape, re.split(r"\d+", path)))
    return any(re.search(pattern, text) for text in warnings)

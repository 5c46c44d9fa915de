"""Routing tables of public models against tests/golden, where each row has its justification."""

import re

import pytest

import muonclip_jax as mc
from golden_tables import FOLDER, Expected, read

MODELS = sorted(path.stem for path in FOLDER.glob("*.txt") if path.stem != "routing")


@pytest.mark.parametrize("name", MODELS)
def test_no_parameter_of_a_public_model_is_silently_wrong(name):
    table = read(name)
    routes = mc.routing_table(table.params(), **table.arguments)
    expected = table.expected()
    assert [row.shape for row in routes.rows] == [row.shape for row in expected]
    pairs = zip(routes.rows, expected, strict=True)
    wrong = [line for got, row in pairs if (line := _fault(got, row, routes.warnings))]
    assert not wrong, f"{name}: {len(wrong)} of {len(expected)} rows are wrong.\n" + "\n".join(
        wrong
    )


def _fault(got: mc._routing.Route, row: Expected, warnings: tuple[str, ...]) -> str:
    """Describes what is wrong with a row, or returns an empty string."""
    if row.warned:
        return "" if is_named(row.path, warnings) else f"  {row.path}: no warning names it."
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

"""Routing tables of public models against tests/golden, where each row has its justification."""

from typing import Any

import pytest

import muonclip_jax as mc
from tests.support.golden_tables import FOLDER, Expected, read, unfolded

TABLES = {
    path.stem: read(path.stem)
    for path in sorted(FOLDER.glob("*.txt"))
    if path.stem not in ("routing", "program_attention")
}
CALLS = [(name, {}) for name in TABLES]
CALLS += [(name, table.arguments) for name, table in TABLES.items() if table.arguments]


@pytest.mark.parametrize(
    ("name", "arguments"), CALLS, ids=["-".join([name, *arguments]) for name, arguments in CALLS]
)
def test_no_parameter_of_a_public_model_is_silently_wrong(name, arguments):
    table = TABLES[name]
    routes = mc.routing_table(table.params(), **arguments)
    expected = table.expected()
    assert [row.shape for row in routes.rows] == [row.shape for row in expected]
    pairs = zip(routes.rows, expected, strict=True)
    named = named_paths(routes.warnings)
    wrong = [line for got, row in pairs if (line := _fault(got, row, named))]
    assert not wrong, "\n".join([f"{name}: {len(wrong)} of {len(expected)} rows:", *wrong])


def test_a_wrong_row_is_found():
    table = TABLES["maxtext_llama3"]
    routes = mc.routing_table(table.params(), overrides={"*/mlp/wo/kernel": None})
    pairs = zip(routes.rows, table.expected(), strict=True)
    (line,) = [line for got, row in pairs if (line := _fault(got, row, set()))]
    assert "decoder/layers/mlp/wo/kernel (14336, 3, 4096): adamw" in line
    assert "right is muon or (3, 14336, 4096)" in line


def test_tables_name_their_source():
    for name, table in TABLES.items():
        text = (FOLDER / f"{name}.txt").read_text()
        assert "\n# source: " in text, name
        assert "\n# shapes: " in text, name
        paths = [row.path for row in table.rows]
        assert len(paths) == len(set(paths)), name


def _fault(got: Any, row: Expected, named: set[str]) -> str:
    """Describes what is wrong with a row, or returns an empty string."""
    sizes = (got.num_matrices, got.n_in, got.n_out)
    if got.optimizer in row.optimizers and (got.optimizer == "adamw" or sizes in row.matrices):
        return ""
    if row.warned and got.path in named:
        return ""
    right = " or ".join([*row.optimizers, *map(str, row.matrices)])
    return f"  {row.path} {row.shape}: {got.optimizer} {sizes} ({got.reason}), right is {right}."


def named_paths(warnings: tuple[str, ...]) -> set[str]:
    """Returns the paths that warnings name, equal layers `{0…3,5}` expanded."""
    return {path for text in warnings for path in unfolded(text.split(" (")[0])}

"""docs/faults.md: every promise has a test, and every test that is named is there and runs."""

import ast
import functools
import pathlib
import re

import pytest

TESTS = pathlib.Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "faults.md").read_text()
HEAD = "| what goes wrong | what happens | test |"
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def rows():
    """Cells of all rows of all tables, without their heads."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines if line != HEAD and "---" not in line]


@functools.cache
def collected(file):
    """Names of the tests of a file, without those that are skipped whatever comes."""
    (path,) = TESTS.glob(f"*/{file}")
    tree = ast.parse(path.read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    marks = {f.name: [ast.unparse(d) for d in f.decorator_list] for f in functions}
    never = ("pytest.mark.skip", "pytest.mark.xfail", "pytest.fixture")
    return {
        name
        for name, found in marks.items()
        if not any(re.match(rf"{n}\b", m) for n in never for m in found)
    }


def test_every_table_has_the_same_columns():
    heads = re.findall(r"^(\|.*\|)\n\|---", PAGE, re.MULTILINE)
    assert set(heads) == {HEAD}
    assert len(rows()) > 50
    for cells in rows():
        assert len(cells) == 3, cells
        assert all(cell.strip() for cell in cells), cells


@pytest.mark.parametrize("cells", rows(), ids=lambda cells: cells[0][:60])
def test_every_promise_has_a_test(cells):
    named = NAMED.findall(cells[-1])
    assert named
    assert NAMED.sub("", cells[-1]).strip(", ") == ""
    for file, name in named:
        assert name in collected(file), f"{file}::{name}"


def test_no_promise_stands_twice():
    said = [tuple(cells[:2]) for cells in rows()]
    assert len(set(said)) == len(said)

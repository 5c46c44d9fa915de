"""docs/faults.md: every promise has a test, and every test that is named is there and runs."""

import ast
import functools
import pathlib
import re

TESTS = pathlib.Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "faults.md").read_text()
HEAD = re.compile(r"^(\|.*\|)\n\|---", re.MULTILINE)
NAMED = re.compile(r"(test_\w+\.py)::(test_\w+)")
COMMENT = re.compile(r" <!-- (.*?) -->$")  # the tests of a row, which readers do not see


def rows():
    """Both cells of all rows of all tables, without their heads, and the comment of each row."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    left_out = HEAD.findall(PAGE)
    lines = [line for line in lines if line not in left_out and not line.startswith("|---")]
    return [_cells(line.strip("| ")) for line in lines]


def _cells(row):
    comment = COMMENT.search(row)
    return [*COMMENT.sub("", row).split(" | "), comment[1] if comment else ""]


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
    assert len(set(HEAD.findall(PAGE))) == 1
    assert len(rows()) > 50
    for cells in rows():
        assert len(cells) == 3, cells
        assert all(cell.strip() for cell in cells[:2]), cells


def test_every_promise_has_a_test():
    faults = []
    for cells in rows():
        named = NAMED.findall(cells[-1])
        if not named or NAMED.sub("", cells[-1]).strip(", "):
            faults.append(f"{cells[0]}: names no test, or something else")
        absent = [f"{file}::{name}" for file, name in named if name not in collected(file)]
        faults += [f"{cells[0]}: there is no {test}" for test in absent]
    assert faults == []


def test_no_promise_stands_twice():
    said = [tuple(cells[:2]) for cells in rows()]
    assert len(set(said)) == len(said)

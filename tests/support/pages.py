"""The pages of docs/: their blocks of Python run, their tables are read."""

import contextlib
import functools
import importlib.util
import io
import itertools
import json
import pathlib
import re
from typing import Any

import pytest

from tests.support.strict import HAS_CAPTURE, NEEDS_CAPTURE

ROOT = pathlib.Path(__file__).parents[2]
# Packages that no test depends on, with their names in code: a block that uses one that is missing
# is skipped.
OPTIONAL = {"equinox": "eqx", "haiku": "hk"}
# A block of Python, and the plain block right after it: what it prints.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


@functools.cache
def run_page(name: str) -> dict[str, Any]:
    """Names that a page's blocks define, run one after the other."""
    namespace: dict[str, Any] = {"__name__": name}
    text = (ROOT / "docs" / name).read_text()
    blocks = BLOCK.findall(text)
    if not HAS_CAPTURE and any("nnx.capture" in source for source, _ in blocks):
        pytest.skip(NEEDS_CAPTURE)
    missing = [alias for name, alias in OPTIONAL.items() if importlib.util.find_spec(name) is None]
    for source, shown in blocks:
        if any(re.search(rf"\b{alias}\.", source) for alias in missing):
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, name, "exec"), namespace)
        assert printed.getvalue() == shown
    return namespace


def numbers(page: str) -> dict[str, str]:
    """The numbers that a page marks, as they stand there: `8.9<!-- name -->`, by name."""
    text = (ROOT / page).read_text()
    return {name: number for number, name in re.findall(r"((?:\S+ ± )?\S+?)<!-- (\w+) -->", text)}


def result(name: str) -> dict[str, Any]:
    """The committed result of a benchmark."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table(page: str, name: str, folder: str = "docs") -> list[list[str]]:
    """Cells of the table below `<!-- table: name -->`, without its first line and the rule."""
    lines = (ROOT / folder / page).read_text().splitlines()
    start = lines.index(f"<!-- table: {name} -->") + 3
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]

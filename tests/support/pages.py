"""The pages of docs/: their blocks of Python run, their tables are read."""

import contextlib
import functools
import io
import pathlib
import re
from typing import Any

import pytest

from tests.support.strict import HAS_CAPTURE, NEEDS_CAPTURE

ROOT = pathlib.Path(__file__).parents[2]
# A block of Python, and the plain block right after it: what it prints.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


@functools.cache
def run_page(name: str) -> dict[str, Any]:
    """Names that a page's blocks define, run one after the other."""
    namespace: dict[str, Any] = {"__name__": name}
    text = (ROOT / "docs" / name).read_text()
    if "nnx.capture" in text and not HAS_CAPTURE:
        pytest.skip(NEEDS_CAPTURE)
    for source, shown in BLOCK.findall(text):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, name, "exec"), namespace)
        assert printed.getvalue() == shown
    return namespace


def table(page, head):
    """Cells of the table whose first line begins with `head`, without that line and the rule."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(head))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows

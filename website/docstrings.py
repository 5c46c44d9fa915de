"""Docstrings and signatures for Sphinx, which reads reStructuredText and expands type aliases."""

import ast
import inspect
import itertools
import re
import textwrap
from typing import Any

_CODE = re.compile(r"(`[^`]*`)")  # over several lines too
_SIGNS = re.compile(r"([*|]|(?<=\w)_(?!\w))")  # which reStructuredText reads as markup


def setup(app: Any) -> None:
    """Translates before Napoleon reads the sections; leaves fields of named tuples out."""
    app.connect("autodoc-process-docstring", _translate, priority=100)
    app.connect("autodoc-process-signature", _as_written)
    app.connect("autodoc-skip-member", _is_left_out)


def _translate(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = translated(lines)


def _is_left_out(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """The section Attributes describes the fields of a named tuple."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def _as_written(
    app: Any, what: str, name: str, obj: Any, options: Any, arguments: str, result: str
) -> tuple[str, str | None] | None:
    """Shows the types of a function as its source has them, `optax.ScalarOrSchedule`."""
    if what != "function":
        return None
    function = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))).body[0]
    assert isinstance(function, ast.FunctionDef)
    returns = ast.unparse(function.returns) if function.returns else None
    return f"({ast.unparse(function.args)})", returns


def translated(lines: list[str]) -> list[str]:
    """Translates the lines of a docstring: tables, and signs that are markup only for Sphinx."""
    result: list[str] = []
    for is_example, block in itertools.groupby(_marked(lines), key=lambda pair: pair[0]):
        text = "\n".join(line for _, line in block)
        result += (text if is_example else _tables(_escaped(text))).split("\n")
    return result


def _marked(lines: list[str]) -> list[tuple[bool, str]]:
    """Each line, and whether it is code: of an example, or of a block between fences."""
    marked: list[tuple[bool, str]] = []
    example = fenced = False
    for line in lines:
        text = line.lstrip()
        if text.startswith("```"):
            fenced = not fenced
            start = line[: len(line) - len(text)] + ".. code-block:: python"
            marked += [(True, start), (True, "")] if fenced else [(True, "")]
            continue
        example = text.startswith(">>>") or (example and bool(text))
        marked.append((example or fenced, f"   {line}" if fenced else line))
    return marked


def _escaped(text: str) -> str:
    parts = _CODE.split(text)
    text = "".join(p if p.startswith("`") else _SIGNS.sub(r"\\\1", p) for p in parts)
    text = re.sub(r"`mc\.(\w+)`", r"`mc.\1 <muonclip_jax.\1>`", text)
    return re.sub(r"(`[^`]*[^`\s]`)(?=\w)", r"\1\\ ", text)


def _tables(text: str) -> str:
    return re.sub(r"(?:^ *\\\| .*\n?)(?:^ *\\\|.*\n?)+", _table, text, flags=re.MULTILINE)


def _table(match: re.Match[str]) -> str:
    lines = match[0].rstrip("\n").split("\n")
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    rows = [f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
    for line in lines[:1] + lines[2:]:
        first, *others = (cell.strip() for cell in line.strip().strip("\\|").split("\\|"))
        rows += [f"{indent}   * - {first}", *(f"{indent}     - {cell}" for cell in others)]
    return "\n".join(rows) + "\n"

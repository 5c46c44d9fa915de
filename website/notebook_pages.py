"""Notebooks as pages: their text, code and committed outputs. Nothing is executed."""

import base64
import json
import pathlib
from typing import Any

_SETUP = "importlib.util.find_spec"


def notebook_page(path: pathlib.Path) -> tuple[str, dict[str, bytes]]:
    """Writes a notebook as Markdown.

    Args:
      path: The `.ipynb`.

    Returns:
      Markdown, and the pictures by file name, to be placed in the folder `<name>/` beside the page.
    """
    cells = json.loads(path.read_text())["cells"]
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for number, cell in enumerate(cells):
        source = _text(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif _SETUP in source:
            parts.append(_folded("Install, in Colab", _fence(source, "python")))
        else:
            parts.append(_fence(source, "python"))
        for output in cell.get("outputs", ()):
            parts.append(_output(output, f"{path.stem}/cell-{number}.png", pictures))
    return "\n\n".join(part for part in parts if part) + "\n", pictures


def _output(output: dict[str, Any], name: str, pictures: dict[str, bytes]) -> str:
    if output["output_type"] == "stream":
        return _fence(_text(output["text"]), "text")
    data = output.get("data", {})
    if "image/png" in data:
        pictures[name] = base64.b64decode(data["image/png"])
        return f"![The plot that the cell above draws]({name})"
    return _fence(_text(data.get("text/plain", "")), "text")


def _text(lines: str | list[str]) -> str:
    return "".join(lines)


def _fence(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```" if text.strip() else ""


def _folded(title: str, block: str) -> str:
    return f'??? note "{title}"\n\n' + "\n".join(f"    {line}" for line in block.splitlines())

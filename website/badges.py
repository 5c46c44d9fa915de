"""Writes the badge that opens a notebook in Colab into each notebook: `python -m website.badges`.

Run it once after the address of the repository has been set in `pyproject.toml`.
"""

import json
import re

from website.repository import ROOT, address, colab_badge

_BADGE = re.compile(r"^\[!\[Open In Colab\]\S*\n+")
NOTEBOOKS = ROOT / "notebooks"


def with_badge(text: str, name: str) -> str:
    """Puts the badge above the first cell's text, in place of one that is there."""
    text, badge = _BADGE.sub("", text), colab_badge(name, address())
    return f"{badge}\n\n{text}" if badge else text


def write(name: str) -> None:
    """Writes the badge of one notebook, into its `.ipynb` and its `.py`.

    Args:
      name: Of the notebook, without `.ipynb`.
    """
    path = NOTEBOOKS / f"{name}.ipynb"
    notebook = json.loads(path.read_text())
    first = notebook["cells"][0]
    text = with_badge("".join(first["source"]), name)
    first["source"] = text.splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    script = path.with_suffix(".py")
    start, _, code = script.read_text().partition("\n\n")
    cell = "\n".join(f"# {line}".rstrip() for line in text.splitlines())
    assert start.startswith("# %% [markdown]\n"), script
    script.write_text(f"# %% [markdown]\n{cell}\n\n{code}")


if __name__ == "__main__":
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        write(notebook.stem)

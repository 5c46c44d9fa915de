"""Parameters of many kinds of models, a line for each: path, shape, what is right.

Each file has models of one kind: a comment with their source, `[name]`, and the parameters. `A` is
AdamW and `2x8x16` two matrices of 8 inputs and 16 outputs; a `W` behind it allows a warning and any
optimizer. Names and shapes are from the public code in the comment.
"""

import pathlib
import re


def _read(path: pathlib.Path) -> dict[str, str]:
    """Reads the lines of each model of one file."""
    text = re.sub(r"(?m)^#.*\n", "", path.read_text())
    parts = re.split(r"(?m)^\[(\w+)\]\n", text)
    return {name: lines.strip() for name, lines in zip(parts[1::2], parts[2::2], strict=True)}


_FILES = sorted(pathlib.Path(__file__).parent.glob("*.txt"))
MODELS: dict[str, str] = {name: lines for path in _FILES for name, lines in _read(path).items()}

"""Executes the notebooks and commits what they print and draw to the `.ipynb` beside each `.py`.

    python notebooks/refresh.py [name ...]

Edit the `.py`, then run this. Pictures get a palette, a quarter of their size; times and versions
of the run are left out, so that a notebook that has not changed does not differ.
"""

import base64
import io
import pathlib
import sys

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = pathlib.Path(__file__).parent
SECONDS = 120  # a cell may take
COLOURS = 256  # of a picture
METADATA = {
    "jupytext": {
        "cell_metadata_filter": "-all",
        "formats": "ipynb,py:percent",
        "notebook_metadata_filter": "-all",
    },
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
}


def refresh(path: pathlib.Path) -> None:
    """Executes one notebook.

    Args:
      path: The `.py`.
    """
    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    NotebookClient(notebook, timeout=SECONDS, record_timing=False).execute(cwd=str(FOLDER))
    notebook.metadata = nbformat.from_dict(METADATA)  # the kernel has added its version
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i:02}", nbformat.from_dict({})
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = shrink(output.data["image/png"])
    nbformat.write(notebook, path.with_suffix(".ipynb"))


def shrink(png: str) -> str:
    """Gives a picture a palette.

    Args:
      png: Base64, as notebooks have it.

    Returns:
      The same.
    """
    picture, small = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    picture.convert("RGB").quantize(COLOURS).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        refresh(FOLDER / f"{name}.py")

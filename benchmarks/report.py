"""Reports of all benchmarks: command, versions, machine and date; JSON files and tables."""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Iterable, Sequence
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"


def provenance(module: str, *packages: str, machine: str = "cpu") -> dict[str, Any]:
    """Returns the fields at the head of a result.

    Args:
      module: Name of the module in `benchmarks`.
      *packages: Installed packages whose versions the result depends on, besides jax and jaxlib.
      machine: Backend, or the use that is made of the machine.

    Returns:
      `command`, `date`, `versions`, `machine`, and `load_before`: the number of programs that ran
      on average during the last minute, at best 0.
    """
    names = ("muonclip-jax", "jax", "jaxlib", *packages)
    return {
        "command": f"python -m benchmarks.{module}",
        "date": datetime.date.today().isoformat(),
        "versions": versions(*names),
        "machine": f"{os.cpu_count()} {platform.machine()} cores, {machine}",
        "load_before": os.getloadavg()[0],
    }


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of Python and of installed packages."""
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version()} | found


def rounded(value: Any, digits: int = 4) -> Any:
    """Rounds every float in a nest of dictionaries and lists; whole numbers become integers."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(f"{value:.{digits}g}")
    return value


def write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file completely, or leaves the old one."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content)
    beside.replace(path)


def write_json(
    path: pathlib.Path, results: dict[str, Any], per_line: str | None = None, indent: int = 2
) -> None:
    """Writes results as JSON.

    Args:
      path: The file.
      results: The results.
      per_line: Key of a list whose items are written one per line. It comes last.
      indent: Spaces per level.
    """
    rows = results[per_line] if per_line else []
    head = {key: value for key, value in results.items() if key != per_line}
    text = json.dumps(head, indent=indent, ensure_ascii=False)
    if per_line:
        compact = functools.partial(json.dumps, ensure_ascii=False, separators=(",", ":"))
        lines = ",\n".join(2 * indent * " " + compact(row) for row in rows)
        pad = indent * " "
        text = f'{text[:-2]},\n{pad}"{per_line}": [\n{lines}\n{pad}]\n}}'
    write(path, f"{text}\n".encode())


def columns(rows: Iterable[Iterable[Any]]) -> str:
    """Aligns cells to the right, in columns."""
    table = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    pad = "{:>{}}".format
    return "\n".join(" ".join(map(pad, cells, widths)) for cells in table)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Writes a Markdown table."""
    first, *others = (f"| {' | '.join(line)} |" for line in (head, *rows))
    return "\n".join([first, "|" + "---|" * len(head), *others])


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """Makes the parser of a benchmark, with `--out`, the folder of its results."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=description)
    made.add_argument("--out", type=pathlib.Path, default=RESULTS, help=f"folder of {module}.json")
    return made

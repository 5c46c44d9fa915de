"""The files of a run folder: their names, and how they are written and read."""

import json
import os
import pathlib
from typing import Any

SETTINGS, METRICS, SUMMARY, CHECKPOINTS = "run.json", "metrics.jsonl", "summary.json", "checkpoints"
LOG_EACH_UNTIL = 1_000  # steps
LOG_EVERY = 10  # after that; a step that is not logged does not wait for the device


def is_logged(step: int) -> bool:
    """Returns whether a step has a line in the metrics; steps count from 1."""
    return step <= LOG_EACH_UNTIL or step % LOG_EVERY == 0


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Writes a file to a temporary name and then renames it, so that it is complete or absent."""
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk must not keep half a file
        raise


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes one JSON object, atomically; raises on NaN and infinity, which JSON does not have."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def read_metrics(run: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the logged steps in order; skips a last line that a kill has left incomplete."""
    path = run / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def truncate_metrics(run: pathlib.Path, step: int) -> None:
    """Drops the lines after a step, and an incomplete one: a resumed run writes them again."""
    kept = [line for line in read_metrics(run) if line["step"] <= step]
    write_atomically(run / METRICS, b"".join(metrics_line(line) for line in kept))


def metrics_line(metrics: dict[str, Any]) -> bytes:
    """Formats the metrics of one step; floats keep every bit, as JSON has Python's `repr`."""
    return (json.dumps(metrics, allow_nan=False) + "\n").encode()

"""Programs for TPU slices that are not attached, compiled in a process of its own."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def results_of(worker, *arguments, limit=900):
    """Runs the text of a program, which prints `RESULTS` and JSON; returns what the JSON holds.

    libtpu must be loaded before JAX is first used, hence the process.
    """
    done = subprocess.run(
        [sys.executable, "-c", worker, *arguments],
        cwd=ROOT,
        timeout=limit,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (x for x in done.stdout.splitlines() if x.startswith("RESULTS"))
    return json.loads(line.removeprefix("RESULTS"))

"""Runs the tests on a copy of the repository with one fault: `python -m tests.mutants [WORD...]`.

Words choose mutants by their file or text. Exits with 1 if a mutant survives.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from tests.mutants.table import ROOT, Mutant, mutants

LIMIT = 1800  # seconds for one mutant
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "results", "*.ipynb", "__pycache__")
# What pytest exits with if a test fails, if the run stops, and if collection fails.
FAILED = (1, 2)


def killed(mutant: Mutant, folder: pathlib.Path) -> bool:
    """Runs the tests of a mutant until one fails: first the named ones, then their folder."""
    file = folder / mutant.file
    original = file.read_text()
    file.write_text(mutant.apply(original))
    try:
        return any(_fails(tests, folder) for tests in (mutant.tests, [mutant.folder]) if tests)
    finally:
        file.write_text(original)


def _fails(tests: list[str], folder: pathlib.Path) -> bool:
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "PYTHONPATH": str(folder),
    }
    run = subprocess.run(
        command,
        cwd=folder,
        env=environment | os.environ,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    if run.returncode not in (0, *FAILED):
        raise RuntimeError(f"pytest exited with {run.returncode}:\n{run.stdout}{run.stderr}")
    return run.returncode in FAILED


def main(words: list[str]) -> int:
    """Prints one line for each mutant, and the number of survivors."""
    chosen = [m for m in mutants() if not words or any(word in str(m) for word in words)]
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "repository"
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
        for mutant in chosen:
            start = time.monotonic()
            dead = killed(mutant, folder)
            survivors += not dead
            result = "killed" if dead else "SURVIVED"
            print(f"{result:8} {time.monotonic() - start:6.1f} s  {mutant}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Runs the tests on a copy of the repository with one fault: `python -m tests.mutants [WORD...]`.

Words choose mutants by their file or text. Exits with 1 if a mutant survives.
"""

from tests.support import environment  # isort: skip  # noqa: F401  (before JAX)

import os
import pathlib
import shutil
import sys
import tempfile
import time
import traceback

# Imported once, by all tests; a fork for each mutant then imports the package and its tests alone.
import chex  # noqa: F401
import flax.nnx  # noqa: F401
import optax.contrib  # noqa: F401
import pytest

from tests.mutants.table import ROOT, Mutant, mutants

LEFT_OUT = shutil.ignore_patterns(".*", "runs", "*.ipynb", "__pycache__")


def is_killed(mutant: Mutant, folder: pathlib.Path) -> bool:
    """Runs the tests of a mutant until one fails: first the named ones, then their folder."""
    file = folder / mutant.file
    original = file.read_text()
    file.write_text(mutant.apply(original))
    try:
        return any(_fails(tests, folder) for tests in (mutant.tests, [mutant.folder]) if tests)
    finally:
        file.write_text(original)


def _fails(tests: list[str], folder: pathlib.Path) -> bool:
    log = folder / "log"
    process = os.fork()
    if process == 0:
        code = pytest.ExitCode.INTERNAL_ERROR
        try:
            code = _run(tests, folder, log)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # nothing of this process may clean up what belongs to its parent
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest exited with {code}:\n{log.read_text()}")
    return code == pytest.ExitCode.TESTS_FAILED


def _run(tests: list[str], folder: pathlib.Path, log: pathlib.Path) -> int:
    """Runs the tests in this process; returns the exit code of pytest."""
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(folder)
    sys.dont_write_bytecode = True
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests]))


def main(words: list[str]) -> int:
    """Prints one line for each mutant, and the number of survivors."""
    chosen = [m for m in mutants() if not words or any(word in str(m) for word in words)]
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "repository"
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
        # Without a fault all of them pass: a test that fails for another reason detects nothing.
        if _fails(sorted({test for m in chosen for test in (*m.tests, m.folder)}), folder):
            raise RuntimeError(f"a test fails without a fault:\n{(folder / 'log').read_text()}")
        for mutant in chosen:
            start = time.monotonic()
            is_dead = is_killed(mutant, folder)
            survivors += not is_dead
            result = "killed" if is_dead else "SURVIVED"
            print(f"{result:8} {time.monotonic() - start:6.1f} s  {mutant}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The training program as a process of its own, started from any folder."""

import os
import pathlib
import sys

from tests.support.strict import STRICT

ROOT = pathlib.Path(__file__).parents[2]
MODULE = ["-m", "examples.language_model"]
COMMAND = [sys.executable, *STRICT, *MODULE]


def environment(*first, **changes):
    """The environment in which Python finds the program, after the folders `first`."""
    path = os.pathsep.join(map(str, (*first, ROOT)))
    return os.environ | {"PYTHONPATH": path} | changes

"""Depends on the installed versions: the flags of a strict Python, and features of Flax."""

import importlib.metadata
import re

import pytest


def installed(package: str) -> tuple[int, ...]:
    """Returns the version of a package, such as (0, 12, 6)."""
    return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version(package))[:3])


# Every warning is an error, as pytest has it for the tests.
STRICT = ["-W", "error", "-W", "ignore:Error reading persistent compilation cache entry"]
if installed("flax") <= (0, 12, 6):  # they use what jax 0.10 moved
    STRICT += ["-W", "ignore:jax.core.:DeprecationWarning"]

HAS_CAPTURE = installed("flax") >= (0, 12, 6)
NEEDS_CAPTURE = "nnx.capture needs Flax 0.12.6"
needs_jax_0_10 = pytest.mark.skipif(installed("jax") < (0, 10), reason="needs jax 0.10")
needs_capture = pytest.mark.skipif(not HAS_CAPTURE, reason=NEEDS_CAPTURE)

"""Parsers of flag values, for argparse."""

import argparse
import math
import pathlib
import re
from collections.abc import Callable

MESH_AXES = ("data", "fsdp", "tensor", "expert")
LARGEST_INTEGER = 2**31 - 1  # optimizers count steps in int32
LARGEST_SEED = 2**32 - 1  # NumPy and JAX both accept every seed up to here


def integer(least: int, most: int = LARGEST_INTEGER) -> Callable[[str], int]:
    """Returns a parser of integers from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected an integer from {least} to {most}"
            )
        return value

    return parse


def positive(text: str) -> float:
    """Parses a finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a finite number above 0")
    return value


def path(text: str) -> pathlib.Path:
    """Parses a path; the empty string would silently mean the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("got an empty path, expected the name of a file or folder")
    return pathlib.Path(text)


def mesh(text: str) -> dict[str, int]:
    """Parses the sizes of mesh axes such as data=2,fsdp=-1; -1 is the rest."""
    pairs = [part.partition("=") for part in text.split(",")]
    sizes = {name: size for name, _, size in pairs}
    known = len(sizes) == len(pairs) and sizes.keys() <= set(MESH_AXES)
    if not (known and all(re.fullmatch("-1|[1-9][0-9]{0,8}", size) for size in sizes.values())):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected axes among {', '.join(MESH_AXES)}, each once with its size or"
            " -1 for all remaining devices, such as data=2,fsdp=-1"
        )
    if list(sizes.values()).count("-1") > 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected -1 for one axis at most")
    return {name: int(size) for name, size in sizes.items()}


def cluster(text: str) -> tuple[str, int, int]:
    """Parses HOST:PORT,PROCESSES,RANK."""
    found = re.fullmatch(r"([^,]+:[0-9]+),([0-9]{1,6}),([0-9]{1,6})", text)
    if found and int(found[3]) < int(found[2]):
        return found[1], int(found[2]), int(found[3])
    raise argparse.ArgumentTypeError(
        f"got {text!r}, expected no value, or HOST:PORT,PROCESSES,RANK: the address of process 0,"
        " the number of processes, and the rank of this one, from 0"
    )

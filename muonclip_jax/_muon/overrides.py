"""`overrides=`: the user's decision for parameters whose paths match a pattern."""

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

from optax.contrib import MuonDimensionNumbers

from muonclip_jax._common.settings import Rule, shown
from muonclip_jax._muon.family.sinkhorn import Sinkhorn
from muonclip_jax._muon.roles.decision import Overrides


def _rule(value: Any) -> Exception | None:
    """Returns what is wrong with `overrides`, None if nothing is."""
    expected = "a mapping of path patterns to MuonDimensionNumbers, Sinkhorn or None (AdamW)"
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return TypeError(f"{expected}, got {shown(value)}")
    bad = [
        f"{pattern!r}: {numbers!r}"
        for pattern, numbers in value.items()
        if not isinstance(pattern, str)
        or not isinstance(numbers, MuonDimensionNumbers | Sinkhorn | None)
    ]
    if bad:
        return TypeError(
            f"{expected}, got {', '.join(bad)}. Example: overrides="
            '{"*/gate/kernel": None, "*/qkv/kernel": MuonDimensionNumbers(-4, (-2, -1))}'
        )
    return None


# The rules of settings of roles, beside the rules of `_common.settings`.
ROLE_RULES: dict[str, Rule] = {"overrides": _rule}


def _may_match(pattern: str, path: str) -> bool:
    """Returns whether a pattern matches a path or may match one below it."""
    if fnmatch.fnmatchcase(path, pattern):
        return True
    names, parts = path.split("/"), pattern.split("/")
    pairs = zip(names, parts, strict=False)
    return parts[0].startswith("*") or (
        len(parts) > len(names) and all(fnmatch.fnmatchcase(name, part) for name, part in pairs)
    )


def matched(
    caller: str, overrides: Overrides | None, paths: Sequence[str], hidden: Sequence[str] = ()
) -> dict[int, tuple[str, MuonDimensionNumbers | Sinkhorn | None]]:
    """Finds which parameters have an override; of several patterns, the last one counts.

    Args:
      caller: Name of the public function that was called.
      overrides: See `muon`; checked.
      paths: Path of each parameter, components joined by slashes.
      hidden: Paths at and below which another optimizer has the leaves. A pattern may match these.

    Returns:
      The pattern and its value for each index in `paths` that a pattern matches.

    Raises:
      ValueError: if a pattern matches no path.

    Example:
      >>> matched("muon", {"*/gate": None}, ["mlp/up", "mlp/gate"])
      {1: ('*/gate', None)}
    """
    found: dict[int, tuple[str, MuonDimensionNumbers | Sinkhorn | None]] = {}
    faults = []
    for pattern, value in (overrides or {}).items():
        match = re.compile(fnmatch.translate(pattern)).match
        indices = [index for index, path in enumerate(paths) if match(path)]
        found.update(dict.fromkeys(indices, (pattern, value)))
        if not indices and not any(_may_match(pattern, path) for path in hidden):
            nearest = difflib.get_close_matches(pattern, [*paths, *hidden], 1, 0.0)
            faults.append(f"  {pattern!r}" + (f": nearest is {nearest[0]!r}." if nearest else "."))
    if faults:
        raise ValueError(
            f"{caller}: {len(faults)} of {len(overrides or ())} overrides match no parameter.\n"
            + "\n".join(faults)
            + "\nPatterns have the syntax of `fnmatch` and match full paths; "
            "`routing_table` prints the paths."
        )
    return found

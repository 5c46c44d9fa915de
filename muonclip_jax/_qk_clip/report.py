"""The report of a clip as text. `info` is a `QKClipInfo`, whose module imports this one."""

from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np

from muonclip_jax._common.paths import aligned

_HEAD = ("module", "largest logit", "smallest gamma", "clipped")


class _Heads(NamedTuple):
    """Numbers of the heads of one module: max logits, factors, and whether each was clipped."""

    max_logits: np.ndarray
    gamma: np.ndarray
    clipped: np.ndarray


def is_concrete(info: Any) -> bool:
    """Returns whether this process has all numbers of a report: not while tracing, for example."""
    return all(_is_concrete(x) for x in jax.tree.leaves(info))


def _is_concrete(x: Any) -> bool:
    if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def describe(info: Any) -> str:
    """Writes a report: a line for the model, then modules, the largest logit first.

    Args:
      info: A concrete report, of one step or of several that a scan stacked.

    Returns:
      Several lines.
    """
    steps = tuple(range(np.ndim(info.max_logit)))
    heads = {path: _over_steps(info, path, steps) for path in info.gamma}
    clipped = sum(int(x.clipped.sum()) for x in heads.values())
    count = sum(x.clipped.size for x in heads.values())
    over = f" over {np.size(info.max_logit)} steps" if steps else ""
    largest = np.max(info.max_logit, initial=-np.inf)
    lines = [f"largest logit {largest:.4g}{over}; {clipped} of {count} heads clipped"]
    lines += [f"{name} {number}" for name, number in _to_watch(info) if number]
    rows = [_row(path, x) for path, x in sorted(heads.items(), key=lambda item: _rank(item[1]))]
    return "\n".join([*lines, aligned([_HEAD, *rows])] if rows else lines)


def _row(path: str, heads: _Heads) -> tuple[str, ...]:
    largest, smallest = heads.max_logits.max(initial=-np.inf), heads.gamma.min(initial=1)
    clipped = f"{heads.clipped.sum()} of {heads.clipped.size}"
    return path or "(root)", f"{largest:.4g}", f"{smallest:.4g}", clipped


def _over_steps(info: Any, path: str, steps: tuple[int, ...]) -> _Heads:
    s, gamma = np.asarray(info.max_logits[path]), np.asarray(info.gamma[path])
    return _Heads(
        s.max(axis=steps, initial=-np.inf),
        gamma.min(axis=steps, initial=1),
        np.asarray(np.any(gamma < 1, axis=steps)),
    )


def _rank(heads: _Heads) -> tuple[bool, float]:
    """Modules with NaN first, then those with the largest logits."""
    largest = float(heads.max_logits.max(initial=-np.inf))
    return (not np.isnan(largest), -largest)


def _to_watch(info: Any) -> list[tuple[str, int]]:
    """Counts that are above 0 only if something needs attention."""
    counts = {
        "heads with NaN or inf:": info.nonfinite_heads,
        "modules skipped:": info.skipped_modules,
        "modules with an upper bound of the logits:": info.bound_modules,
        "heads clipped before and above the threshold again:": info.stuck_heads,
    }
    return [(name, int(np.max(x, initial=0))) for name, x in counts.items() if x is not None]

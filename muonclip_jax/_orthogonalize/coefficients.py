"""Coefficients of the Newton-Schulz polynomials, each with its source.

One step maps every singular value s of a matrix to p(s) = a s + b s³ + c s⁵; a preset is a tuple of
`(a, b, c)` rows, one a step.
"""

import functools
import reprlib
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from muonclip_jax._common.types import Row

# A preset's name; several rows (a, b, c), one a step; or one row for every step. Lists and concrete
# arrays do as well as tuples.
Coefficients: TypeAlias = str | Sequence[float] | Sequence[Sequence[float]] | ArrayLike

_T = TypeVar("_T")

# Keller Jordan's post uses five steps, and so does optax.
DEFAULT_STEPS = 5

# Jordan et al. 2024, post "Muon"; KellerJordan/Muon, muon.py,
# zeropower_via_newtonschulz5; unchanged.
JORDAN: Row = (3.4445, -4.7750, 2.0315)

# You Jiacheng 2025; optax/contrib/_muon.py, _DION_NS_COEFFS; NVIDIA-NeMo/Emerging-Optimizers,
# muon_utils.py, "quintic"; unchanged.
_YOU = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# Amsel et al. 2025, arXiv 2505.16932, the optimal composition for a lower bound of 1e-3 with
# cushion 0.02407327424182761, before its safety factor.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)

# Dao-AILab/gram-newton-schulz. The paper's 1.01 lets five steps reach 2e88 at 1.02, where a rounded
# norm can put a singular value; 1.05 stays finite up to 1.05, for 804 instead of 976 of slope at 0.
_SAFETY = 1.05

# Grishina et al. 2025, arXiv 2506.10935; rows as in Emerging-Optimizers, muon_utils.py; unchanged.
_CANS = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)

# DeepSeek-V4, arXiv 2606.19348, section 2.4: eight steps of Jordan's row, then two that
# settle at 1.
_DEEPSEEK_V4 = (JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2

# arXiv 2606.00371: cubic steps, c = 0.
_CUBIC5 = (
    (3.3656576, -3.3420992, 0.0),
    (2.5744352, -1.4957376, 0.0),
    (2.5368962, -1.4312570, 0.0),
    (2.4418906, -1.2764040, 0.0),
    (2.2230472, -0.9630650, 0.0),
)


def with_safety(rows: Sequence[Row], safety: float) -> tuple[Row, ...]:
    """Makes every step p(s / safety): values up to `safety` above its range are still in it."""
    return tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in rows)


# What 16-bit rounding adds to a singular value, at most, in the spectra that
# tests/orthogonalize/test_newton_schulz.py tries.
_ROUNDING = 1.01


# The singular values each preset returns are held by tests/orthogonalize/test_published_numbers.py.
_PRESETS: dict[str, tuple[Row, ...]] = {
    "jordan": (JORDAN,) * DEFAULT_STEPS,
    "standard": (JORDAN,) * DEFAULT_STEPS,  # optax's name
    "you": _YOU,
    "dion": _YOU,  # optax's name
    "polar_express": with_safety(_POLAR_EXPRESS[:5], _SAFETY),
    "polar_express_6": with_safety(_POLAR_EXPRESS, _SAFETY),
    "cans": _CANS,
    "deepseek_v4": _DEEPSEEK_V4,
    "cubic5": _CUBIC5,
}

# The expected coefficients, in error messages.
EXPECTED = (
    f"a preset's name ({', '.join(map(repr, _PRESETS))}), a row (a, b, c) or several rows of "
    "finite numbers"
)


def ns_coefficients(name: str, steps: int | None = None) -> tuple[Row, ...]:
    """Looks up the `(a, b, c)` rows of a preset, one row for each Newton-Schulz step.

    Singular values that come out, in exact arithmetic, for those that go in at 3e-3 .. 1 of the
    matrix's norm:

    | preset | steps | out |
    |---|---|---|
    | `"jordan"`, `"standard"` | 5 | 0.682 .. 1.202 |
    | `"you"`, `"dion"` | 5 | 0.978 .. 1.145 |
    | `"polar_express"` | 5 | 0.846 .. 1.124 |
    | `"polar_express_6"` | 6 | 0.989 .. 1.001 |
    | `"cans"` | 5 | 0.884 .. 1.120 |
    | `"deepseek_v4"` | 10 | 1.000 .. 1.001 |
    | `"cubic5"` | 5 | 0.353 .. 1.300 |

    Args:
      name: Name of a preset.
      steps: Number of rows. Fewer than the preset has are its first ones; for more, its last row
        repeats. None gives the preset as it was published.

    Returns:
      Rows of Python floats: hashable, and exact in every compute dtype.

    Raises:
      ValueError: if the name is unknown or `steps` is below 1.

    Example:
      >>> ns_coefficients("jordan", steps=2)
      ((3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315))

    References:
      The source of each preset stands beside it in this file.
    """
    if name not in _PRESETS:
        listed = ", ".join(repr(known) for known in _PRESETS)
        raise ValueError(f"ns_coefficients: unknown preset {name!r}; there are {listed}.")
    return _to_length(_PRESETS[name], steps)


def as_rows(coefficients: Any, steps: Any = None) -> tuple[Row, ...]:
    """Turns a preset's name, coefficients of every step, or one step's into a tuple of rows.

    Args:
      coefficients: See `Coefficients`; lists and concrete arrays do too.
      steps: Number of rows, as for `ns_coefficients`. For a single row, None means five.

    Returns:
      Rows of Python floats.

    Raises:
      TypeError: if `coefficients` or `steps` is traced.
      ValueError: if they are not rows of three finite numbers, or `steps` is below 1.

    Example:
      >>> as_rows((2, -1.5, 0.5), steps=2)
      ((2.0, -1.5, 0.5), (2.0, -1.5, 0.5))
    """
    if isinstance(coefficients, str):
        return _to_length(ns_coefficients(coefficients), steps)
    if is_traced(coefficients):
        raise TypeError("The coefficients must be known while tracing here; pass numbers.")
    table = _as_table(coefficients)
    if table is None:
        raise ValueError(
            f"Newton-Schulz coefficients must be {EXPECTED}, got {reprlib.repr(coefficients)}."
        )
    rows = tuple((float(a), float(b), float(c)) for a, b, c in np.atleast_2d(table))
    if table.ndim == 1:
        return _to_length(rows, DEFAULT_STEPS if steps is None else steps)
    return _to_length(rows, steps)


def is_traced(coefficients: Any) -> bool:
    """Whether coefficients, or a number of steps, are traced.

    Args:
      coefficients: See `Coefficients`.

    Returns:
      True if any number is.

    Example:
      >>> is_traced((2.0, -1.5, 0.5))
      False
    """
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(coefficients))


def is_single_row(coefficients: Any) -> bool:
    """Whether coefficients are one row `(a, b, c)`, not a preset's name or several rows.

    Args:
      coefficients: See `Coefficients`.

    Returns:
      True for one row, which is used in every step.

    Example:
      >>> is_single_row((2.0, -1.5, 0.5)), is_single_row("jordan")
      (True, False)
    """
    if isinstance(coefficients, str):
        return False
    if hasattr(coefficients, "ndim"):
        return coefficients.ndim == 1
    return all(np.ndim(number) == 0 for number in coefficients)


def evaluate(rows: Any, s: Any) -> Any:
    """Follows one singular value through all steps.

    Args:
      rows: `(a, b, c)`, one row a step.
      s: Singular value that goes in.

    Returns:
      p_T(... p_1(s)), in float64.

    Example:
      >>> round(evaluate(ns_coefficients("jordan"), 1.0), 3)
      0.696
    """
    for a, b, c in rows:
        s = s * (a + s * s * (b + s * s * c))
    return s


def for_sixteen_bits(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Guards rows that send a value just above one far away, `cans` and `cubic5` among the presets.

    Rounding to 16 bits pushes values over the end of the range of any step, not only the first:
    dividing the matrix by 1.01 once, `cans` still reaches 1.46 on Gaussian matrices in bfloat16,
    and 7e4 without; with every step guarded, 1.12.

    Args:
      rows: `(a, b, c)`, one row a step.

    Returns:
      `rows` where they are safe, else rows for p(s / 1.01) in each step.

    Example:
      >>> for_sixteen_bits(ns_coefficients("you")) == ns_coefficients("you")
      True
    """
    above = [evaluate(rows, 1 + excess * (_ROUNDING - 1)) for excess in (0.25, 0.5, 0.75, 1)]
    return rows if all(0 < p < 2 for p in above) else with_safety(rows, _ROUNDING)


def traced_rows(coefficients: Any, steps: Any = None) -> jax.Array:
    """Does what `as_rows` does, for coefficients that are traced.

    Args:
      coefficients: One row or several, with traced numbers.
      steps: See `as_rows`. If it is traced, one row is left as it is.

    Returns:
      `[steps, 3]`, or `[1, 3]` for a traced number of steps.

    Raises:
      TypeError: if `steps` is traced and there are several rows.
      ValueError: if they are not rows of three, or `steps` is below 1.

    Example:
      >>> traced_rows(jnp.array([2.0, -1.5, 0.5]), steps=4).shape
      (4, 3)
    """
    table = jnp.asarray(coefficients)
    if table.ndim not in (1, 2) or table.shape[-1] != 3:
        raise ValueError(f"Newton-Schulz coefficients must be {EXPECTED}, got {table.shape}.")
    if table.ndim == 1:
        if isinstance(steps, Tracer):
            return table[None]
        steps = DEFAULT_STEPS if steps is None else steps
    indices = _to_length(tuple(range(len(jnp.atleast_2d(table)))), steps)
    return jnp.atleast_2d(table)[np.array(indices)]


def known_while_running(table: jax.Array, compute_dtype: Any) -> list[Any]:
    """Splits traced coefficients into rows of scalars; does for them what `for_sixteen_bits` does.

    Args:
      table: Coefficients, `[steps, 3]`.
      compute_dtype: What the products are computed in.

    Returns:
      One row `(a, b, c)` for each step, of scalars in float32 or float64.

    Example:
      >>> len(known_while_running(jnp.ones((4, 3)), jnp.dtype(jnp.float32)))
      4
    """
    info = jnp.finfo(compute_dtype)
    table = table.astype(jnp.float64 if info.bits == 64 else jnp.float32)
    if info.bits == 16:
        above = [evaluate(table, 1 + excess * (_ROUNDING - 1)) for excess in (0.25, 0.5, 0.75, 1)]
        safe = functools.reduce(jnp.logical_and, ((0 < p) & (p < 2) for p in above))
        table = jnp.where(safe, table, table / _ROUNDING ** np.array([[1, 3, 5]], np.float32))
    return [tuple(row) for row in table]


def _as_table(coefficients: Any) -> np.ndarray | None:
    """Reads one row or several, in float64; None if they are not finite numbers."""
    try:
        given = np.asarray(coefficients)
    except ValueError:  # rows of unequal lengths
        return None
    if given.ndim not in (1, 2) or given.shape[-1] != 3 or not given.size:
        return None
    if not jnp.isdtype(given.dtype, ("integral", "real floating")):
        return None
    table = given.astype(np.float64)
    return table if np.all(np.isfinite(table)) else None


def _to_length(rows: tuple[_T, ...], steps: Any) -> tuple[_T, ...]:
    if steps is None:
        return rows
    if isinstance(steps, Tracer):
        raise TypeError(
            "A traced number of Newton-Schulz steps needs one row of coefficients (a, b, c) for "
            "every step. Pass one row, or the number of steps as an int."
        )
    if steps != int(steps) or steps < 1:
        raise ValueError(f"The number of Newton-Schulz steps must be at least 1, got {steps!r}.")
    return rows[: int(steps)] + rows[-1:] * (int(steps) - len(rows))

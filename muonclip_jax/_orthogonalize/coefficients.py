"""Coefficients of the Newton-Schulz polynomials, each with its source.

One step maps every singular value s of a matrix to p(s) = a s + b s³ + c s⁵. A preset is a tuple
of `(a, b, c)`, one for each step.
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

from muonclip_jax._common.types import Step

# The name of a preset; `(a, b, c)` for every step; or a sequence of `(a, b, c)`, one for each step.
# Tuples, lists and arrays are accepted.
Coefficients: TypeAlias = str | Sequence[float] | Sequence[Sequence[float]] | ArrayLike

_T = TypeVar("_T")

# Keller Jordan's post uses five steps, and so does optax.
DEFAULT_STEPS = 5

# Jordan et al. 2024, post "Muon"; KellerJordan/Muon, muon.py,
# zeropower_via_newtonschulz5; unchanged.
JORDAN: Step = (3.4445, -4.7750, 2.0315)

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

# DeepSeek-V4, arXiv 2606.19348, section 2.4: eight steps of Jordan's, then two that
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


def with_safety(coefficients: Sequence[Step], safety: float) -> tuple[Step, ...]:
    """Replaces every p(s) by p(s / safety), so that singular values may reach `safety`."""
    return tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in coefficients)


# 16-bit rounding multiplies a singular value by less than this, in the spectra of
# tests/orthogonalize/test_newton_schulz.py.
_ROUNDING = 1.01

# The singular values each preset returns are held by tests/orthogonalize/test_published_numbers.py.
_PRESETS: dict[str, tuple[Step, ...]] = {
    "jordan": (JORDAN,) * DEFAULT_STEPS,
    "standard": (JORDAN,) * DEFAULT_STEPS,  # optax's name
    "you": _YOU,
    "dion": _YOU,  # optax's name
    "polar_express": with_safety(_POLAR_EXPRESS[:5], _SAFETY),
    "polar_express_6": with_safety(_POLAR_EXPRESS, _SAFETY),
    "deepseek_v4": _DEEPSEEK_V4,
    "cubic5": _CUBIC5,
}

# The expected coefficients, in error messages.
EXPECTED = (
    f"the name of a preset ({', '.join(map(repr, _PRESETS))}), (a, b, c) for every step, or a "
    "sequence of (a, b, c), all of them finite numbers"
)


def ns_coefficients(name: str, steps: int | None = None) -> tuple[Step, ...]:
    """Returns the coefficients of a preset, `(a, b, c)` for each Newton-Schulz step.

    In exact arithmetic, singular values from 3e-3 to 1 of the norm of a matrix become:

    | preset | steps | result |
    |---|---|---|
    | `"jordan"`, `"standard"` | 5 | 0.682 .. 1.202 |
    | `"you"`, `"dion"` | 5 | 0.978 .. 1.145 |
    | `"polar_express"` | 5 | 0.846 .. 1.124 |
    | `"polar_express_6"` | 6 | 0.989 .. 1.001 |
    | `"deepseek_v4"` | 10 | 1.000 .. 1.001 |
    | `"cubic5"` | 5 | 0.353 .. 1.300 |

    Args:
      name: Name of a preset.
      steps: Number of steps. Fewer than the preset has are its first ones; for more, its last
        step repeats. None returns the preset as published.

    Returns:
      Tuples of Python floats: hashable, and exact in every compute dtype.

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


def as_coefficients(given: Any, steps: Any = None) -> tuple[Step, ...]:
    """Converts the name of a preset or numbers to a tuple of coefficients.

    Args:
      given: See `Coefficients`.
      steps: Number of steps, as for `ns_coefficients`. For a single `(a, b, c)`, None means five.

    Returns:
      `(a, b, c)` of each step, Python floats.

    Raises:
      TypeError: if `given` or `steps` is traced.
      ValueError: if they are not triples of finite numbers, or `steps` is below 1.

    Example:
      >>> as_coefficients((2, -1.5, 0.5), steps=2)
      ((2.0, -1.5, 0.5), (2.0, -1.5, 0.5))
    """
    if isinstance(given, str):
        return _to_length(ns_coefficients(given), steps)
    if is_traced(given):
        raise TypeError("The coefficients must be known while tracing here. Pass numbers.")
    table = _as_table(given)
    if table is None:
        raise ValueError(
            f"Newton-Schulz coefficients must be {EXPECTED}, got {reprlib.repr(given)}."
        )
    coefficients = tuple((float(a), float(b), float(c)) for a, b, c in np.atleast_2d(table))
    if table.ndim == 1 and steps is None:
        steps = DEFAULT_STEPS
    return _to_length(coefficients, steps)


def as_traced_coefficients(given: Any, steps: Any = None) -> jax.Array:
    """Does what `as_coefficients` does, for traced numbers.

    Args:
      given: One `(a, b, c)` or several, with traced numbers.
      steps: See `as_coefficients`. If it is traced, a single `(a, b, c)` is not repeated.

    Returns:
      `[steps, 3]`, or `[1, 3]` for a traced number of steps.

    Raises:
      TypeError: if `steps` is traced and there are several `(a, b, c)`.
      ValueError: if they are not triples, or `steps` is below 1.

    Example:
      >>> as_traced_coefficients(jnp.array([2.0, -1.5, 0.5]), steps=4).shape
      (4, 3)
    """
    table = jnp.asarray(given)
    if table.ndim not in (1, 2) or table.shape[-1] != 3:
        raise ValueError(f"Newton-Schulz coefficients must be {EXPECTED}, got {table.shape}.")
    if table.ndim == 1:
        if isinstance(steps, Tracer):
            return table[None]
        steps = DEFAULT_STEPS if steps is None else steps
    indices = _to_length(tuple(range(len(jnp.atleast_2d(table)))), steps)
    return jnp.atleast_2d(table)[np.array(indices)]


def is_traced(value: Any) -> bool:
    """Returns whether coefficients, or a number of steps, are traced.

    Args:
      value: See `Coefficients`, or a number of steps.

    Returns:
      True if any number is traced.

    Example:
      >>> is_traced((2.0, -1.5, 0.5))
      False
    """
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))


def is_single_step(given: Any) -> bool:
    """Returns whether coefficients are a single `(a, b, c)`, for every step.

    Args:
      given: See `Coefficients`.

    Returns:
      False for the name of a preset and for a sequence of `(a, b, c)`.

    Example:
      >>> is_single_step((2.0, -1.5, 0.5)), is_single_step("jordan")
      (True, False)
    """
    if isinstance(given, str):
        return False
    if hasattr(given, "ndim"):
        return given.ndim == 1
    return all(np.ndim(number) == 0 for number in given)


def evaluate(coefficients: Any, s: Any) -> Any:
    """Computes what all steps together make of one singular value.

    Args:
      coefficients: `(a, b, c)` of each step.
      s: The singular value.

    Returns:
      p_T(... p_1(s)), in float64.

    Example:
      >>> round(evaluate(ns_coefficients("jordan"), 1.0), 3)
      0.696
    """
    for a, b, c in coefficients:
        s = s * (a + s * s * (b + s * s * c))
    return s


def for_sixteen_bits(coefficients: tuple[Step, ...]) -> tuple[Step, ...]:
    """Guards coefficients that amplify values slightly above 1, such as the preset `cubic5`.

    Rounding to 16 bits pushes values over the end of the range of any step, not only the first, so
    that dividing the matrix by 1.01 once is not enough.

    Args:
      coefficients: `(a, b, c)` of each step.

    Returns:
      The same if they are safe, else with p(s / 1.01) for every p(s).

    Example:
      >>> for_sixteen_bits(ns_coefficients("you")) == ns_coefficients("you")
      True
    """
    is_safe = all(0 < p < 2 for p in _slightly_above_one(coefficients))
    return coefficients if is_safe else with_safety(coefficients, _ROUNDING)


def traced_for_sixteen_bits(table: jax.Array, compute_dtype: Any) -> list[Any]:
    """Does what `for_sixteen_bits` does, for traced coefficients and any dtype.

    Args:
      table: Coefficients, `[steps, 3]`.
      compute_dtype: Dtype of the products.

    Returns:
      `(a, b, c)` of each step, scalars in float32 or float64.

    Example:
      >>> len(traced_for_sixteen_bits(jnp.ones((4, 3)), jnp.dtype(jnp.float32)))
      4
    """
    info = jnp.finfo(compute_dtype)
    table = table.astype(jnp.float64 if info.bits == 64 else jnp.float32)
    if info.bits == 16:
        is_safe = [(0 < p) & (p < 2) for p in _slightly_above_one(table)]
        guarded = table / _ROUNDING ** np.array([[1, 3, 5]], np.float32)
        table = jnp.where(functools.reduce(jnp.logical_and, is_safe), table, guarded)
    return [tuple(step) for step in table]


def _slightly_above_one(coefficients: Any) -> list[Any]:
    """Evaluates all steps at four values from 1 to what rounding makes of 1."""
    return [evaluate(coefficients, 1 + part * (_ROUNDING - 1)) for part in (0.25, 0.5, 0.75, 1)]


def _as_table(coefficients: Any) -> np.ndarray | None:
    """Reads one `(a, b, c)` or several, in float64; None if they are not finite numbers."""
    try:
        given = np.asarray(coefficients)
    except ValueError:  # of unequal lengths
        return None
    if given.ndim not in (1, 2) or given.shape[-1] != 3 or not given.size:
        return None
    if not jnp.isdtype(given.dtype, ("integral", "real floating")):
        return None
    table = given.astype(np.float64)
    return table if np.all(np.isfinite(table)) else None


def _to_length(coefficients: tuple[_T, ...], steps: Any) -> tuple[_T, ...]:
    """Repeats the last step, or drops the last ones."""
    if steps is None:
        return coefficients
    if isinstance(steps, Tracer):
        raise TypeError(
            "A traced number of Newton-Schulz steps needs a single (a, b, c) for every step. Pass "
            "one, or the number of steps as an int."
        )
    if steps != int(steps) or steps < 1:
        raise ValueError(f"The number of Newton-Schulz steps must be at least 1, got {steps!r}.")
    return coefficients[: int(steps)] + coefficients[-1:] * (int(steps) - len(coefficients))

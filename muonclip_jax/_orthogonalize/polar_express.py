"""Polar Express: the composition of odd quintics that brings singular values nearest to one.

The singular values before a step are in an interval [l, u]. Its p(s) = a s + b s³ + c s⁵ minimizes
the largest |1 − p(s)| there, and maps them into [p(l), 2 − p(l)], the interval of the next step.
Source: Amsel et al. 2025, arXiv 2505.16932, algorithms 1 and 2. The coefficients are constants, so
that this is NumPy in float64.
"""

import math

import numpy as np

from muonclip_jax._common.types import Step
from muonclip_jax._orthogonalize.coefficients import with_safety

# The paper's code raises l to cushion · u. The polynomial of a wider interval would be too steep
# for the small values in it.
_CUSHION = 0.02407327424182761

# On narrower intervals the exchange is ill-conditioned (it fails below 8e-6, measured), and the
# Taylor polynomial is off by at most 2.5e-12. The paper's code has 5e-6.
_NARROW = 1e-4


def polar_express_coefficients(
    lower: float, steps: int, *, safety: float = 1.05, cushion: float = _CUSHION
) -> tuple[Step, ...]:
    """Computes the optimal coefficients for singular values from `lower` to 1 of the norm.

    Args:
      lower: Smallest singular value that must become nearly one, relative to the norm, in (0, 1].
      steps: Number of steps.
      safety: Largest singular value allowed, at least 1: every p(s) is replaced by p(s / safety).
        The paper uses 1.01.
      cushion: Smallest ratio of the lower to the upper end of the interval that a step is optimized
        for, in [0, 1).

    Returns:
      `(a, b, c)` of each step, Python floats, for `newton_schulz` and `muon`.

    Raises:
      ValueError: if `lower` is not in (0, 1], `steps` is below 1, `safety` below 1 or `cushion`
        not in [0, 1).

    Example:
      >>> import muonclip_jax as mc
      >>> coefficients = mc.polar_express_coefficients(1e-3, steps=5)
      >>> print(f"{coefficients[0][0]:.4f} {mc.ns_coefficients('polar_express')[0][0]:.4f}")
      7.8926 7.8926

    References:
      Amsel et al. 2025, arXiv 2505.16932, algorithms 1 (the coefficients) and 2 (safety, cushion).
    """
    _check(lower, steps, safety, cushion)
    l, u = float(lower), 1.0  # noqa: E741  # the letters of the paper
    coefficients = []
    for _ in range(steps):
        inner = max(l, cushion * u)
        step = _optimal_quintic(inner, u)
        if inner > l:  # center the values at the true ends around one
            step = _times(step, 2 / (_p(step, l) + _p(step, u)))
        coefficients.append(step)
        l = _p(step, l)  # noqa: E741
        u = 2 - l
    return with_safety(coefficients, safety)


def _optimal_quintic(l: float, u: float) -> Step:  # noqa: E741
    """Finds the odd quintic nearest to one on [l, u], by Remez exchange.

    p − 1 is −E, E, −E, E at l, q, r and u, and the slope of p is zero at q and r.
    """
    if l / u > 1 - _NARROW:
        return 15 / 8 / u, -10 / 8 / u**3, 3 / 8 / u**5
    q, r, error = (3 * l + u) / 4, (l + 3 * u) / 4, math.inf
    while True:
        x = np.array([l, q, r, u])
        system = np.stack([x, x**3, x**5, [1.0, -1.0, 1.0, -1.0]], axis=1)
        a, b, c, new_error = np.linalg.solve(system, np.ones(4)).tolist()
        if abs(error - new_error) <= 1e-15:
            return a, b, c
        error = new_error
        # p'(x) = a + 3 b x² + 5 c x⁴
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))


def _p(step: Step, s: float) -> float:
    a, b, c = step
    return a * s + b * s**3 + c * s**5


def _times(step: Step, factor: float) -> Step:
    a, b, c = step
    return factor * a, factor * b, factor * c


def _check(lower: float, steps: int, safety: float, cushion: float) -> None:
    for name, value, wanted, good in (
        ("lower", lower, "in (0, 1]", 0 < lower <= 1),
        ("steps", steps, "at least 1", steps >= 1),
        ("safety", safety, "at least 1", 1 <= safety < math.inf),
        ("cushion", cushion, "in [0, 1)", 0 <= cushion < 1),
    ):
        if not good:
            raise ValueError(f"polar_express_coefficients: {name} must be {wanted}, got {value!r}.")

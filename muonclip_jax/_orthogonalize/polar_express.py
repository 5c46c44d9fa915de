"""Polar Express: the composition of odd quintics that brings singular values nearest to one.

Each step takes the p(s) = a s + b s³ + c s⁵ that minimizes the largest |1 − p(s)| on the interval
[l, u] where the singular values are by then; it maps them into [p(l), 2 − p(l)], the interval of
the next. Source: Amsel et al. 2025, arXiv 2505.16932, algorithms 1 and 2. NumPy in float64, no JAX:
this makes constants.
"""

import math

import numpy as np

from muonclip_jax._common.types import Row
from muonclip_jax._orthogonalize.coefficients import with_safety

# The paper's code: an interval that is wider than 1 : 1/cushion is cut to that, or its polynomial
# would be too steep for the small values in between.
_CUSHION = 0.02407327424182761

# On narrower intervals the exchange is ill-conditioned (it fails below 8e-6, measured), and the
# Taylor polynomial at the end is off by no more than 2.5 x 1e-12. The paper's code takes 5e-6.
_NARROW = 1e-4


def polar_express_coefficients(
    lower: float, steps: int, *, safety: float = 1.05, cushion: float = _CUSHION
) -> tuple[Row, ...]:
    """Computes the optimal `(a, b, c)` rows for singular values from `lower` to 1 of the norm.

    Args:
      lower: Least singular value that has to arrive near one, as a part of the norm, in (0, 1].
      steps: Number of rows.
      safety: Every row is that of p(s / safety), so that singular values may exceed one by as
        much; 1 is none, the paper's choice is 1.01.
      cushion: Least ratio of the ends of an interval that a row is made for, in [0, 1).

    Returns:
      Rows of Python floats, for `newton_schulz` and `muon`.

    Raises:
      ValueError: if `lower` is not in (0, 1], `steps` is below 1, `safety` below 1 or `cushion`
        not in [0, 1).

    Example:
      >>> import muonclip_jax as mc
      >>> rows = mc.polar_express_coefficients(1e-3, steps=5)
      >>> print(f"{rows[0][0]:.4f} {mc.ns_coefficients('polar_express')[0][0]:.4f}")
      7.8926 7.8926

    References:
      Amsel et al. 2025, arXiv 2505.16932, algorithms 1 (the rows) and 2 (safety, cushion).
    """
    _check(lower, steps, safety, cushion)
    l, u = float(lower), 1.0  # noqa: E741  # the letters of the paper
    rows = []
    for _ in range(steps):
        inner = max(l, cushion * u)
        row = _optimal_quintic(inner, u)
        if inner > l:  # center the values at the true ends around one
            row = _times(row, 2 / (_p(row, l) + _p(row, u)))
        rows.append(row)
        l = _p(row, l)  # noqa: E741
        u = 2 - l
    return with_safety(rows, safety)


def _optimal_quintic(l: float, u: float) -> Row:  # noqa: E741
    """Finds the odd quintic nearest to one on [l, u], by Remez exchange.

    It leaves one by E at l, q, r and u with signs − + − +; q and r are where its slope is zero.
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


def _p(row: Row, s: float) -> float:
    a, b, c = row
    return a * s + b * s**3 + c * s**5


def _times(row: Row, factor: float) -> Row:
    a, b, c = row
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

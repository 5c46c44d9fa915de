"""The standard and the Gram iteration, on normalized n x m matrices X with n ≤ m.

Both apply the polynomial p(s) = a s + b s³ + c s⁵ of each step to the singular values of X. In
exact arithmetic they return the same matrix.

    standard     A = X Xᴴ,  X ← (a I + b A + c A²) X                       each step
    Gram         R = X Xᴴ,  Q = I                                          once per window
                 Y = a I + b R + c R²,  Q ← Y Q,  R ← Y R Y                each step of a window
                 X ← Q X                                                   at the end of a window

The Gram iteration multiplies by the long side twice per window, not twice per step. Rounding moves
R away from Q X Xᴴ Qᴴ, so that steps are cut into windows, and each window restarts from X. Y is to
the left of Q: its errors are not multiplied by all of Q. Sources: Jordan et al. 2024; Zhang, Amsel,
Chen, Dao 2026, Dao-AILab/gram-newton-schulz.
"""

from collections.abc import Sequence

import jax

from muonclip_jax._common.types import Scalar, Step
from muonclip_jax._orthogonalize.symmetric import (
    Matrix,
    Symmetric,
    gram_matrix,
    is_narrow,
)


def standard(
    X: Matrix,
    A: Symmetric,
    coefficients: Sequence[tuple[Scalar, Scalar, Scalar]],
    steps: jax.Array | None = None,
) -> jax.Array:
    """Runs the standard iteration.

    Args:
      X: `[..., n, m]`, in the dtype to compute in; if devices share it, some of its columns.
      A: X Xᴴ.
      coefficients: `(a, b, c)` of each step.
      steps: Number of steps if it is traced; then there is one `(a, b, c)`. At least one step runs.

    Returns:
      `[..., n, m]`.
    """

    def step(X: Matrix, A: Symmetric, a: Scalar, b: Scalar, c: Scalar) -> Matrix:
        """X ← (a I + b A + c A²) X."""
        return (a + _quadratic(A, b, c)) @ X

    X = step(X, A, *coefficients[0])
    if steps is not None:
        again = lambda _, X: step(X, gram_matrix(X, A.products), *coefficients[0])  # noqa: E731
        return jax.lax.fori_loop(1, steps, again, X).entries
    for a, b, c in coefficients[1:]:
        X = step(X, gram_matrix(X, A.products), a, b, c)
    return X.entries


def gram(X: Matrix, R: Symmetric, windows: Sequence[Sequence[Step]]) -> jax.Array:
    """Runs the Gram iteration.

    Args:
      X: As for `standard`.
      R: X Xᴴ.
      windows: `(a, b, c)` of each step of each window.

    Returns:
      `[..., n, m]`.
    """
    for number, window in enumerate(windows):
        if number > 0:
            R = gram_matrix(X, R.products)
        a, b, c = window[0]
        Y = a + _quadratic(R, b, c)
        Q = _initial_product(Y)
        for a, b, c in window[1:]:
            R = (Y @ (R @ Y).rounded()).rounded()
            Y = a + _quadratic(R, b, c)
            Q = (Y @ Q).rounded()
        X = Q @ X
    return X.entries


def _quadratic(A: Symmetric, b: Scalar, c: Scalar) -> Symmetric:
    """Computes b A + c A²; cubic steps have c = 0, and no product."""
    if isinstance(c, float) and c == 0:
        return (b * A).rounded()
    return (b * A + c * (A @ A)).rounded()


def _initial_product(Y: Symmetric) -> Symmetric:
    """Returns Q after the first step of a window, which is Y.

    The errors of Q are never corrected, so its products are computed in full. Float32 and wider
    types add the shift to the diagonal: they have the digits for it, and q X + Q X would lose some.
    """
    Q = Y.in_full()
    return Q if is_narrow(Q.matrix.dtype) else Q.without_shift()

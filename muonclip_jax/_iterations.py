"""The two forms of the Newton-Schulz iteration, on normalised n x m matrices with n <= m.

standard:  A = X Xᴴ,  X ← a X + (b A + c A²) X                             each step
Gram:      R = X Xᴴ once; then on n x n matrices alone, with Z = b R + c R²,
           Q ← a Q + Q Z,  R ← (R Z + a R) Z + a (R Z + a R)               each step
           and X ← Q X at the end

On paper they are the same polynomial of X. Gram form touches the long side twice instead of ten
times, but rounding moves R away from Q X Xᴴ Qᴴ: it is restarted from X where that would grow too
much. Sources: Jordan et al. 2024; Zhang, Amsel, Chen, Dao 2026, Dao-AILab/gram-newton-schulz.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from muonclip_jax._types import Row

# Steps between two restarts of the Gram form.
Windows: TypeAlias = tuple[tuple[Row, ...], ...]

# How far a window may go. 16 bits: this many steps; without a restart bfloat16 reaches singular
# values of 3e4. Others: until the slope at zero, which is what amplifies rounding, passes this.
_MOST_STEPS = {"bfloat16": 2, "float16": 3}
_MOST_SLOPE = {"float32": 500.0, "complex64": 500.0, "float64": 1e6, "complex128": 1e6}


def standard(x: jax.Array, rows: Sequence[Row], preconditioning: str) -> jax.Array:
    """Runs the standard form; `x` is (..., n, m) in the dtype to compute in."""
    for step, (a, b, c) in enumerate(rows):
        x, A = _gram_matrix(x, preconditioning if step == 0 else "frobenius")
        x = _add(a, x, 1.0, _product(_even_part(A, b, c), x))
    return x


def gram(x: jax.Array, windows: Windows, preconditioning: str) -> jax.Array:
    """Runs the Gram form; `x` is (..., n, m) in the dtype to compute in."""
    for index, window in enumerate(windows):
        x, R = _gram_matrix(x, preconditioning if index == 0 else "frobenius")
        x = _product(_accumulated(R, window), x).astype(x.dtype)
    return x


def restart_windows(rows: Sequence[Row], dtype: Any) -> Windows:
    """Cuts the steps into windows, filled from the last step backwards.

    Args:
      rows: `(a, b, c)`, one row a step.
      dtype: What the products are computed in.

    Returns:
      The rows of each window; the Gram form restarts before every one but the first.

    Example:
      >>> [len(window) for window in restart_windows([(3.4, -4.8, 2.0)] * 5, jnp.bfloat16)]
      [1, 2, 2]
    """
    name, windows = jnp.dtype(dtype).name, []
    for row in reversed(rows):
        longer = (row, *windows[0]) if windows else (row,)
        slope = math.prod(abs(a) for a, _, _ in longer)
        fits = (
            len(longer) <= _MOST_STEPS[name] if name in _MOST_STEPS else slope <= _MOST_SLOPE[name]
        )
        if windows and fits:
            windows[0] = longer
        else:
            windows.insert(0, (row,))
    return tuple(windows)


def standard_cost(rows: Sequence[Row], aspect: float) -> float:
    """Counts the work of the standard form, in n³ FLOPs (a multiply-add is two).

    Args:
      rows: `(a, b, c)`, one row a step.
      aspect: Columns by rows, at least 1.

    Returns:
      4 aspect + 2 a step, without the 2 where c = 0.

    Example:
      >>> standard_cost([(3.4, -4.8, 2.0)] * 5, aspect=4.0)
      90.0
    """
    return sum(4.0 * aspect + (2.0 if c else 0.0) for _, _, c in rows)


def gram_cost(windows: Windows, aspect: float) -> float:
    """Counts the work of the Gram form, in n³ FLOPs (a multiply-add is two).

    Args:
      windows: See `restart_windows`.
      aspect: Columns by rows, at least 1.

    Returns:
      4 aspect a window, 2 for each R R, 2 for each Q Z and 4 for each new R.

    Example:
      >>> gram_cost((((3.4, -4.8, 2.0),) * 5,), aspect=4.0)
      50.0
    """
    squares = sum(2.0 for window in windows for _, _, c in window if c)
    return squares + sum(4.0 * aspect + 6.0 * (len(window) - 1) for window in windows)


def accumulator(dtype: Any) -> Any:
    """Names the dtype in which sums over `dtype` are taken: at least float32.

    Args:
      dtype: A floating or complex dtype.

    Returns:
      `dtype` itself, or float32 for the 16-bit ones.

    Example:
      >>> accumulator(jnp.bfloat16)
      dtype('float32')
    """
    dtype = jnp.dtype(dtype)
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def nonzero(x: jax.Array) -> jax.Array:
    """Puts one where `x` is not above zero, so that it can be divided by."""
    return jnp.where(x > 0, x, jnp.ones_like(x))


def _accumulated(R: jax.Array, window: tuple[Row, ...]) -> jax.Array:
    """Follows R through the steps of a window, and gives the Q that they make of X."""
    # No second factor is ever transposed, though all of these are Hermitian on paper: they are so
    # only up to rounding, and with R Rᴴ in place of R R float32 loses two digits.
    a, b, c = window[0]
    Z = _even_part(R, b, c)
    Q = _plus_identity(a, Z)
    for next_a, b, c in window[1:]:
        RY = _add(a, R, 1.0, _product(R, Z))  # Y = a I + Z, which 16 bits would lose
        R = _add(a, RY, 1.0, _product(RY, Z))
        a = next_a
        Z = _even_part(R, b, c)
        Q = _add(a, Q, 1.0, _product(Q, Z))
    return Q


def _gram_matrix(x: jax.Array, preconditioning: str) -> tuple[jax.Array, jax.Array]:
    """Forms X Xᴴ, and for two preconditionings scales X by diag(s) and it on both sides."""
    A = _product(x, x.mT.conj())
    if preconditioning == "schatten":  # s = ‖A‖^(-1/2), and ‖A‖^(1/2) is the Schatten-4 norm of X
        total = jnp.linalg.norm(A, axis=(-2, -1), keepdims=True)
    elif preconditioning == "aol":  # s_i = (Σ_j |A_ij|)^(-1/2)
        total = jnp.sum(jnp.abs(A), axis=-1, keepdims=True)
    else:
        return x, A.astype(x.dtype)
    s = jax.lax.rsqrt(nonzero(total)).astype(A.dtype)
    return (x.astype(s.dtype) * s).astype(x.dtype), (A * s * s.mT).astype(x.dtype)


def _even_part(A: jax.Array, b: float, c: float) -> jax.Array:
    """Computes b A + c A²."""
    return _add(b, A, c, _product(A, A)) if c else _add(b, A)


def _plus_identity(a: float, Z: jax.Array) -> jax.Array:
    wide = Z.astype(accumulator(Z.dtype))
    return (wide + a * jnp.eye(Z.shape[-1], dtype=wide.dtype)[(None,) * (Z.ndim - 2)]).astype(
        Z.dtype
    )


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies, and returns the sums unrounded."""
    # HIGHEST: accelerators would round float32 operands to TF32 or bfloat16 by default.
    precision = None if jnp.finfo(a.dtype).bits == 16 else jax.lax.Precision.HIGHEST
    return jnp.matmul(a, b, precision=precision, preferred_element_type=accumulator(a.dtype))


def _add(a: float, x: jax.Array, b: float = 0.0, y: jax.Array | None = None) -> jax.Array:
    """Computes a x + b y with one rounding, to the dtype of `x`: a 16-bit `a` would lose digits."""
    total = a * x.astype(accumulator(x.dtype))
    return (total if y is None else total + b * y).astype(x.dtype)

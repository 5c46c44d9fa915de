"""The two forms of the Newton-Schulz iteration, on normalised n x m matrices with n <= m.

standard:  A = X Xᴴ,  Z = b A + c A²,  X ← a X + Z X                       each step
Gram:      R = X Xᴴ once; then on n x n matrices alone, with Z = b R + c R²,
           Q ← a Q + Z Q,  R ← a (a R + R Z) + Z (a R + R Z)               each step
           and X ← Q X at the end

On paper they are the same polynomial of X. Gram form touches the long side twice instead of ten
times, but rounding moves R away from Q X Xᴴ Qᴴ: it is restarted from X where that would grow too
much. Sources: Jordan et al. 2024; Zhang, Amsel, Chen, Dao 2026, Dao-AILab/gram-newton-schulz.

Two things keep digits. Z stands to the left of Q, so that its errors are not multiplied by all of
Q; R, though never Q, may then be kept by blocks. And in 16 bits the mean z of the diagonal of Z is
carried as a number, a X + Z X = (a + z) X + (Z - z I) X: what is left has smaller entries to round.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from muonclip_jax._products import (
    Hermitian,
    Rows,
    accumulator,
    block_rows,
    gram_matrix,
    hermitian_product,
    hermitian_share,
    join,
    multiply,
    product,
    split,
    squared_norm,
    trace,
)
from muonclip_jax._types import Row

# Steps between two restarts of the Gram form.
Windows: TypeAlias = tuple[tuple[Row, ...], ...]

_Blocks = TypeVar("_Blocks", jax.Array, Rows, Hermitian)

# How far a window may go. 16 bits: this many steps; one more, and bfloat16 mixes singular vectors
# three times as much where they decay to 1e-4. Others: until the slope at zero, which is what
# amplifies rounding, passes this.
_MOST_STEPS = {"bfloat16": 2, "float16": 3}
_MOST_SLOPE = {"float32": 500.0, "complex64": 500.0, "float64": 1e6, "complex128": 1e6}


def standard(x: jax.Array, rows: Sequence[Row], preconditioning: str, blocks: int) -> jax.Array:
    """Runs the standard form; `x` is (..., n, m) in the dtype to compute in."""
    x, A = _preconditioned(x, preconditioning, blocks)
    X = split(x, blocks)
    for step, (a, b, c) in enumerate(rows):
        if step > 0:
            A = _combine(x.dtype, (1.0, gram_matrix(X)))
        z, Z = _even_part(A, b, c)
        X = _combine(x.dtype, (a + z, X), (1.0, product(Z, X)))
    return join(X)


def gram(x: jax.Array, windows: Windows, preconditioning: str, blocks: int) -> jax.Array:
    """Runs the Gram form; `x` is (..., n, m) in the dtype to compute in."""
    x, R = _preconditioned(x, preconditioning, blocks)
    for index, window in enumerate(windows):
        if index > 0:
            R = _combine(x.dtype, (1.0, gram_matrix(split(x, blocks))))
        q, Q = _accumulated(R, window)
        x = _combine(x.dtype, (q, x), (1.0, multiply(join(Q), x)))
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


def standard_cost(rows: Sequence[Row], aspect: float, blocks: int = 1) -> float:
    """Counts the work of the standard form, in n³ FLOPs (a multiply-add is two).

    Args:
      rows: `(a, b, c)`, one row a step.
      aspect: Columns by rows, at least 1.
      blocks: p of `hermitian_share`, here s.

    Returns:
      2 aspect (1 + s) + 2 s a step, without the last 2 s where c = 0.

    Example:
      >>> standard_cost([(3.4, -4.8, 2.0)] * 5, aspect=4.0)
      90.0
    """
    s = hermitian_share(blocks)
    return sum(2 * aspect * (1 + s) + (2 * s if c else 0.0) for _, _, c in rows)


def gram_cost(windows: Windows, aspect: float, blocks: int = 1) -> float:
    """Counts the work of the Gram form, in n³ FLOPs (a multiply-add is two).

    Args:
      windows: See `restart_windows`.
      aspect: Columns by rows, at least 1.
      blocks: p of `hermitian_share`, here s.

    Returns:
      2 aspect (1 + s) a window, 2 s for each R R, 2 for each Z Q and 4 s for each new R.

    Example:
      >>> gram_cost((((3.4, -4.8, 2.0),) * 5,), aspect=4.0)
      50.0
    """
    s = hermitian_share(blocks)
    squares = sum(2 * s for window in windows for _, _, c in window if c)
    return squares + sum(
        2 * aspect * (1 + s) + (2 + 4 * s) * (len(window) - 1) for window in windows
    )


def nonzero(x: jax.Array) -> jax.Array:
    """Puts one where `x` is not above zero, so that it can be divided by."""
    return jnp.where(x > 0, x, jnp.ones_like(x))


def _accumulated(R: Hermitian, window: Sequence[Row]) -> tuple[Any, Rows]:
    """Follows R through the steps of a window; q I + Q is the polynomial of R that they make."""
    dtype = R[0, 0].dtype
    a, b, c = window[0]
    z, Z = _even_part(R, b, c)
    # Wide types have the digits to keep it all in Q, and would lose some in q X + Q X.
    q, Q = (a + z, Z) if _is_narrow(dtype) else (0.0, _shifted(Z, a))
    Q = block_rows(Q)
    for next_a, b, c in window[1:]:
        y = a + z  # a I + Z of the equations is y I + Z here
        RY = _combine(dtype, (y, R), (1.0, hermitian_product(R, Z)))
        R = _combine(dtype, (y, RY), (1.0, hermitian_product(Z, RY)))
        a = next_a
        z, Z = _even_part(R, b, c)
        y = a + z
        Q = _combine(dtype, (y, Q), (q, block_rows(Z)), (1.0, product(Z, Q)))
        q = y * q
    return q, Q


def _even_part(A: Hermitian, b: float, c: float) -> tuple[Any, Hermitian]:
    """Computes b A + c A² as z I + Z, where z is 0 in wide types and else the mean diagonal."""
    dtype = A[0, 0].dtype
    terms = [(b, A)] + ([(c, hermitian_product(A, A))] if c else [])
    if not _is_narrow(dtype):
        return 0.0, _combine(dtype, *terms)
    n = sum(A[key].shape[-1] for key in A if key[0] == key[1])
    z = (b * trace(A) + c * squared_norm(A)) / n
    return z, _combine(dtype, (1.0, _shifted(_combine(accumulator(dtype), *terms), -z)))


def _preconditioned(x: jax.Array, preconditioning: str, blocks: int) -> tuple[jax.Array, Hermitian]:
    """Forms X Xᴴ, and for two preconditionings scales X by diag(s), and it on both sides."""
    A = gram_matrix(split(x, blocks))
    if preconditioning not in ("schatten", "aol"):
        return x, _combine(x.dtype, (1.0, A))
    whole = join(block_rows(A))
    if preconditioning == "schatten":  # s = ‖A‖^(-1/2), and ‖A‖^(1/2) is the Schatten-4 norm of X
        total = jnp.linalg.norm(whole, axis=(-2, -1), keepdims=True)
    else:  # s_i = (Σ_j |A_ij|)^(-1/2)
        total = jnp.sum(jnp.abs(whole), axis=-1, keepdims=True)
    s = jax.lax.rsqrt(nonzero(total)).astype(whole.dtype)
    s = split(jnp.broadcast_to(s, (*whole.shape[:-1], 1)), blocks)
    A = {(i, j): block * s[i] * s[j].mT for (i, j), block in A.items()}
    return _combine(x.dtype, (join(s), x)), _combine(x.dtype, (1.0, A))


def _shifted(A: Hermitian, s: Any) -> Hermitian:
    """Computes A + s I."""

    def shift(block: jax.Array) -> jax.Array:
        identity = jnp.eye(block.shape[-1], dtype=block.dtype)[(None,) * (block.ndim - 2)]
        return block + s * identity

    return {(i, j): shift(block) if i == j else block for (i, j), block in A.items()}


def _combine(dtype: Any, *terms: tuple[Any, _Blocks]) -> _Blocks:
    """Sums coefficient · x with one rounding, to `dtype`; in 16 bits a coefficient loses digits."""
    kept = [(c, x) for c, x in terms if not (isinstance(c, float) and c == 0)]
    coefficients, blocks = zip(*kept, strict=True)

    def total(*xs: jax.Array) -> jax.Array:
        wide = (c * x.astype(accumulator(x.dtype)) for c, x in zip(coefficients, xs, strict=True))
        return functools.reduce(jnp.add, wide).astype(dtype)

    return jax.tree.map(total, *blocks)


def _is_narrow(dtype: Any) -> bool:
    return jnp.finfo(dtype).bits == 16

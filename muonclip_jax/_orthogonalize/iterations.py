"""The two forms of the Newton-Schulz iteration, on normalized n x m matrices with n <= m.

standard:  A = X Xᴴ,  Z = b A + c A²,  X ← a X + Z X                       each step
Gram:      R = X Xᴴ once; then on n x n matrices alone, with Z = b R + c R²,
           Q ← a Q + Z Q,  R ← a (a R + R Z) + Z (a R + R Z)               each step
           and X ← Q X at the end

On paper they are the same polynomial of X. Gram form touches the long side twice instead of ten
times, but rounding moves R away from Q X Xᴴ Qᴴ: it is restarted from X where that would grow too
much. Sources: Jordan et al. 2024; Zhang, Amsel, Chen, Dao 2026, Dao-AILab/gram-newton-schulz.

With a team, each device has some columns of X and all of the n x n matrices; of a product of two
of those it forms some rows, and gathers the rest, rounded.

Two things keep digits. Z stands to the left of Q, so that its errors are not multiplied by all of
Q; R, though never Q, may then be kept by blocks. And in 16 bits the mean diagonal r of X Xᴴ is a
number beside the matrix, r I + R, in all that follows, because what is left is smaller to round:
(s I + S)(t I + T) = s t I + (s T + t S + S T).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from muonclip_jax._common.dtypes import accumulator
from muonclip_jax._common.types import Row, Scalar
from muonclip_jax._orthogonalize.products import (
    Hermitian,
    Rows,
    add_identity,
    block_rows,
    gram_matrix,
    hermitian_product,
    hermitian_share,
    join,
    mean_diagonal,
    mean_square,
    multiply,
    product,
    split,
)
from muonclip_jax._orthogonalize.team import Team

# Steps between two restarts of the Gram form.
Windows: TypeAlias = tuple[tuple[Row, ...], ...]

# s and S of s I + S; s is 0 in wide types.
Shifted: TypeAlias = tuple[Any, Hermitian]

_Blocks = TypeVar("_Blocks", jax.Array, Rows, Hermitian)

# How far a window may go before rounding has grown too much. Until the slope at zero, which is what
# amplifies it, passes this;
_MOST_SLOPE = {16: 64.0, 32: 500.0, 64: 1e6}  # by the bits of a real number
# and in 16 bits so many steps: the first window starts from an X without errors, the others do not.
_MOST_STEPS_FIRST, _MOST_STEPS_LATER = 3, 2


def standard(
    x: jax.Array,
    rows: Sequence[tuple[Scalar, Scalar, Scalar]],
    preconditioning: str,
    blocks: int,
    team: Team | None = None,
    steps: jax.Array | None = None,
) -> jax.Array:
    """Runs the standard form; `x` is (..., n, m) in the dtype to compute in.

    With a team `x` is this device's columns, and `blocks` is 1. A traced number of `steps`, at
    least 1, uses the one row in each of them.
    """
    x, A = _preconditioned(x, preconditioning, blocks, team)

    def step(X: Rows, A: Shifted, row: tuple[Scalar, Scalar, Scalar]) -> Rows:
        a, b, c = row
        z, Z = _even_part(A, b, c, team)
        return _combine(x.dtype, (a + z, X), (1.0, product(Z, X)))

    X = step(split(x, blocks), A, rows[0])
    if steps is not None:
        again = lambda _, X: step(X, _shifted_gram_matrix(X, team), rows[0])  # noqa: E731
        return join(jax.lax.fori_loop(1, steps, again, X))
    for row in rows[1:]:
        X = step(X, _shifted_gram_matrix(X, team), row)
    return join(X)


def gram(
    x: jax.Array, windows: Windows, preconditioning: str, blocks: int, team: Team | None = None
) -> jax.Array:
    """Runs the Gram form; see `standard`."""
    x, R = _preconditioned(x, preconditioning, blocks, team)
    for index, window in enumerate(windows):
        if index > 0:
            R = _shifted_gram_matrix(split(x, blocks), team)
        q, Q = _accumulated(R, window, team)
        x = _combine(x.dtype, (q, x), (1.0, multiply(join(Q), x)))
    return x


def restart_windows(rows: Sequence[Row], dtype: Any) -> Windows:
    """Cuts the steps into windows, filled from the first step on.

    The first steps are the steep ones: restarts soon after them leave the least to amplify.

    Args:
      rows: `(a, b, c)`, one row a step.
      dtype: What the products are computed in.

    Returns:
      The rows of each window; the Gram form restarts before every one but the first.

    Example:
      >>> [len(window) for window in restart_windows([(3.4, -4.8, 2.0)] * 5, jnp.bfloat16)]
      [3, 2]
    """
    windows: list[tuple[Row, ...]] = [()]
    for row in rows:
        longer = (*windows[-1], row)
        steps = math.inf
        if _is_narrow(dtype):
            steps = _MOST_STEPS_FIRST if len(windows) == 1 else _MOST_STEPS_LATER
        slope = math.prod(abs(a) for a, _, _ in longer)
        if len(longer) <= steps and slope <= _MOST_SLOPE[jnp.finfo(dtype).bits]:
            windows[-1] = longer
        else:
            windows.append((row,))
    return tuple(window for window in windows if window)


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


def _accumulated(R: Shifted, window: Sequence[Row], team: Team | None) -> tuple[Any, Rows]:
    """Follows R through the steps of a window; q I + Q is the polynomial of R that they make."""
    a, b, c = window[0]
    y, Z = _plus(a, _even_part(R, b, c, team))
    # Wide types have the digits to keep it all in Q, and would lose some in q X + Q X.
    q, Q = (
        (y, block_rows(Z)) if _is_narrow(Z[0, 0].dtype) else (0.0, block_rows(add_identity(a, Z)))
    )
    for a, b, c in window[1:]:
        RY = _times(R, (y, Z), team)  # Y = a I + Z of the equations is y I + Z here
        R = _times((y, Z), RY, team)
        y, Z = _plus(a, _even_part(R, b, c, team))
        Q = _with_product(((y, Q), (q, block_rows(Z))), 1.0, Z, Q, team)
        q = y * q
    return q, Q


def _even_part(A: Shifted, b: Scalar, c: Scalar, team: Team | None) -> Shifted:
    """Computes b A + c A²."""
    s, S = A
    return b * s + c * s * s, _with_product(((b + 2 * c * s, S),), c, S, S, team)


def _times(A: Shifted, B: Shifted, team: Team | None) -> Shifted:
    """Computes A B, of two that commute but for rounding."""
    (s, S), (t, T) = A, B
    return s * t, _with_product(((s, T), (t, S)), 1.0, S, T, team)


def _with_product(
    terms: Sequence[tuple[Any, _Blocks]], c: Scalar, A: Hermitian, B: _Blocks, team: Team | None
) -> _Blocks:
    """Computes Σ coefficient · x + c A B with one rounding, all of them n x n."""
    dtype, height = A[0, 0].dtype, A[0, 0].shape[-2]
    if isinstance(c, float) and c == 0:
        return _combine(dtype, *terms)
    AB: Any
    if team is None:
        AB = hermitian_product(A, B) if isinstance(B, dict) else product(A, tuple(B))
        return _combine(dtype, *terms, (c, AB))
    mine = [(k, jax.tree.map(team.rows, x)) for k, x in terms]
    AB = jax.tree.map(functools.partial(multiply, team.rows(A[0, 0])), B)
    total = _combine(dtype, *mine, (c, AB))
    return jax.tree.map(functools.partial(team.gather, height=height), total)


def _gram_matrix(X: Rows, team: Team | None) -> Hermitian:
    """Forms X Xᴴ, unrounded, of all columns."""
    A = gram_matrix(X)
    return A if team is None else jax.tree.map(team.sum, A)


def _plus(a: float, A: Shifted) -> Shifted:
    """Computes a I + A."""
    s, S = A
    return a + s, S


def _preconditioned(
    x: jax.Array, preconditioning: str, blocks: int, team: Team | None
) -> tuple[jax.Array, Shifted]:
    """Forms X Xᴴ, and for two preconditionings scales X by diag(s), and it on both sides."""
    if preconditioning not in ("schatten", "aol"):
        return x, _shifted_gram_matrix(split(x, blocks), team)
    A = _gram_matrix(split(x, blocks), team)
    whole = join(block_rows(A))
    if preconditioning == "schatten":  # s = ‖A‖^(-1/2), and ‖A‖^(1/2) is the Schatten-4 norm of X
        total = jnp.linalg.norm(whole, axis=(-2, -1), keepdims=True)
    else:  # s_i = (Σ_j |A_ij|)^(-1/2)
        total = jnp.sum(jnp.abs(whole), axis=-1, keepdims=True)
    s = jax.lax.rsqrt(nonzero(total)).astype(whole.dtype)
    s = split(jnp.broadcast_to(s, (*whole.shape[:-1], 1)), blocks)
    A = {(i, j): block * s[i] * s[j].mT for (i, j), block in A.items()}
    return _combine(x.dtype, (join(s), x)), _shifted(A, x.dtype)


def _shifted_gram_matrix(X: Rows, team: Team | None) -> Shifted:
    """Forms X Xᴴ, in the dtype of X."""
    A = _gram_matrix(X, team)
    if team or not _is_narrow(X[0].dtype):
        return _shifted(A, X[0].dtype)
    # The trace of X Xᴴ from X: known before the product, it is taken out as that is rounded, and
    # the unrounded matrix need not be kept.
    return _shifted(A, X[0].dtype, mean_square(X))


def _shifted(A: Hermitian, dtype: Any, s: Any = None) -> Shifted:
    """Rounds an unrounded matrix to `dtype`, and for 16 bits takes its mean diagonal s out."""
    if not _is_narrow(dtype):
        return 0.0, _combine(dtype, (1.0, A))
    s = mean_diagonal(A) if s is None else s
    return s, _combine(dtype, (1.0, add_identity(-s, A)))


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

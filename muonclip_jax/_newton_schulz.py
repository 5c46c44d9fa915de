"""Newton-Schulz iteration: pushes the singular values of a matrix towards one with products alone.

Here a matrix is brought to singular values of at most one, at any scale and in any dtype;
`_iterations` has the steps. Source: Jordan et al. 2024, "Muon",
https://kellerjordan.github.io/posts/muon/.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact

from muonclip_jax._coefficients import Coefficients, as_rows, for_sixteen_bits
from muonclip_jax._grouping import MOST_BYTES
from muonclip_jax._iterations import (
    gram,
    gram_cost,
    nonzero,
    restart_windows,
    standard,
    standard_cost,
)
from muonclip_jax._products import accumulator, multiply
from muonclip_jax._settings import check_choice
from muonclip_jax._team import Team
from muonclip_jax._types import Row, Scalar

METHODS = ("auto", "standard", "gram")
PRECONDITIONINGS = ("frobenius", "spectral", "aol", "schatten")

# The compute dtype of "auto". TPU: its matrix units multiply bfloat16. GPU: not measured yet.
_COMPUTE_DTYPES = {"cpu": jnp.float32, "tpu": jnp.bfloat16, "gpu": jnp.bfloat16}

# The short side from which Hermitian products are formed by 2 x 2 blocks, three quarters of their
# FLOPs, where that has been measured to be faster: benchmarks/results/blocks.json.
_SMALLEST_IN_BLOCKS = {"cpu": 384}

# The short side from which a TPU takes matrices one after the other. Its compiler estimates 2.44
# million cycles instead of 3.18 for each of eight 2048 x 7168 matrices on v5p, 10.1, not 11.9, for
# each of two of 4096, with a tenth of the temporary memory.
_ALONE_ON_TPU = 1024

# 2⁶⁴ is exact in every dtype we normalise in, and takes the reciprocal of the largest and smallest
# float32 out of the subnormal range, where XLA flushes it to zero.
_SHIFT = 2.0**64


def newton_schulz(
    x: Inexact[Array | np.ndarray, "*batch m n"],
    coefficients: Coefficients = "jordan",
    *,
    steps: int | None = None,
    method: str = "auto",
    dtype: Any = "auto",
    preconditioning: str = "frobenius",
    eps: Scalar = 1e-8,
) -> Inexact[Array, "*batch m n"]:
    """Pushes the singular values of each matrix towards one.

    With `x = U S Vᴴ` this is `U p(S / ‖x‖) Vᴴ`, where p composes `a s + b s³ + c s⁵`, one row of
    coefficients each. The scale of a matrix does not matter (entries from 1e-33 to 1e38), and no
    matrix of a batch influences another: a NaN or Inf loses its own matrix only.

    Args:
      x: Matrices, real or complex.
      coefficients: Preset name, `(a, b, c)` rows, or one row for every step; see `ns_coefficients`.
      steps: Number of steps. Fewer than there are rows take the first ones, for more the last row
        repeats. None: as many as rows, five for a single row.
      method: `"standard"`, or `"gram"`, which iterates on the short side alone: less work for
        matrices that are not square, with errors up to a hundred times those of the standard form
        in float32, still a hundred times below those of bfloat16, and about the same in 16 bits
        (`test_iterations.py`, `test_leakage.py`). `"auto"` takes the form with fewer FLOPs for the
        shape, the rows, the dtype and the backend, which for square matrices is the standard one.
        Who wants the last digits says "standard".
      dtype: What the products are computed in, or `"auto"`: float32 on CPU, bfloat16 on TPU and
        GPU, on neither of which it has been timed yet. Products accumulate in float32 at least.
        float64 and complex matrices stay what they are under "auto".
      preconditioning: How a matrix is brought to singular values of at most one: `"frobenius"`,
        divide by its Frobenius norm; `"spectral"`, by its largest singular value; `"schatten"`, by
        its Schatten-4 norm; `"aol"`, scale each row of the short side, which changes the singular
        vectors a little.
      eps: Added to the norm of the matrix after its largest magnitude has been made one, so it is
        relative.

    Returns:
      Shape and dtype of `x`. Singular values in [0.68, 1.21] for "jordan" and those that are at
      least 3e-3 of the norm (`test_published_numbers.py`). A zero matrix gives zero.

    Raises:
      ValueError: if `x` has fewer than two axes, or a name or the coefficients are not known.
      TypeError: if `x` is not floating or complex.

    Example:
      >>> import muonclip_jax as mc, jax.numpy as jnp
      >>> mc.newton_schulz(jnp.diag(jnp.array([1.0, 2.0])), (1.5, -0.5, 0.0), steps=12).round(3)
      Array([[1., 0.],
             [0., 1.]], dtype=float32)

    References:
      Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, function
      `zeropower_via_newtonschulz5`. Preconditioning: Boissin et al. 2025, arXiv 2512.04632 (aol);
      Grishina et al. 2025, arXiv 2506.10935 (schatten).
    """
    x = jnp.asarray(x)
    rows = as_rows(coefficients, steps)
    check_choice("newton_schulz", "method", method, METHODS)
    check_choice("newton_schulz", "preconditioning", preconditioning, PRECONDITIONINGS)
    if x.ndim < 2:
        raise ValueError(f"newton_schulz: x must have at least two axes, got shape {x.shape}.")
    return Orthogonaliser(rows, method, dtype, preconditioning, eps)(x)


class Orthogonaliser(NamedTuple):
    """`newton_schulz` with its settings, checked, and with what the devices have to do with it.

    Attributes:
      rows: `(a, b, c)`, one row a step.
      method: See `newton_schulz`, and so for the others.
      dtype: What the products are computed in.
      preconditioning: How a matrix is brought to singular values of at most one.
      eps: Added to the norm.
      platform: Where it will run; None where JAX runs by default.
    """

    rows: tuple[Row, ...]
    method: str
    dtype: Any
    preconditioning: str
    eps: Scalar
    platform: str | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Orthogonalises (..., m, n), whole matrices."""
        if x.size == 0:
            return x
        platform = self.platform or jax.default_backend()
        computed = self.compute_dtype(x.dtype)
        blocks = block_count(min(x.shape[-2:]), platform)
        return _iterate(
            x,
            self._eps(x),
            rows=self._rows(computed),
            method=self.form(x.shape, computed, blocks),
            blocks=blocks,
            compute_dtype=computed,
            preconditioning=self.preconditioning,
            at_once=_matrices_at_once(x.shape, platform),
        )

    def shared(self, x: jax.Array, team: Team, shape: Sequence[int]) -> jax.Array:
        """Orthogonalises (..., m, n / team.size), this device's columns of matrices of `shape`."""
        computed = self.compute_dtype(x.dtype)
        orthogonal = _orthogonalise(
            x,
            rows=self._rows(computed),
            method=self.form(shape, computed, blocks=1),
            blocks=1,
            compute_dtype=computed,
            preconditioning=self.preconditioning,
            eps=self._eps(x),
            team=team,
        )
        return orthogonal.astype(x.dtype)

    def compute_dtype(self, dtype: Any) -> Any:
        """Decides what the products of matrices of `dtype` are computed in."""
        return compute_dtype(dtype, self.dtype, self.platform)

    def flops(self, shape: Sequence[int], dtype: Any) -> float:
        """Counts the FLOPs of one matrix of this shape and dtype (a multiply-add is two)."""
        n, m = sorted(shape[-2:])
        if n == 0:
            return 0.0
        computed = self.compute_dtype(dtype)
        blocks = block_count(n, self.platform)
        rows = self._rows(computed)
        if self.form(shape, computed, blocks) == "gram":
            return gram_cost(restart_windows(rows, computed), m / n, blocks) * n**3
        return standard_cost(rows, m / n, blocks) * n**3

    def form(self, shape: Sequence[int], computed: Any, blocks: int) -> str:
        """Names the form that `method` stands for."""
        if self.method != "auto":
            return self.method
        return _cheaper(self._rows(computed), shape, computed, blocks)

    def _rows(self, computed: Any) -> tuple[Row, ...]:
        return for_sixteen_bits(self.rows) if jnp.finfo(computed).bits == 16 else self.rows

    def _eps(self, x: jax.Array) -> jax.Array:
        return jnp.asarray(self.eps, accumulator(x.real.dtype))


def compute_dtype(dtype: Any, wanted: Any = "auto", platform: str | None = None) -> Any:
    """Decides what the products of a matrix are computed in; resolved while tracing.

    Args:
      dtype: Dtype of the matrix.
      wanted: A dtype, or `"auto"`.
      platform: Where it will run; None where JAX runs by default.

    Returns:
      The compute dtype.

    Raises:
      TypeError: if `dtype` is not floating or complex, or a complex matrix would lose its
        imaginary part.

    Example:
      >>> compute_dtype(jnp.float64)
      dtype('float64')
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"newton_schulz: x must be floating or complex, got {dtype}.")
    wide = dtype == jnp.float64 or jnp.issubdtype(dtype, jnp.complexfloating)
    if isinstance(wanted, str) and wanted == "auto":
        return dtype if wide else jnp.dtype(_COMPUTE_DTYPES[platform or jax.default_backend()])
    wanted = jnp.dtype(wanted)
    if (
        not jnp.issubdtype(wanted, jnp.inexact)
        or jnp.finfo(wanted).bits < 16
        or (
            jnp.issubdtype(dtype, jnp.complexfloating)
            and not jnp.issubdtype(wanted, jnp.complexfloating)
        )
    ):
        raise TypeError(f"newton_schulz: matrices of {dtype} cannot be computed in {wanted}.")
    return wanted


def block_count(n: int, platform: str | None = None) -> int:
    """Decides into how many block rows a Hermitian n x n matrix is cut; resolved while tracing.

    Args:
      n: Short side.
      platform: Where it will run; None where JAX runs by default.

    Returns:
      2 where blocks are known to pay and n is even, else 1.

    Example:
      >>> block_count(2), block_count(769)
      (1, 1)
    """
    smallest = _SMALLEST_IN_BLOCKS.get(platform or jax.default_backend(), math.inf)
    return 2 if n >= smallest and n % 2 == 0 else 1


def _cheaper(rows: Sequence[Row], shape: Sequence[int], compute_dtype: Any, blocks: int) -> str:
    """Names the form with fewer FLOPs, the standard one if they are equal."""
    n, m = sorted(shape[-2:])
    gram_flops = gram_cost(restart_windows(rows, compute_dtype), m / n, blocks)
    return "gram" if gram_flops < standard_cost(rows, m / n, blocks) else "standard"


def _matrices_at_once(shape: Sequence[int], platform: str) -> int:
    """Decides how many matrices one product takes; resolved while tracing."""
    # XLA:CPU gains little from a batch and needs its temporaries at once, many times those of
    # one matrix (benchmarks/results/one_by_one.json).
    if platform == "cpu" or (platform == "tpu" and min(shape[-2:]) >= _ALONE_ON_TPU):
        return 1
    return max(1, MOST_BYTES // (4 * math.prod(shape[-2:])))


@functools.partial(
    jax.jit,
    static_argnames=(
        "rows",
        "method",
        "blocks",
        "compute_dtype",
        "preconditioning",
        "at_once",
    ),
)
def _iterate(x: jax.Array, eps: jax.Array, *, at_once: int, **settings: Any) -> jax.Array:
    """Orthogonalises all matrices in one batched call, or `at_once` of them after the others."""
    f = functools.partial(_orthogonalise, eps=eps, **settings)
    if at_once == 1:
        for _ in x.shape[:-2]:
            f = functools.partial(jax.lax.map, f)
    elif math.prod(x.shape[:-2]) > at_once:
        stack = x.reshape(-1, *x.shape[-2:])
        return jax.lax.map(f, stack, batch_size=at_once).reshape(x.shape).astype(x.dtype)
    return f(x).astype(x.dtype)


def _orthogonalise(
    x: jax.Array,
    *,
    rows: Sequence[Row],
    method: str,
    blocks: int,
    compute_dtype: Any,
    preconditioning: str,
    eps: jax.Array,
    team: Team | None = None,
) -> jax.Array:
    # A team has its matrices on the short side already, and sees some columns of them only.
    tall = (
        team is None and x.shape[-2] > x.shape[-1]
    )  # A = X Xᴴ is smaller on the short side, and f(Xᵀ) = f(X)ᵀ
    x = _normalise(x.mT if tall else x, preconditioning, eps, team)
    x = x.astype(compute_dtype)
    if jnp.finfo(compute_dtype).bits == 16:
        # Else the compiler normalises it again, in float32, inside of every product.
        x = jax.lax.optimization_barrier(x)
    if method == "gram":
        x = gram(x, restart_windows(rows, compute_dtype), preconditioning, blocks, team)
    else:
        x = standard(x, rows, preconditioning, blocks, team)
    return x.mT if tall else x


def _normalise(x: jax.Array, preconditioning: str, eps: jax.Array, team: Team | None) -> jax.Array:
    """Divides each matrix by its norm, at any scale; zero stays zero.

    A squared norm of the matrix as it comes would overflow at 1e19 and vanish at 1e-23 in float32,
    so its largest magnitude is made one first.
    """
    x = x.astype(accumulator(x.dtype))
    magnitude = jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag)) if jnp.iscomplexobj(x) else jnp.abs(x)
    # No gradient: the result does not depend on this factor.
    largest = jax.lax.stop_gradient(jnp.max(magnitude, axis=(-2, -1), keepdims=True))
    largest = team.max(largest) if team else largest
    shift = jnp.where(largest > 1, 1 / _SHIFT, _SHIFT).astype(largest.dtype)
    x = (x * shift.astype(x.dtype)) / nonzero(largest * shift).astype(x.dtype)
    if preconditioning == "spectral" and team:
        A = team.sum(multiply(x, x.mT.conj()))
        norm = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(A)[..., -1:, None], 0))
    elif preconditioning == "spectral":
        norm = jnp.linalg.svd(x, compute_uv=False)[..., :1, None]
    elif team:
        norm = jnp.sqrt(team.sum(jnp.sum(jnp.abs(x) ** 2, axis=(-2, -1), keepdims=True)))
    else:
        norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    return x / nonzero(norm + eps).astype(x.dtype)

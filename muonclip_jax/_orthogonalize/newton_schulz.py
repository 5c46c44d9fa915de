"""Newton-Schulz iteration: pushes the singular values of a matrix towards one with products alone.

A matrix is first scaled to singular values of at most one; `iterations` has the steps. Source:
Jordan et al. 2024, "Muon", https://kellerjordan.github.io/posts/muon/.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact

from muonclip_jax._common.dtypes import accumulator
from muonclip_jax._common.settings import check_settings
from muonclip_jax._common.types import Row, Scalar
from muonclip_jax._orthogonalize.batching import MOST_BYTES
from muonclip_jax._orthogonalize.coefficients import (
    Coefficients,
    as_rows,
    for_sixteen_bits,
    is_single_row,
    is_traced,
    known_while_running,
    traced_rows,
)
from muonclip_jax._orthogonalize.iterations import (
    gram,
    gram_cost,
    restart_windows,
    standard,
    standard_cost,
)
from muonclip_jax._orthogonalize.normalize import normalize
from muonclip_jax._orthogonalize.settings import COEFFICIENT_RULES
from muonclip_jax._orthogonalize.team import Team

# The compute dtype of "auto". TPU: its matrix units multiply bfloat16. GPU: not measured yet.
_COMPUTE_DTYPES = {"cpu": jnp.float32, "tpu": jnp.bfloat16, "gpu": jnp.bfloat16}

# The short side from which Hermitian products are formed by 2 x 2 blocks, three quarters of their
# FLOPs, where that has been measured to be faster: benchmarks/results/blocks.json.
_SMALLEST_IN_BLOCKS = {"cpu": 384}

# The short side from which a TPU takes matrices one after the other. Its compiler estimates 2.44
# million cycles instead of 3.18 for each of eight 2048 x 7168 matrices on v5p, 10.1, not 11.9, for
# each of two of 4096, with a tenth of the temporary memory.
_ALONE_ON_TPU = 1024


def newton_schulz(
    x: Inexact[Array | np.ndarray, "*batch m n"],
    coefficients: Coefficients = "jordan",
    *,
    steps: int | jax.Array | None = None,
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
    check_settings("newton_schulz", locals(), optional=("steps",), rules=COEFFICIENT_RULES)
    x = jnp.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"newton_schulz: x must have at least two axes, got shape {x.shape}.")
    return orthogonalizer(coefficients, steps, method, dtype, preconditioning, eps)(x)


class Traced(NamedTuple):
    """The settings that may be traced; an argument of each compiled function.

    Attributes:
      eps: Added to the norm.
      steps: Number of steps; None if it is known while tracing.
      rows: Coefficients, `[steps, 3]`; None if they are known while tracing.
    """

    eps: Any
    steps: Any = None
    rows: Any = None


class Orthogonalizer(NamedTuple):
    """`newton_schulz` with its settings, checked, and with what the devices have to do with it.

    Attributes:
      rows: `(a, b, c)`, one row a step. Of traced coefficients, as many rows of ones; of a traced
        number of steps, the row of every step.
      method: See `newton_schulz`, and so for the others.
      dtype: What the products are computed in.
      preconditioning: How a matrix is brought to singular values of at most one.
      traced: The settings that may be traced.
      platform: Where it will run; None where JAX runs by default.
    """

    rows: tuple[Row, ...]
    method: str
    dtype: Any
    preconditioning: str
    traced: Traced
    platform: str | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Orthogonalizes (..., m, n), whole matrices."""
        if x.size == 0:
            return x
        platform = self.platform or jax.default_backend()
        computed = self.compute_dtype(x.dtype)
        blocks = block_count(min(x.shape[-2:]), platform)
        return _iterate(
            x,
            self.traced,
            rows=self._rows(computed),
            method=self.form(x.shape, computed, blocks),
            blocks=blocks,
            compute_dtype=computed,
            preconditioning=self.preconditioning,
            at_once=_matrices_at_once(x.shape, platform),
        )

    def shared(self, x: jax.Array, team: Team, shape: Sequence[int]) -> jax.Array:
        """Orthogonalizes (..., m, n / team.size), this device's columns of matrices of `shape`."""
        computed = self.compute_dtype(x.dtype)
        orthogonal = _orthogonalize(
            x,
            rows=self._rows(computed),
            method=self.form(shape, computed, blocks=1),
            blocks=1,
            compute_dtype=computed,
            preconditioning=self.preconditioning,
            traced=self.traced,
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
        """Names the form that `method` stands for; of "auto", the one with fewer FLOPs."""
        if self.traced.steps is not None or self.traced.rows is not None:
            return "standard"  # the restarts of the other one depend on numbers
        if self.method != "auto":
            return self.method
        n, m = sorted(shape[-2:])
        rows = self._rows(computed)
        gram_flops = gram_cost(restart_windows(rows, computed), m / n, blocks)
        return "gram" if gram_flops < standard_cost(rows, m / n, blocks) else "standard"

    def _rows(self, computed: Any) -> tuple[Row, ...]:
        return for_sixteen_bits(self.rows) if jnp.finfo(computed).bits == 16 else self.rows


def orthogonalizer(
    coefficients: Coefficients,
    steps: Any,
    method: str,
    dtype: Any,
    preconditioning: str,
    eps: Scalar,
) -> Orthogonalizer:
    """Builds an `Orthogonalizer` from the arguments of `newton_schulz`, which are checked."""
    loop = steps if is_traced(steps) else None
    if is_traced(coefficients):
        table = traced_rows(coefficients, steps)
        rows = ((1.0, 1.0, 1.0),) * len(table)
    else:
        table = None
        rows = as_rows(
            coefficients, steps if loop is None or not is_single_row(coefficients) else 1
        )
    return Orthogonalizer(rows, method, dtype, preconditioning, Traced(eps, loop, table))


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
def _iterate(x: jax.Array, traced: Traced, *, at_once: int, **settings: Any) -> jax.Array:
    """Orthogonalizes all matrices in one batched call, or `at_once` of them after the others."""
    f = functools.partial(_orthogonalize, traced=traced, **settings)
    if at_once == 1:
        for _ in x.shape[:-2]:
            f = functools.partial(jax.lax.map, f)
    elif math.prod(x.shape[:-2]) > at_once:
        stack = x.reshape(-1, *x.shape[-2:])
        return jax.lax.map(f, stack, batch_size=at_once).reshape(x.shape).astype(x.dtype)
    return f(x).astype(x.dtype)


def _orthogonalize(
    x: jax.Array,
    *,
    rows: Any,
    method: str,
    blocks: int,
    compute_dtype: Any,
    preconditioning: str,
    traced: Traced,
    team: Team | None = None,
) -> jax.Array:
    eps = jnp.asarray(traced.eps, accumulator(x.real.dtype))
    # A = X Xᴴ is smaller on the short side, and f(Xᵀ) = f(X)ᵀ. A team has its matrices on the short
    # side already, and sees some columns of them only.
    tall = team is None and x.shape[-2] > x.shape[-1]
    x = normalize(x.mT if tall else x, preconditioning, eps, team)
    x = x.astype(compute_dtype)
    if jnp.finfo(compute_dtype).bits == 16:
        # Else the compiler normalizes it again, in float32, inside of every product.
        x = jax.lax.optimization_barrier(x)
    if method == "gram":
        x = gram(x, restart_windows(rows, compute_dtype), preconditioning, blocks, team)
    else:
        if traced.rows is not None:
            rows = known_while_running(traced.rows, compute_dtype)
        x = standard(x, rows, preconditioning, blocks, team, traced.steps)
    return x.mT if tall else x

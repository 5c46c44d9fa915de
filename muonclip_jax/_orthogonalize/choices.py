"""How to compute Newton-Schulz: the dtype, the method and the batches, by counting alone.

Everything here is decided while tracing, from numbers. No array is read.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp

from muonclip_jax._common.types import Step
from muonclip_jax._orthogonalize.symmetric import Products, is_narrow
from muonclip_jax._orthogonalize.tiles import fastest

# The compute dtype of "auto". TPU: its matrix units multiply bfloat16. GPU: not measured yet.
_COMPUTE_DTYPES = {"cpu": jnp.float32, "tpu": jnp.bfloat16, "gpu": jnp.bfloat16}

# The short side from which symmetric products are mirrored, three quarters of their FLOPs, on the
# platforms where that has been measured to be faster: benchmarks/results/mirrored_products.json.
_SMALLEST_MIRRORED = {"cpu": 384}

# The short side from which a TPU computes one matrix at a time. Its compiler estimates 2.44 million
# cycles instead of 3.18 for each of eight 2048 x 7168 matrices on v5p, 10.1, not 11.9, for each of
# two of 4096, with a tenth of the temporary memory.
_ONE_AT_A_TIME_ON_TPU = 1024

# Bytes of the matrices in one batch. Their temporaries are two to four times larger.
MAX_BATCH_BYTES = 2**30

# Steps between two restarts of the Gram iteration.
Windows: TypeAlias = tuple[tuple[Step, ...], ...]

# The largest product of slopes at zero in a window of the Gram iteration, by the bits of a real
# number: the slopes amplify rounding errors.
_MAX_SLOPE = {16: 64.0, 32: 500.0, 64: 1e6}
# The largest number of steps in a window, in 16 bits. The first starts from an X without errors.
_MAX_STEPS_FIRST, _MAX_STEPS_LATER = 3, 2


class Choice(NamedTuple):
    """How matrices of one shape and dtype are orthogonalized.

    Attributes:
      dtype: Dtype of the products.
      coefficients: `(a, b, c)` of each step.
      method: `"standard"` or `"gram"`.
      products: How symmetric products are computed.
      batch_size: Matrices in one batch.
      is_shared: Whether several devices share a matrix.
    """

    dtype: Any
    coefficients: tuple[Step, ...]
    method: str
    products: Products
    batch_size: int
    is_shared: bool = False

    @property
    def windows(self) -> Windows:
        """The steps of the Gram iteration between restarts."""
        return restart_windows(self.coefficients, self.dtype)

    def flops(self, n: int, m: int) -> float:
        """Counts the FLOPs of one n x m matrix, n ≤ m (a multiply-add is two)."""
        if n == 0:
            return 0.0
        fraction = self.products.flop_fraction(n, self.dtype)
        # Devices that share a matrix compute X Xᴴ in part, and their rows of A B in full.
        fractions = (fraction, 1.0 if self.is_shared else fraction)
        if self.method == "gram":
            return gram_cost(self.windows, m / n, *fractions) * n**3
        return standard_cost(self.coefficients, m / n, *fractions) * n**3


def choose(
    n: int,
    m: int,
    dtype: Any,
    coefficients: tuple[Step, ...],
    method: str,
    platform: str,
    is_shared: bool = False,
    kernel: str | None = None,
) -> Choice:
    """Decides how to orthogonalize n x m matrices, n ≤ m.

    Args:
      n: Short side.
      m: Long side.
      dtype: Dtype of the products, see `compute_dtype`.
      coefficients: `(a, b, c)` of each step.
      method: `"standard"`, `"gram"`, or `"auto"` for the one with fewer FLOPs.
      platform: `"cpu"`, `"tpu"` or `"gpu"`.
      is_shared: Whether several devices share a matrix.
      kernel: The kind of device whose kernel computes symmetric products; None for XLA's.

    Returns:
      The choice.

    Example:
      >>> coefficients = ((3.4445, -4.775, 2.0315),) * 5
      >>> choose(64, 256, jnp.float32, coefficients, "auto", "cpu").method
      'gram'
    """
    if kernel and not has_kernel(n, m, dtype, kernel):
        kernel = None
    mirror = not is_shared and n >= _SMALLEST_MIRRORED.get(platform, math.inf) and n % 2 == 0
    products = Products(mirror and not kernel, kernel)
    by_one = platform == "cpu" or (platform == "tpu" and n >= _ONE_AT_A_TIME_ON_TPU)
    batch_size = 1 if by_one else max(1, MAX_BATCH_BYTES // (4 * max(1, n * m)))
    standard, gram = (
        Choice(jnp.dtype(dtype), coefficients, name, products, batch_size, is_shared)
        for name in ("standard", "gram")
    )
    if method == "auto":
        return gram if gram.flops(n, m) < standard.flops(n, m) else standard
    return gram if method == "gram" else standard


def has_kernel(n: int, m: int, dtype: Any, kind: str) -> bool:
    """Whether the kernel of a kind of device computes the products of n x m matrices of a dtype."""
    dtype = jnp.dtype(dtype)
    known = dtype in (jnp.bfloat16, jnp.float32)
    return known and all(fastest(n, k, dtype.itemsize, kind) is not None for k in (n, m))


def compute_dtype(dtype: Any, requested: Any, platform: str) -> Any:
    """Decides the dtype of the products of a matrix.

    Args:
      dtype: Dtype of the matrix.
      requested: A dtype, or `"auto"`.
      platform: `"cpu"`, `"tpu"` or `"gpu"`.

    Returns:
      The compute dtype.

    Raises:
      TypeError: if `dtype` is not floating or complex, or a complex matrix would lose its
        imaginary part.

    Example:
      >>> compute_dtype(jnp.float64, "auto", "tpu")
      dtype('float64')
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"newton_schulz: x must be floating or complex, got {dtype}.")
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    if isinstance(requested, str) and requested == "auto":
        is_wide = dtype == jnp.float64 or is_complex
        return dtype if is_wide else jnp.dtype(_COMPUTE_DTYPES[platform])
    requested = jnp.dtype(requested)
    if (
        not jnp.issubdtype(requested, jnp.inexact)
        or jnp.finfo(requested).bits < 16
        or (is_complex and not jnp.issubdtype(requested, jnp.complexfloating))
    ):
        raise TypeError(f"newton_schulz: matrices of {dtype} cannot be computed in {requested}.")
    return requested


def restart_windows(coefficients: Sequence[Step], dtype: Any) -> Windows:
    """Cuts the steps into windows, filled from the first step on.

    The first steps are the steep ones: restarts soon after them leave the least to amplify.

    Args:
      coefficients: `(a, b, c)` of each step.
      dtype: Dtype of the products.

    Returns:
      The steps of each window; the Gram iteration restarts before each but the first.

    Example:
      >>> [len(window) for window in restart_windows([(3.4, -4.8, 2.0)] * 5, jnp.bfloat16)]
      [3, 2]
    """
    windows: list[tuple[Step, ...]] = [()]
    for step in coefficients:
        longer = (*windows[-1], step)
        max_steps = math.inf
        if is_narrow(dtype):
            max_steps = _MAX_STEPS_FIRST if len(windows) == 1 else _MAX_STEPS_LATER
        slope = math.prod(abs(a) for a, _, _ in longer)
        if len(longer) <= max_steps and slope <= _MAX_SLOPE[jnp.finfo(dtype).bits]:
            windows[-1] = longer
        else:
            windows.append((step,))
    return tuple(window for window in windows if window)


def standard_cost(
    coefficients: Sequence[Step], aspect: float, g: float = 1.0, s: float | None = None
) -> float:
    """Counts the work of the standard iteration, in n³ FLOPs (a multiply-add is two).

    Args:
      coefficients: `(a, b, c)` of each step.
      aspect: m / n, at least 1.
      g: FLOPs of X Xᴴ, as a fraction of a product that computes every number.
      s: The same for A B of symmetric A and B; None for g.

    Returns:
      2 aspect (1 + g) + 2 s for each step, without the last 2 s where c = 0.

    Example:
      >>> standard_cost([(3.4, -4.8, 2.0)] * 5, aspect=4.0)
      90.0
    """
    s = g if s is None else s
    return sum(2 * aspect * (1 + g) + (2 * s if c else 0.0) for _, _, c in coefficients)


def gram_cost(windows: Windows, aspect: float, g: float = 1.0, s: float | None = None) -> float:
    """Counts the work of the Gram iteration, in n³ FLOPs (a multiply-add is two).

    Args:
      windows: See `restart_windows`.
      aspect: m / n, at least 1.
      g: See `standard_cost`.
      s: See `standard_cost`.

    Returns:
      2 aspect (1 + g) for each window, 2 s for each R R, 2 for each Y Q and 4 s for each new R.

    Example:
      >>> gram_cost((((3.4, -4.8, 2.0),) * 5,), aspect=4.0)
      50.0
    """
    s = g if s is None else s
    squares = sum(2 * s for window in windows for _, _, c in window if c)
    return squares + sum(
        2 * aspect * (1 + g) + (2 + 4 * s) * (len(window) - 1) for window in windows
    )

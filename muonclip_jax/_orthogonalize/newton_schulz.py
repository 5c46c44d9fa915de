"""Newton-Schulz iteration: pushes the singular values of a matrix towards one with products alone.

A matrix is first scaled to singular values of at most one, here, and then iterated on
(`iterations.py`). `choices.py` decides how. Source: Jordan et al. 2024, "Muon",
https://kellerjordan.github.io/posts/muon/.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact

from muonclip_jax._common.dtypes import accumulator
from muonclip_jax._common.settings import check_settings
from muonclip_jax._common.types import Scalar, Step
from muonclip_jax._orthogonalize import choices
from muonclip_jax._orthogonalize.coefficients import (
    Coefficients,
    as_coefficients,
    as_traced_coefficients,
    for_sixteen_bits,
    is_single_step,
    is_traced,
    traced_for_sixteen_bits,
)
from muonclip_jax._orthogonalize.column_shards import ColumnShards
from muonclip_jax._orthogonalize.dimension_numbers import LAST_TWO_AXES, axes_of
from muonclip_jax._orthogonalize.divisors import SHIFT, nonzero
from muonclip_jax._orthogonalize.iterations import gram, standard
from muonclip_jax._orthogonalize.matrices import orthogonalize_leaves
from muonclip_jax._orthogonalize.settings import COEFFICIENT_RULES
from muonclip_jax._orthogonalize.symmetric import (
    Matrix,
    Products,
    Symmetric,
    gram_matrix,
    is_narrow,
    rounded,
    unrounded_gram_matrix,
)
from muonclip_jax._orthogonalize.tiles import DEFAULT_KIND


def newton_schulz(
    x: Inexact[Array | np.ndarray, "*batch m n"],
    coefficients: Coefficients = "jordan",
    *,
    steps: int | jax.Array | None = None,
    method: str = "auto",
    dtype: Any = "auto",
    preconditioning: str = "frobenius",
    eps: Scalar = 1e-8,
    products: str = "auto",
) -> Inexact[Array, "*batch m n"]:
    """Pushes the singular values of each matrix towards one.

    With `x = U S Vᴴ` this returns `U p(S / ‖x‖) Vᴴ`, where p composes `a s + b s³ + c s⁵` of all
    steps. The scale of a matrix does not matter (entries from 1e-33 to 1e38), and matrices of a
    batch are independent: a NaN or Inf affects its own matrix only.

    Args:
      x: Matrices, real or complex.
      coefficients: Name of a preset, `(a, b, c)` for every step, or a sequence of `(a, b, c)`, one
        for each step; see `ns_coefficients`.
      steps: Number of steps. Fewer than there are coefficients keep the first ones; for more, the
        last `(a, b, c)` repeats. None: one step for each `(a, b, c)`, five for a single one. A
        traced number requires a single `(a, b, c)`, and runs at least one step.
      method: `"standard"`, or `"gram"`, which iterates on the short side alone: less work for
        matrices that are not square. Its errors are up to a hundred times larger than the standard
        ones in float32, a hundred times smaller than in bfloat16, and about equal in 16 bits
        (`test_iterations.py`, `test_leakage.py`). `"auto"` selects the method with fewer FLOPs, and
        the standard one for square matrices. Use `"standard"` for the highest accuracy.
      dtype: Dtype of the products, or `"auto"`: float32 on CPU, bfloat16 on TPU and GPU, on neither
        of which it has been timed yet. Products accumulate in float32 at least. With `"auto"`,
        float64 and complex matrices keep their dtype.
      preconditioning: How to scale a matrix to singular values of at most one: `"frobenius"`,
        divide by its Frobenius norm; `"spectral"`, by its largest singular value; `"schatten"`, by
        its Schatten-4 norm; `"aol"`, scale each row of the short side, which changes the singular
        vectors a little.
      eps: Added to the norm of the matrix after its largest magnitude has been made one, so it is
        relative.
      products: Computes the matrix products. `"xla"`: XLA. `"pallas"`: a kernel that computes, for
        the two of three products of a step that are symmetric, little more than half of the
        entries, see `docs/numerics.md`. It runs for real bfloat16 and float32 products and a short
        side of at least 1024 (v5e, v5p, NVIDIA GPUs) or 2048 (v6e, TPU7x); all others are XLA's,
        and on a GPU also those whose rows do not start at multiples of 16 bytes. It has no
        derivative. On a CPU the TPU kernel is interpreted, for tests. `"auto"` is `"xla"`, as
        nobody has timed the kernels yet: `python -m benchmarks.tpu_kernel` and
        `benchmarks.gpu_kernel` time them on your TPU or GPU.

    Returns:
      Shape and dtype of `x`. For "jordan", singular values of at least 3e-3 of the norm end in
      [0.68, 1.21] (`test_published_numbers.py`). A zero matrix gives zero.

    Raises:
      ValueError: if `x` has fewer than two axes, a name or the coefficients are not known, or
        there is no kernel for the device.
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
    orthogonalize = orthogonalizer(coefficients, steps, method, dtype, preconditioning, products)
    axes = axes_of(LAST_TWO_AXES, x.ndim)
    return orthogonalize_leaves(lambda X: orthogonalize(X, eps), [x], [axes])[0]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("traced_steps", "traced_coefficients"),
    meta_fields=(
        *("coefficients", "method", "dtype", "preconditioning", "products"),
        *("platform", "device_kind"),
    ),
)
@dataclasses.dataclass(frozen=True)
class Orthogonalizer:
    """The checked settings of `newton_schulz`, built once by a public function and passed on.

    It is a pytree of the settings that are traced, and so an argument of compiled functions.

    Attributes:
      coefficients: `(a, b, c)` of each step. Placeholders of ones, one per step, if they are
        traced; a single one if the number of steps is traced.
      method: See `newton_schulz`, as for the next two.
      dtype: Dtype of the products.
      preconditioning: How to scale a matrix to singular values of at most one.
      products: What computes symmetric products.
      platform: The platform of the mesh; None for the default of JAX.
      device_kind: JAX's name of the devices of the mesh.
      traced_steps: Number of steps if it is traced.
      traced_coefficients: Coefficients, `[steps, 3]`, if they are traced.
    """

    coefficients: tuple[Step, ...]
    method: str = "auto"
    dtype: Any = "auto"
    preconditioning: str = "frobenius"
    products: str = "auto"
    platform: str | None = None
    device_kind: str | None = None
    traced_steps: Any = None
    traced_coefficients: Any = None

    def __call__(
        self, X: jax.Array, eps: Scalar | None, shards: ColumnShards | None = None
    ) -> jax.Array:
        """Orthogonalizes matrices.

        Args:
          X: `[..., n, m]` with n ≤ m.
          eps: Added to the norm; None if `X` is `tpu_shards.normalized`.
          shards: The devices that share each matrix; `X` is then this device's columns.

        Returns:
          Shape and dtype of `X`.
        """
        if X.size == 0:
            return X
        n, m = X.shape[-2:]
        if shards:
            choice = self.choose(n, m * shards.devices, X.dtype, is_shared=True)
            return _orthogonalize(X, self, eps, choice, shards)
        return _in_batches(X, self, eps, choice=self.choose(n, m, X.dtype))

    def on(self, platform: str | None, device_kind: str | None) -> "Orthogonalizer":
        """Returns the same settings for the devices of a mesh."""
        return dataclasses.replace(self, platform=platform, device_kind=device_kind)

    def compute_dtype(self, dtype: Any) -> Any:
        """Decides the dtype of the products of matrices of `dtype`."""
        return choices.compute_dtype(dtype, self.dtype, self._platform)

    def flops(self, n: int, m: int, dtype: Any, is_shared: bool = False) -> float:
        """Counts the FLOPs of one n x m matrix, n ≤ m, on all devices that share it."""
        return self.choose(n, m, dtype, is_shared).flops(n, m)

    def choose(self, n: int, m: int, dtype: Any, is_shared: bool = False) -> choices.Choice:
        """Decides how to orthogonalize n x m matrices of `dtype`, n ≤ m."""
        computed = self.compute_dtype(dtype)
        narrow = is_narrow(computed)
        coefficients = for_sixteen_bits(self.coefficients) if narrow else self.coefficients
        # Restarts depend on the coefficients.
        method = "standard" if jax.tree.leaves(self) else self.method
        platform, kernel = self._platform, self._kernel()
        return choices.choose(n, m, computed, coefficients, method, platform, is_shared, kernel)

    def _kernel(self) -> str | None:
        """Returns the kind of device whose kernel computes symmetric products; None without it."""
        if self.products != "pallas":
            return None
        if self._platform == "cpu":
            return DEFAULT_KIND
        return self.device_kind or jax.devices()[0].device_kind

    @property
    def _platform(self) -> str:
        return self.platform or jax.default_backend()


def orthogonalizer(
    coefficients: Coefficients,
    steps: Any,
    method: str,
    dtype: Any,
    preconditioning: str,
    products: str = "auto",
) -> Orthogonalizer:
    """Builds an `Orthogonalizer` from checked arguments of `newton_schulz`."""
    traced_steps = steps if is_traced(steps) else None
    traced_coefficients = None
    if is_traced(coefficients):
        traced_coefficients = as_traced_coefficients(coefficients, steps)
        known = ((1.0, 1.0, 1.0),) * len(traced_coefficients)
    elif traced_steps is not None and is_single_step(coefficients):
        known = as_coefficients(coefficients, 1)
    else:
        known = as_coefficients(coefficients, steps)
    traced = {"traced_steps": traced_steps, "traced_coefficients": traced_coefficients}
    return Orthogonalizer(known, method, dtype, preconditioning, products, **traced)


@functools.partial(jax.jit, static_argnames="choice")
def _in_batches(
    X: jax.Array, settings: Orthogonalizer, eps: Scalar | None, *, choice: choices.Choice
) -> jax.Array:
    """Orthogonalizes `choice.batch_size` matrices at a time."""
    f = functools.partial(_orthogonalize, settings=settings, eps=eps, choice=choice)
    if choice.batch_size == 1:
        for _ in X.shape[:-2]:
            f = functools.partial(jax.lax.map, f)
    elif math.prod(X.shape[:-2]) > choice.batch_size:
        stack = X.reshape(-1, *X.shape[-2:])
        return jax.lax.map(f, stack, batch_size=choice.batch_size).reshape(X.shape)
    return f(X)


def _orthogonalize(
    X: jax.Array,
    settings: Orthogonalizer,
    eps: Scalar | None,
    choice: choices.Choice,
    shards: ColumnShards | None = None,
) -> jax.Array:
    """Normalizes, iterates in the compute dtype, and rounds to the dtype of X."""
    dtype, products = X.dtype, choice.products._replace(shards=shards)
    if eps is not None:
        eps = jnp.asarray(eps, accumulator(X.real.dtype))
        X = _normalize(X, settings.preconditioning, eps, shards).astype(choice.dtype)
        if is_narrow(choice.dtype):
            # Otherwise the compiler normalizes X again, in float32, inside every product.
            X = jax.lax.optimization_barrier(X)
    matrix, A = _precondition(X, settings.preconditioning, products)
    if choice.method == "gram":
        return gram(matrix, A, choice.windows).astype(dtype)
    coefficients = choice.coefficients
    if settings.traced_coefficients is not None:
        coefficients = traced_for_sixteen_bits(settings.traced_coefficients, choice.dtype)
    return standard(matrix, A, coefficients, settings.traced_steps).astype(dtype)


def _normalize(
    X: jax.Array, preconditioning: str, eps: jax.Array, shards: ColumnShards | None
) -> jax.Array:
    """Divides each matrix by its norm, at any scale; zero stays zero.

    The squared norm of a matrix as it is would overflow at 1e19 and vanish at 1e-23 in float32.
    So its largest magnitude is made one first.

    Args:
      X: `[..., n, m]`; if devices share it, some of its columns.
      preconditioning: `"spectral"` divides by the largest singular value, all others by the
        Frobenius norm.
      eps: Added to the norm.
      shards: The devices that share the matrix; None for one device.

    Returns:
      `[..., n, m]`, in float32 at least.
    """
    X = X.astype(accumulator(X.dtype))
    magnitude = jnp.maximum(jnp.abs(X.real), jnp.abs(X.imag)) if jnp.iscomplexobj(X) else jnp.abs(X)
    # No gradient: the result does not depend on this factor.
    largest = jax.lax.stop_gradient(jnp.max(magnitude, axis=(-2, -1), keepdims=True))
    largest = shards.max(largest) if shards else largest
    shift = jnp.where(largest > 1, 1 / SHIFT, SHIFT).astype(largest.dtype)
    X = (X * shift.astype(X.dtype)) / nonzero(largest * shift).astype(X.dtype)
    if preconditioning == "spectral" and shards:
        A = unrounded_gram_matrix(X, Products(shards=shards))
        norm = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(A)[..., -1:, None], 0))
    elif preconditioning == "spectral":
        norm = jnp.linalg.svd(X, compute_uv=False)[..., :1, None]
    elif shards:
        norm = jnp.sqrt(shards.sum(jnp.sum(jnp.abs(X) ** 2, axis=(-2, -1), keepdims=True)))
    else:
        norm = jnp.linalg.norm(X, axis=(-2, -1), keepdims=True)
    return X / nonzero(norm + eps).astype(X.dtype)


def _precondition(
    X: jax.Array, preconditioning: str, products: Products
) -> tuple[Matrix, Symmetric]:
    """Scales the rows of a normalized X as the preconditioning requires; also returns X Xᴴ.

    Args:
      X: As for `standard`.
      preconditioning: See `newton_schulz`.
      products: How products of n x n matrices are computed.

    Returns:
      X and X Xᴴ. Two settings replace X by D X, D diagonal, and X Xᴴ by D X Xᴴ D.
    """
    if preconditioning not in ("schatten", "aol"):
        # Only for the kernel, for which the sum would be a pass over X of its own.
        is_known = preconditioning == "frobenius" and products.kernel is not None
        matrix = Matrix(X, squares=1.0 if is_known else None)
        return matrix, gram_matrix(matrix, products)
    A = unrounded_gram_matrix(X, products)
    if preconditioning == "schatten":  # D = ‖A‖^(-1/2) I, and ‖A‖^(1/2) is the Schatten-4 norm of X
        total = jnp.linalg.norm(A, axis=(-2, -1), keepdims=True)
    else:  # D_ii = (Σ_j |A_ij|)^(-1/2)
        total = jnp.sum(jnp.abs(A), axis=-1, keepdims=True)
    D = jax.lax.rsqrt(nonzero(total)).astype(A.dtype)
    scaled = (D * X.astype(A.dtype)).astype(X.dtype)
    return Matrix(scaled), rounded(A * D * D.mT, X.dtype, products)

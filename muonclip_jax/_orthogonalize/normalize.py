"""Divides matrices by their norms, at any scale and without overflow."""

import jax
import jax.numpy as jnp

from muonclip_jax._common.dtypes import accumulator
from muonclip_jax._orthogonalize.iterations import nonzero
from muonclip_jax._orthogonalize.products import multiply
from muonclip_jax._orthogonalize.team import Team

# 2⁶⁴ is exact in every dtype we normalize in, and takes the reciprocal of the largest and smallest
# float32 out of the subnormal range, where XLA flushes it to zero.
_SHIFT = 2.0**64


def normalize(x: jax.Array, preconditioning: str, eps: jax.Array, team: Team | None) -> jax.Array:
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

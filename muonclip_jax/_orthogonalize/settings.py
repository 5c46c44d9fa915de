"""The rules of Newton-Schulz coefficients, in addition to the rules in `_common.settings`."""

from typing import Any

import jax
import numpy as np

from muonclip_jax._common.settings import shown
from muonclip_jax._orthogonalize.coefficients import EXPECTED, as_coefficients, is_traced


def _coefficients(value: Any) -> Exception | None:
    if is_traced(value):
        shape = np.shape(value)
        if isinstance(value, jax.Array) and shape[-1:] == (3,) and len(shape) in (1, 2):
            return None
        return ValueError(
            f"a traced array of shape (3,) or (steps, 3), got {shown(value)}; jnp.stack the numbers"
        )
    try:
        as_coefficients(value)
    except ValueError:
        return ValueError(f"{EXPECTED}, got {shown(value)}")
    return None


COEFFICIENT_RULES = {"ns_coeffs": _coefficients, "coefficients": _coefficients}

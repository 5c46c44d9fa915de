"""Names for the types that appear in more than one signature."""

from typing import Any, TypeAlias

import jax

# A pytree of arrays: nested dicts, lists, tuples, named tuples, Flax or NNX containers.
ArrayTree: TypeAlias = Any
# A number, or a 0-d array that may be traced.
Scalar: TypeAlias = float | int | jax.Array
# The coefficients (a, b, c) of one Newton-Schulz step p(s) = a s + b s³ + c s⁵.
Step: TypeAlias = tuple[float, float, float]

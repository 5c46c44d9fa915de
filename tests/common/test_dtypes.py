"""Sums are in float32 at least."""

import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax._common.dtypes import accumulator, widened


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["bfloat16"], "float32"),
        (["float16", "bfloat16"], "float32"),
        (["float32", "bfloat16"], "float32"),
        (["bfloat16", "float64"], "float64"),
        (["float32", "complex64"], "complex64"),
    ],
)
def test_accumulator_is_the_widest_dtype(dtypes, expected):
    assert accumulator(*dtypes) == jnp.dtype(expected)
    assert accumulator(*reversed(dtypes)) == jnp.dtype(expected)


def test_only_narrow_floats_are_widened():
    assert widened(jnp.ones((), jnp.float16)).dtype == jnp.float32
    for other in (np.float64(1.0), jnp.ones((), jnp.int8), "text", None):
        assert widened(other) is other

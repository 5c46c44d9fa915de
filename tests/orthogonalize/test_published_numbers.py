"""Every number that the documents state about the polynomials, computed again."""

import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support import reference
from tests.support.published_numbers import ABOVE_ONE, RANGES


@pytest.mark.parametrize("name", RANGES)
def test_output_range(name):
    rows = mc.ns_coefficients(name)
    slope, *ranges = RANGES[name]
    assert round(np.prod([a for a, _, _ in rows])) == slope
    for lower, expected in zip((1e-2, 3e-3, 1e-3), ranges, strict=True):
        p = reference.polynomial(rows, np.geomspace(lower, 1, 400_001))
        # The table is rounded to three digits.
        np.testing.assert_allclose((p.min(), p.max()), expected, atol=1.1e-3)


@pytest.mark.parametrize("name", ABOVE_ONE)
def test_what_becomes_of_a_singular_value_just_above_one(name):
    for s, expected in zip((1.0, 1.01, 1.02, 1.05), ABOVE_ONE[name], strict=True):
        p = reference.polynomial(mc.ns_coefficients(name), s)
        np.testing.assert_allclose(p, expected, atol=6e-3)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("name", "n", "expected"),
    [
        ("jordan", 1, 0.6964364095),
        ("jordan", 2, 1.1081111157),
        ("jordan", 4, 0.7654385305),
        ("jordan", 8, 1.0669679485),
        ("jordan", 64, 0.6881398558),
        ("you", 1, 0.9783455603),
        ("you", 2, 1.0256120434),
        ("you", 4, 0.9858693541),
        ("you", 8, 0.9861307147),
        ("you", 64, 0.9842717286),
    ],
)
def test_multiple_of_the_identity(name, n, expected):
    got = mc.newton_schulz(3.0 * jnp.eye(n), name)
    # Measured: 2e-7.
    np.testing.assert_allclose(got, expected * np.eye(n), atol=1e-6)


def test_table_in_the_docstring_is_the_table_held_here():
    for name, (_, _, (low, high), _) in RANGES.items():
        line = next(x for x in (mc.ns_coefficients.__doc__ or "").splitlines() if f'"{name}"' in x)
        assert f"{low:.3f} .. {high:.3f}" in line

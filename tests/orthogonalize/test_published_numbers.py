"""Every number that the documents state about the polynomials, computed again."""

import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support import reference

# Slope at 0, then the least and the largest of p on [l, 1] for l = 1e-2, 3e-3 and 1e-3.
RANGES = {
    "jordan": (485, (0.682, 1.134), (0.682, 1.202), (0.471, 1.202)),
    "you": (493, (0.978, 1.032), (0.978, 1.145), (0.475, 1.145)),
    "polar_express": (804, (0.846, 1.124), (0.846, 1.124), (0.729, 1.124)),
    "polar_express_6": (1448, (0.989, 1.001), (0.989, 1.001), (0.950, 1.001)),
    "cans": (1049, (0.884, 1.120), (0.884, 1.120), (0.884, 1.120)),
    "deepseek_v4": (79263, (1.000, 1.001), (1.000, 1.001), (1.000, 1.001)),
    "cubic5": (119, (0.774, 1.300), (0.353, 1.300), (0.119, 1.300)),
}

# p(1) and what becomes of 1.01, 1.02 and 1.05; None where it is beyond 1e100.
ABOVE_ONE = {
    "jordan": (0.696, 0.688, 0.684, 0.682),
    "you": (0.978, 1.01, 1.02, 1.03),
    "polar_express": (1.02, 0.893, 1.11, 0.854),
    "polar_express_6": (1.0, 0.996, 0.999, 0.990),
    "cans": (1.01, None, None, None),
    "deepseek_v4": (1.0, 1.0, 1.0, 1.0),
    "cubic5": (0.774, -1.20, -0.84, -0.81),
}


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
        if expected is None:
            assert p > 1e100
        else:
            np.testing.assert_allclose(p, expected, atol=6e-3)


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

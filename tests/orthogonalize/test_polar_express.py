"""The generator against the published table, and against what makes its rows optimal."""

import numpy as np
import pytest

import muonclip_jax as mc
from muonclip_jax._orthogonalize.coefficients import _POLAR_EXPRESS
from tests.support import reference


def test_the_published_table_comes_out_again():
    rows = mc.polar_express_coefficients(1e-3, 6, safety=1.0)
    # Measured: 1.2e-13 in the fifth row, 1e-14 in the others.
    np.testing.assert_allclose(rows, _POLAR_EXPRESS, rtol=1e-12)


@pytest.mark.parametrize(("name", "steps"), [("polar_express", 5), ("polar_express_6", 6)])
def test_the_presets_are_the_generator_with_its_defaults(name, steps):
    got = mc.polar_express_coefficients(1e-3, steps)
    np.testing.assert_allclose(got, mc.ns_coefficients(name), rtol=1e-12)


def test_late_rows_settle_at_the_taylor_polynomial():
    *_, row = mc.polar_express_coefficients(1e-3, 9, safety=1.0)
    np.testing.assert_allclose(row, (1.875, -1.25, 0.375), rtol=1e-12)


@pytest.mark.parametrize("lower", [0.01, 0.1, 0.5, 0.9])
def test_a_row_leaves_one_by_as_much_at_four_points(lower):
    """Chebyshev's criterion: no other odd quintic is nearer to one on the interval."""
    rows = mc.polar_express_coefficients(lower, 1, safety=1.0, cushion=0.0)
    p = reference.polynomial(rows, np.linspace(lower, 1, 1_000_001))
    error = 1 - p[0]
    turns = np.flatnonzero(np.diff(np.sign(np.diff(p)))) + 1
    np.testing.assert_allclose(p[[0, *turns, -1]] - 1, error * np.array([-1, 1, -1, 1]), rtol=1e-6)
    np.testing.assert_allclose(np.abs(p - 1).max(), error, rtol=1e-6)


@pytest.mark.parametrize("lower", [1e-6, 1e-3, 0.1, 0.5, 0.99, 0.99999, 1.0])
@pytest.mark.parametrize("cushion", [0.0, 0.02407327424182761, 0.5])
def test_values_are_centerd_on_one_and_never_further_off_with_more_steps(lower, cushion):
    s = np.geomspace(lower, 1, 100_001)
    before = np.inf
    for steps in (1, 2, 4, 8):
        p = reference.polynomial(
            mc.polar_express_coefficients(lower, steps, safety=1.0, cushion=cushion), s
        )
        off = np.abs(p - 1).max()
        assert off <= before
        assert p.min() > 0
        before = max(off, 1e-12)


def test_safety_moves_the_range_up_and_nothing_else():
    plain = mc.polar_express_coefficients(1e-2, 4, safety=1.0)
    safe = mc.polar_express_coefficients(1e-2, 4, safety=1.05)
    for (a, b, c), (x, y, z) in zip(plain, safe, strict=True):
        np.testing.assert_allclose((x, y, z), (a / 1.05, b / 1.05**3, c / 1.05**5), rtol=1e-15)


def test_every_interval_has_a_row():
    """Narrow and wide ones, where the exchange is ill-conditioned and where it is slow."""
    for lower in (*np.geomspace(1e-12, 1, 60), *(1 - np.geomspace(1e-9, 0.5, 60))):
        rows = mc.polar_express_coefficients(float(lower), 6, safety=1.0)
        assert np.all(np.isfinite(rows))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lower": 0.0}, r"lower must be in \(0, 1\], got 0.0"),
        ({"lower": 1.5}, r"lower must be in \(0, 1\], got 1.5"),
        ({"lower": float("nan")}, r"lower must be in \(0, 1\], got nan"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"safety": 0.9}, "safety must be at least 1, got 0.9"),
        ({"cushion": 1.0}, r"cushion must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_arguments_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        mc.polar_express_coefficients(**{"lower": 1e-3, "steps": 5} | settings)


def test_rows_orthogonalize_a_matrix():
    x = np.random.default_rng(0).normal(size=(16, 40)).astype(np.float32)
    y = np.asarray(mc.newton_schulz(x, mc.polar_express_coefficients(0.05, 4)))
    np.testing.assert_allclose(np.linalg.svd(y, compute_uv=False), 1.0, atol=0.02)

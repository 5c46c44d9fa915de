"""Presets and coefficients: lengths, published numbers, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from muonclip_jax._orthogonalize.coefficients import as_coefficients, evaluate
from tests.support.iteration_cases import PRESETS

LENGTHS = dict.fromkeys(PRESETS, 5) | {"polar_express_6": 6, "deepseek_v4": 10}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_its_published_length_and_is_hashable(name):
    rows = mc.ns_coefficients(name)
    assert len(rows) == LENGTHS[name]
    assert isinstance(hash(rows), int)
    assert all(type(number) is float for row in rows for number in row)


@pytest.mark.parametrize("name", PRESETS)
def test_fewer_steps_keep_the_first_coefficients(name):
    assert mc.ns_coefficients(name, 3) == mc.ns_coefficients(name)[:3]


@pytest.mark.parametrize("name", PRESETS)
def test_more_steps_repeat_the_last_coefficients(name):
    rows = mc.ns_coefficients(name)
    assert mc.ns_coefficients(name, len(rows) + 2) == (*rows, rows[-1], rows[-1])


def test_optax_names_are_the_same_presets():
    assert mc.ns_coefficients("standard") == mc.ns_coefficients("jordan")
    assert mc.ns_coefficients("dion") == mc.ns_coefficients("you")


def test_polar_express_divides_every_step_by_its_safety_factor():
    a, b, c = mc.ns_coefficients("polar_express")[4]
    np.testing.assert_allclose(a, 2.300652019954817 / 1.05, rtol=1e-15)
    np.testing.assert_allclose(b, -1.6689039845749493 / 1.05**3, rtol=1e-15)
    np.testing.assert_allclose(c, 0.4188073119525673 / 1.05**5, rtol=1e-15)


@pytest.mark.parametrize("given", [(2, -1.5, 0.5), [2.0, -1.5, 0.5], np.array([2.0, -1.5, 0.5])])
def test_single_coefficients_are_used_in_every_step(given):
    assert as_coefficients(given) == ((2.0, -1.5, 0.5),) * 5
    assert as_coefficients(given, 2) == ((2.0, -1.5, 0.5),) * 2


def test_coefficients_may_be_an_array():
    assert as_coefficients(jnp.array([[2.0, -1.5, 0.5]] * 3), 2) == ((2.0, -1.5, 0.5),) * 2


def test_evaluate_composes_the_steps_in_order():
    rows = ((3.0, 0.0, 0.0), (0.0, 5.0, 7.0))
    assert evaluate(rows, 2.0) == 5 * 6.0**3 + 7 * 6.0**5


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown preset 'aol'; there are 'jordan', 'standard'"):
        mc.ns_coefficients("aol")


@pytest.mark.usefixtures("no_typecheck")
@pytest.mark.parametrize("steps", [0, -1, 2.5])
def test_steps_below_one_raise(steps):
    with pytest.raises(ValueError, match=rf"must be at least 1, got {steps}"):
        as_coefficients("jordan", steps)


@pytest.mark.parametrize(
    "bad", [(1.0, 2.0), ((1.0, 2.0, 3.0), (1.0, 2.0, float("nan"))), 3.0, [[[1.0, 2.0, 3.0]]]]
)
def test_malformed_coefficients_raise(bad):
    with pytest.raises(
        ValueError, match=r"must be the name of a preset \('jordan', .*, \(a, b, c\)"
    ):
        as_coefficients(bad)


@pytest.mark.usefixtures("no_typecheck")
def test_errors_of_traced_coefficients_and_steps_name_the_fix():
    with pytest.raises(TypeError, match=r"must be known while tracing here\. Pass numbers"):
        jax.jit(lambda c: as_coefficients((c, 1.0, 2.0))[0][0])(1.0)
    with pytest.raises(TypeError, match="needs a single"):
        jax.jit(lambda n: as_coefficients("jordan", n)[0][0])(5)

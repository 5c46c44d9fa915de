"""Settings of `qk_clip` that are no threshold, no alpha, or no layout raise with their value."""

import re

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support.attention_cases import attention

pytestmark = pytest.mark.usefixtures("no_typecheck")
STATS = {"max_logits": (jnp.full((5, 4), 9.0),)}


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ValueError, {"threshold": 0.0}, "threshold must be a number above 0, got 0.0."),
        (ValueError, {"threshold": -1}, "threshold must be a number above 0, got -1."),
        (ValueError, {"threshold": float("nan")}, "threshold must be a number above 0, got nan."),
        (
            TypeError,
            {"threshold": None},
            "threshold must be a number above 0, got None",
        ),
        (TypeError, {"threshold": True}, "threshold must be a number above 0, got True (bool)."),
        (
            TypeError,
            {"alpha": "0.5"},
            "alpha must be a number in [0, 1], got the string '0.5'",
        ),
        (
            TypeError,
            {"threshold": lambda step: 7.0},
            "threshold must be a number above 0",
        ),
        (
            ValueError,
            {"threshold": np.ones(2)},
            "threshold must be a number above 0, got an array of shape (2,).",
        ),
        (ValueError, {"alpha": 1.5}, "alpha must be a number in [0, 1], got 1.5."),
        (ValueError, {"alpha": -0.1}, "alpha must be a number in [0, 1], got -0.1."),
        (ValueError, {"alpha": float("nan")}, "alpha must be a number in [0, 1], got nan."),
        (
            ValueError,
            {"shared_key": "mean"},
            "shared_key must be one of 'query', 'group', 'exact'; got 'mean'.",
        ),
        (TypeError, {"where": 1.0}, "where must be True or False, got 1.0."),
        (
            TypeError,
            {"layout": "query"},
            "layout must be a head layout or a tuple of head layouts, got 'query'.",
        ),
    ],
)
def test_bad_settings_raise_with_their_values(kind, settings, message):
    with pytest.raises(kind, match=re.escape(f"qk_clip: {message}")):
        mc.qk_clip(attention(), STATS, **settings)


def test_whole_numbers_are_numbers():
    whole, _ = mc.qk_clip(attention(), STATS, threshold=7, alpha=1)
    same, _ = mc.qk_clip(attention(), STATS, threshold=7.0, alpha=1.0)
    chex.assert_trees_all_equal(whole, same)

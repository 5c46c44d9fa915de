"""The loops of docs/recipes.md train, and their clips see every head."""

import math

import pytest

from tests.support.pages import OPTIONAL, run_page


@pytest.mark.parametrize("prefix", ["", *(f"{package}_" for package in OPTIONAL)])
def test_loop_trains_and_sees_every_head(prefix):
    if prefix:
        pytest.importorskip(prefix.removesuffix("_"))
    metrics = run_page("recipes.md")[f"{prefix}metrics"]
    assert 4.0 < metrics["loss"] < 7.0  # random bytes: log 256 is 5.5
    assert math.isfinite(metrics["qk_clip/max_logit"])
    assert metrics["qk_clip/clipped_heads"] == metrics["qk_clip/skipped_modules"] == 0

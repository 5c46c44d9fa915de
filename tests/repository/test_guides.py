"""The train steps of the guides train, and their clips see every head."""

import math

import pytest

from tests.support.pages import OPTIONAL, run_page

STEPS = [
    ("get_started.md", ""),
    ("guides/flax.md", ""),
    ("guides/nnx.md", ""),
    ("guides/nnx.md", "functional_"),
    *(("guides/equinox_haiku.md", f"{package}_") for package in OPTIONAL),
]


@pytest.mark.parametrize(("page", "prefix"), STEPS)
def test_train_step_trains_and_sees_every_head(page, prefix):
    if prefix.removesuffix("_") in OPTIONAL:
        pytest.importorskip(prefix.removesuffix("_"))
    metrics = run_page(page)[f"{prefix}metrics"]
    assert 0.0 < metrics["loss"] < 7.0  # random bytes: log 256 is 5.5
    assert math.isfinite(metrics["qk_clip/max_logit"])
    assert metrics["qk_clip/clipped_heads"] == metrics["qk_clip/skipped_modules"] == 0

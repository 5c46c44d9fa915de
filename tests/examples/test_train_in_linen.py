"""The page that trains in Flax Linen: it learns its task, and the clip limits its logits."""

import math

import jax
import numpy as np
import pytest

import muonclip_jax as mc
from examples import train_in_linen
from examples.train_in_linen import HEAD_DIM, HEADS, KV_HEADS, LAYERS, THRESHOLD, WIDTH
from tests.support.by_day import at_night

LOW_THRESHOLD = 5.0


@pytest.mark.parametrize(
    ("steps", "with_clips"),
    at_night((24, 10), (90, 60)),  # measured 19 and 85
)
def test_clip_acts_and_the_model_learns(steps, with_clips):
    clipped = train_in_linen.train(LOW_THRESHOLD, steps)
    heads = np.array([metrics["qk_clip/clipped_heads"] for metrics in clipped])
    assert (heads > 0).sum() > with_clips
    largest = max(metrics["qk_clip/max_logit"] for metrics in clipped)
    assert largest < 1.7 * LOW_THRESHOLD  # measured 1.50
    first, last = clipped[0]["loss"], clipped[-1]["loss"]
    assert first > 3.4  # a uniform guess is log 32
    assert last < (0.1 if steps == 90 else first)  # measured 0.011


@pytest.mark.nightly
def test_infinite_threshold_records_and_never_clips():
    metrics = train_in_linen.train(math.inf, 3)
    assert [m["qk_clip/clipped_heads"] for m in metrics] == [0.0, 0.0, 0.0]
    assert all(m["qk_clip/max_logit"] > 0 for m in metrics)


def test_every_kernel_has_the_expected_optimizer():
    text = jax.ShapeDtypeStruct((2, 8), "int32")
    params = jax.eval_shape(train_in_linen.Model().init, jax.random.key(0), text)["params"]
    rows = {row.path: row for row in mc.routing_table(params).rows}
    for name, n_in, n_out in (
        ("query", WIDTH, HEADS * HEAD_DIM),
        ("key", WIDTH, KV_HEADS * HEAD_DIM),
        ("value", WIDTH, KV_HEADS * HEAD_DIM),
        ("out", HEADS * HEAD_DIM, WIDTH),
    ):
        row = rows[f"blocks/attn/{name}/kernel"]
        found = (row.optimizer, row.num_matrices, row.n_in, row.n_out)
        assert found == ("muon", LAYERS, n_in, n_out)
    for path in ("embed/embedding", "lm_head/kernel", "positions"):
        assert rows[path].optimizer == "adamw", path


@pytest.mark.nightly
def test_logits_grow_without_the_clip():
    plain, clipped = (train_in_linen.train(x) for x in (math.inf, THRESHOLD))
    assert plain[-1]["loss"] < 0.1
    assert clipped[-1]["loss"] < 0.1  # measured 0.011
    assert plain[-1]["qk_clip/max_logit"] > 2 * THRESHOLD  # measured 2.3
    assert max(m["qk_clip/max_logit"] for m in clipped) < 1.5 * THRESHOLD

"""The page that trains MLA in Flax NNX: it learns its task, and the clip limits its logits."""

import math

import jax
import pytest
from flax import nnx

import muonclip_jax as mc
from examples import mla_in_nnx
from tests.support.strict import needs_capture

pytestmark = needs_capture
STEPS = 90


@pytest.fixture(scope="module")
def runs():
    return mla_in_nnx.train(math.inf, STEPS), mla_in_nnx.train(mla_in_nnx.THRESHOLD, STEPS)


@pytest.mark.nightly
def test_both_runs_learn_the_task(runs):
    for run in runs:
        assert run[0]["loss"] > 3.4  # a uniform guess is log 32
        assert run[-1]["loss"] < 0.1  # measured 0.001 and 0.019


@pytest.mark.nightly
def test_clip_limits_logits_that_grow_with_muon(runs):
    plain, clipped = ([m["qk_clip/max_logit"] for m in run] for run in runs)
    assert max(clipped) < 1.2 * mla_in_nnx.THRESHOLD  # measured 1.07
    assert plain[-1] > 3 * mla_in_nnx.THRESHOLD  # measured 4.2
    assert all(m["qk_clip/clipped_heads"] == 0 for m in runs[0])
    assert sum(m["qk_clip/clipped_heads"] for m in runs[1]) > 50


def test_every_attention_kernel_is_one_matrix_of_muon():
    params = nnx.state(mla_in_nnx.Model(nnx.Rngs(0)), nnx.Param)
    rows = {row.path: row for row in mc.routing_table(params).rows}
    q_b, embed = rows["blocks/0/attn/q_b/kernel"], rows["embed/embedding"]
    assert (q_b.optimizer, q_b.num_matrices, q_b.n_in, q_b.n_out) == ("muon", 1, 32, 96)
    assert embed.optimizer == rows["lm_head/kernel"].optimizer == "adamw"
    assert jax.tree.structure(params) == jax.tree.structure(jax.tree.map(lambda x: x, params))

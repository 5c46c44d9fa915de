"""The train steps of the guides train, and their clips see every head."""

import math

import jax
import jax.numpy as jnp
import pytest

import muonclip_jax as mc
from tests.support.pages import OPTIONAL, run_page

pytestmark = pytest.mark.nightly
STEPS = [
    ("get_started.md", ""),
    ("guides/flax.md", ""),
    ("guides/nnx.md", ""),
    ("guides/scan_remat_microbatches.md", ""),
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


def test_functional_step_of_nnx_has_the_metrics_of_the_optimizer_step():
    page = run_page("guides/nnx.md")
    params, tx = page["params"], page["tx"]
    *state, metrics = jax.eval_shape(page["functional_step"], params, tx.init(params), page["text"])
    assert metrics.keys() == page["metrics"].keys()
    assert jax.tree.structure(state[0]) == jax.tree.structure(params)


def test_train_state_of_flax_clips_with_muonclip():
    page = run_page("guides/flax.md")
    params, stats = page["params"], page["stats"]
    tx = mc.muonclip(0.0, layout=page["layout"])
    state = page["ClippedTrainState"].create(apply_fn=None, params=params, tx=tx)
    new = jax.jit(lambda s: s.apply_gradients(grads=params, max_logits=stats))(state)
    assert new.step == 1
    ratio = new.params["attn"]["q_proj"]["kernel"] / params["attn"]["q_proj"]["kernel"]
    assert jnp.allclose(ratio[0, ::8], jnp.array([0.5, 1, 1, 1]))  # γ = 1/4, its root for queries


def test_step_on_an_explicit_mesh_has_the_plan_and_loss_of_the_auto_mesh():
    page = run_page("guides/sharding.md")
    assert str(page["explicit_plan"]) == str(page["plan"])
    losses = (page[name]["loss"] for name in ("metrics", "explicit_metrics"))
    assert jnp.allclose(*map(float, losses), rtol=0, atol=1e-3)


def test_micro_steps_clip_by_the_largest_logits_of_all_micro_batches():
    page = run_page("guides/scan_remat_microbatches.md")
    batch = page["micro_batches"].reshape(-1, 16, 32)
    _, stats = jax.jit(page["loss_fn"])(page["params"], batch)
    largest = max(x.max() for x in jax.tree.leaves(stats))
    assert jnp.allclose(page["info"].max_logit, largest, rtol=1e-5)
    _, multi_steps, running = page["state"]
    assert multi_steps.gradient_step == 1
    assert all(jnp.all(x == -jnp.inf) for x in jax.tree.leaves(running))

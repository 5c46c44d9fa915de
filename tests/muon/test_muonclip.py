"""`muonclip` is `muon` followed by `qk_clip`, as one update."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc


def _attention(dtype=np.float32):
    rng = np.random.default_rng(3)

    def make(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "attn": {
            "query": {"kernel": make(6, 2, 4), "bias": make(2, 4)},
            "key": {"kernel": make(6, 2, 4), "bias": make(2, 4)},
            "value": {"kernel": make(6, 2, 4)},
            "out": {"kernel": make(2, 4, 6)},
        },
        "mlp": {"kernel": make(6, 6)},
    }


STATS = {"attn": {"max_logits": (jnp.array([[400.0, 50.0], [3.0, -7.0]]),)}}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("alpha", [0.5, 0.3, 1.0])
def test_muonclip_equals_muon_then_qk_clip(dtype, alpha):
    params = _attention(dtype)
    grads = jax.tree.map(jnp.sin, params)
    whole, parts = mc.muonclip(0.1, alpha=alpha), mc.muonclip(0.1, threshold=None)
    updates, state = whole.update(grads, whole.init(params), params, max_logits=STATS)
    got = optax.apply_updates(params, updates)

    updates, expected_state = parts.update(grads, parts.init(params), params)
    moved = optax.apply_updates(params, updates)
    expected, info = mc.qk_clip(moved, STATS, alpha=alpha)

    bits = jnp.finfo(dtype).nmant
    assert float(info.min_gamma) == 0.25
    chex.assert_trees_all_equal(state, expected_state)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, params)
    for old, landed, target in zip(*map(jax.tree.leaves, (params, got, expected)), strict=True):
        old, landed, target = (np.asarray(x, np.float64) for x in (old, landed, target))
        # A unit in the last place of the larger number, as after every update in that dtype.
        unit = 2.0 ** (np.floor(np.log2(np.maximum(abs(old), abs(target)))) - bits)
        assert np.all(abs(landed - target) <= unit)
        near = (abs(target) >= abs(old) / 2) & (abs(target) <= 2 * abs(old)) & (old * target > 0)
        np.testing.assert_array_equal(landed[near], target[near])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("factor", [0.99, 0.55])
def test_16_bit_weights_reach_their_clipped_value_exactly(dtype, factor):
    """Sterbenz: a number within a factor of two of another is the other plus their difference."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(500, 2, 40)), dtype)
    params = {"attn": {"query": {"kernel": kernel}, "key": {"kernel": kernel}}}
    stats = {"attn": {"max_logits": jnp.array([100.0 / factor**2, 1.0])}}
    tx = mc.muonclip(0.0)
    updates, _ = tx.update(params, tx.init(params), params, max_logits=stats)
    chex.assert_trees_all_equal_dtypes(updates, params)
    expected, _ = mc.qk_clip(params, stats)
    chex.assert_trees_all_equal(optax.apply_updates(params, updates), expected)
    assert np.any(expected["attn"]["query"]["kernel"] != kernel)


def test_unclipped_parameters_get_the_update_of_muon():
    params = _attention()
    grads = jax.tree.map(jnp.sin, params)
    whole, parts = mc.muonclip(0.1), mc.muonclip(0.1, threshold=None)
    clipped: Any = whole.update(grads, whole.init(params), params, max_logits=STATS)[0]
    plain: Any = parts.update(grads, parts.init(params), params)[0]
    chex.assert_trees_all_equal(clipped["mlp"], plain["mlp"])
    chex.assert_trees_all_equal(clipped["attn"]["value"], plain["attn"]["value"])
    chex.assert_trees_all_equal(clipped["attn"]["out"], plain["attn"]["out"])
    for name in ("query", "key"):
        for leaf in ("kernel", "bias"):
            a, b = clipped["attn"][name][leaf], plain["attn"][name][leaf]
            np.testing.assert_array_equal(a[..., 1, :], b[..., 1, :])
            assert np.all(a[..., 0, :] != b[..., 0, :])


def test_checkpoints_fit_with_and_without_the_clip():
    params = _attention()
    chex.assert_trees_all_equal_structs(
        mc.muonclip(0.1).init(params), mc.muonclip(0.1, threshold=None).init(params)
    )


@pytest.mark.parametrize("missing", ["params", "max_logits"])
def test_muonclip_never_skips_the_clip_silently(missing):
    params = _attention()
    tx = mc.muonclip(0.1)
    given = {"params": params, "max_logits": STATS}
    given[missing] = None
    with pytest.raises(ValueError, match=rf"update needs {missing}, got None.*threshold=None"):
        tx.update(params, tx.init(params), **given)


_SCHEDULE = optax.linear_schedule(400.0, 100.0, 1)


@pytest.mark.parametrize(
    "tx",
    [
        mc.muonclip(0.0, threshold=_SCHEDULE),
        optax.inject_hyperparams(mc.muonclip)(learning_rate=0.0, threshold=_SCHEDULE),
    ],
    ids=["schedule", "injected"],
)
def test_the_threshold_may_be_scheduled(tx):
    params = _attention()
    zero = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(tx.update)
    state = tx.init(params)
    first, state = update(zero, state, params, max_logits=STATS)
    second, state = update(zero, state, params, max_logits=STATS)
    chex.assert_trees_all_equal(first, zero)
    new: Any = optax.apply_updates(params, second)
    np.testing.assert_allclose(
        new["attn"]["query"]["kernel"][:, 0],
        0.5 * params["attn"]["query"]["kernel"][:, 0],
        rtol=1e-6,
    )


def test_a_scheduled_threshold_is_not_in_the_checkpoint():
    params = _attention()
    chex.assert_trees_all_equal_structs(
        mc.muonclip(0.1, threshold=_SCHEDULE).init(params), mc.muonclip(0.1).init(params)
    )

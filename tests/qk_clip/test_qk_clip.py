"""The factor of each head, the rules for shared keys, bitwise promises, and the info."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st

import muonclip_jax as mc
from tests.support import reference_attention as reference
from tests.support.attention_cases import N, attention, clip_one, draw, expected, same_bits

UNCLIPPED = [-5.0, -1e-6, -0.0, 0.0, -np.inf, np.inf, np.nan, 99.9, 100.0]


@pytest.mark.parametrize("other", UNCLIPPED)
def test_unclipped_head_keeps_every_bit_beside_a_clipped_one(other):
    old, new, info = clip_one([200.0, other, 1.0, 200.0])
    for name in ("query", "key"):
        for leaf in ("kernel", "bias"):
            assert same_bits(old[name][leaf][..., 1:3, :], new[name][leaf][..., 1:3, :])
            np.testing.assert_allclose(
                new[name][leaf][..., [0, 3], :],
                old[name][leaf][..., [0, 3], :] * np.sqrt(np.float32(0.5)),
                rtol=2e-7,
            )
    np.testing.assert_array_equal(info.gamma["attn"], [0.5, 1, 1, 0.5])


@pytest.mark.parametrize("other", UNCLIPPED)
def test_nonfinite_heads_are_counted_and_masked_heads_are_not(other):
    _, _, info = clip_one([200.0, other])
    assert info.nonfinite_heads == (1 if np.isnan(other) or other == np.inf else 0)
    assert info.clipped_heads == 1


@pytest.mark.parametrize("tau", [0.1, 1.0, 30.0, 100.0, 1e6])
def test_head_at_the_threshold_is_not_clipped(tau):
    tau = np.float32(tau)
    below, above = np.nextafter(tau, np.float32(0)), np.nextafter(tau, np.float32(np.inf))
    old, new, info = clip_one([below, tau, above, above], threshold=float(tau))
    np.testing.assert_array_equal(info.gamma["attn"][:2], 1)
    assert same_bits(old["query"]["kernel"][:, :2], new["query"]["kernel"][:, :2])
    np.testing.assert_allclose(info.gamma["attn"][2:], 1, rtol=1.2e-7)
    assert info.clipped_heads == 2


@given(st.lists(st.floats(width=32), min_size=N, max_size=N), st.floats(0.5, 1e4, width=32))
@example([0.0, 0.0, 1e38, 8.333335264165784e37], 1.0)  # below and above the smallest normal number
def test_gamma_is_in_zero_to_one(maxima, tau):
    _, new, info = clip_one(maxima, threshold=tau)
    expected = [reference.gamma(s, tau) for s in np.asarray(maxima, np.float32).tolist()]
    expected = np.maximum(expected, np.finfo(np.float32).tiny)
    np.testing.assert_allclose(info.gamma["attn"], expected, rtol=2e-7)
    assert bool(jnp.all((info.gamma["attn"] > 0) & (info.gamma["attn"] <= 1)))
    chex.assert_tree_all_finite(new)


def test_gamma_never_underflows_to_zero():
    _, new, info = clip_one([3e38, 1.0], threshold=1e-3)
    assert info.gamma["attn"][0] > 0
    assert bool(jnp.all(new["query"]["kernel"][:, 0] != 0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtype_is_kept_and_rounded_once(dtype, strict_promotion):
    old, new, info = clip_one([150.0, 300.0, 7.0, 1e4], dtype=dtype, alpha=0.3)
    query, key = reference.query_and_key_factors(info.gamma["attn"].tolist(), N, 0.3, "query")
    for name, factors in (("query", query), ("key", key)):
        assert new[name]["kernel"].dtype == dtype
        target = expected(old[name]["kernel"], factors, dtype)
        # One unit of float32 in the power; in the 16-bit dtypes that rarely crosses a boundary.
        np.testing.assert_allclose(
            np.float32(new[name]["kernel"]),
            np.float32(target),
            rtol=3e-7 if dtype == jnp.float32 else 0,
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_special_numbers_in_unclipped_heads_keep_their_bits(dtype):
    tiny = jnp.finfo(dtype).smallest_subnormal
    odd = np.asarray([-0.0, tiny, -3 * tiny, np.inf, -np.inf, np.nan], dtype)
    params = {name: {"kernel": jnp.asarray(np.tile(odd, (1, 2, 1)))} for name in ("query", "key")}
    new, _ = jax.jit(mc.qk_clip)(params, {"max_logits": jnp.asarray([400.0, 3.0])})
    for name in params:
        assert same_bits(new[name]["kernel"][:, 1], odd[None])


def test_float64_weights_are_scaled_in_float64():
    with jax.enable_x64(True):
        kernel = jnp.full((1, 1, 1), 1 / 3)
        params = {"query": {"kernel": kernel}, "key": {"kernel": kernel}}
        new, _ = mc.qk_clip(params, {"max_logits": jnp.asarray([400.0])})
        assert new["query"]["kernel"].dtype == jnp.float64
        np.testing.assert_allclose(new["query"]["kernel"], kernel / 2, rtol=1e-16)


def test_no_finite_weight_becomes_infinite_when_queries_grow():
    maxima = jnp.asarray([3e38, 10.0])
    for dtype in (jnp.float16, jnp.float32):
        kernel = jnp.full((1, 2, 1), 1e4, dtype)
        params = {"query": {"kernel": kernel}, "key": {"kernel": kernel[:, :1]}}
        new, _ = mc.qk_clip(params, {"max_logits": maxima}, alpha=0.0, shared_key="exact")
        chex.assert_tree_all_finite(new)


def test_infinite_threshold_only_reports():
    old, new, info = clip_one([1e30, np.inf, -3.0, 5.0], threshold=float("inf"))
    assert all(map(same_bits, jax.tree.leaves(old), jax.tree.leaves(new)))
    np.testing.assert_array_equal(info.gamma["attn"], 1)
    np.testing.assert_array_equal(
        info.max_logits["attn"], np.asarray([1e30, np.inf, -3, 5], np.float32)
    )


def test_values_and_output_are_never_touched():
    old, new, _ = clip_one([400.0] * N)
    for name in ("value", "out"):
        assert new[name]["kernel"] is old[name]["kernel"]


def test_alpha_is_the_share_of_the_query():
    old, new, _ = clip_one([400.0] * N, alpha=1.0)
    assert same_bits(new["key"]["kernel"], old["key"]["kernel"])
    np.testing.assert_array_equal(new["query"]["kernel"], old["query"]["kernel"] / 4)
    old, new, _ = clip_one([400.0] * N, alpha=0.0)
    assert same_bits(new["query"]["kernel"], old["query"]["kernel"])
    np.testing.assert_array_equal(new["key"]["bias"], old["key"]["bias"] / 4)


def test_permuting_heads_permutes_the_result():
    maxima, order = jnp.asarray([250.0, 30.0, 120.0, 1000.0]), jnp.asarray([2, 0, 3, 1])
    old, new, _ = clip_one(maxima)
    permuted = {"attn": {n: {"kernel": old[n]["kernel"][:, order]} for n in ("query", "key")}}
    again, _ = mc.qk_clip(permuted, {"attn": {"max_logits": maxima[order]}})
    for name in ("query", "key"):
        assert same_bits(again["attn"][name]["kernel"], new[name]["kernel"][:, order])


def test_bfloat16_has_a_dead_band_that_float32_master_weights_do_not_have():
    changed = {}
    for s, dtype in itertools.product((100.3, 100.5), (jnp.bfloat16, jnp.float32)):
        kernel = draw(0, 64, 1, 64, dtype=dtype)
        params = {"query": {"kernel": kernel}, "key": {"kernel": kernel}}
        new, _ = mc.qk_clip(params, {"max_logits": jnp.asarray([s])})
        changed[s, dtype] = float(jnp.mean(new["query"]["kernel"] != kernel))
    assert changed[100.3, jnp.bfloat16] == 0
    assert 0.3 < changed[100.5, jnp.bfloat16] < 0.5
    assert changed[100.3, jnp.float32] > 0.99


# Shared keys.

# Maxima 400, 10, 20, 30 at threshold 100; two query heads to a key head.
TABLE = {
    "query": ([0.25, 1, 1, 1], [1, 1]),
    "group": ([0.5, 0.5, 1, 1], [0.5, 1]),
    "exact": ([0.5, 2, 1, 1], [0.5, 1]),
}


@pytest.mark.parametrize("rule", TABLE)
def test_factors_of_shared_keys(rule):
    old, new, _ = clip_one([400.0, 10.0, 20.0, 30.0], key_heads=2, shared_key=rule)
    for name, factors in zip(("query", "key"), TABLE[rule], strict=True):
        np.testing.assert_array_equal(new[name]["kernel"], expected(old[name]["kernel"], factors))


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("rule", TABLE)
def test_rules_equal_the_float64_reference(rule, alpha, key_heads):
    maxima = [400.0, 10.0, 150.0, 120.0]
    old, new, _ = clip_one(maxima, key_heads, alpha=alpha, shared_key=rule)
    gammas = [reference.gamma(s, 100.0) for s in maxima]
    factors = reference.query_and_key_factors(gammas, key_heads, alpha, rule)
    for name, factor in zip(("query", "key"), factors, strict=True):
        np.testing.assert_allclose(
            new[name]["kernel"], expected(old[name]["kernel"], factor), rtol=5e-7
        )
    # No rule leaves a head above the threshold, and all but "group" land on it.
    products = np.repeat(factors[1], N // key_heads) * factors[0] * maxima
    assert products.max() <= 100 * (1 + 1e-12)
    if rule in ("query", "exact") or key_heads == N:
        np.testing.assert_allclose(products, np.minimum(maxima, 100))


def test_shared_key_and_unclipped_heads_keep_their_bits_by_default():
    old, new, _ = clip_one([400.0, 10.0, 20.0, np.nan], key_heads=2)
    assert same_bits(old["key"]["kernel"], new["key"]["kernel"])
    assert same_bits(old["query"]["kernel"][:, 1:], new["query"]["kernel"][:, 1:])


def test_a_shared_key_is_scaled_once():
    old, new, _ = clip_one([400.0] * 4, key_heads=1, shared_key="group")
    np.testing.assert_array_equal(new["key"]["kernel"], old["key"]["kernel"] / 2)


def test_info_counts_all_layers():
    params = {"a": attention(2), "b": attention(2), "c": attention(1)}
    stats = {
        "a": {"max_logits": jnp.asarray([400.0, 7.0])},
        "b": {"max_logits": jnp.asarray([-3.0, 200.0])},
        "c": {"max_logits": jnp.asarray([50.0])},
    }
    _, info = mc.qk_clip(params, stats)
    assert info.max_logit == 400
    assert info.min_gamma == 0.25
    assert info.clipped_heads == 2
    assert info.clipped_fraction == jnp.float32(0.4)
    assert (info.nonfinite_heads, info.skipped_modules, info.bound_modules) == (0, 0, 0)
    assert list(info.gamma) == list(info.max_logits) == ["a", "b", "c"]


def test_metrics_are_the_scalars_of_the_info():
    _, _, info = clip_one([400.0, jnp.nan])
    metrics = mc.qk_clip_metrics(info)
    assert sorted(metrics) == [
        "qk_clip/bound_modules",
        "qk_clip/clipped_fraction",
        "qk_clip/clipped_heads",
        "qk_clip/max_logit",
        "qk_clip/min_gamma",
        "qk_clip/nonfinite_heads",
        "qk_clip/skipped_modules",
    ]
    assert all(value.shape == () for value in metrics.values())
    assert float(metrics["qk_clip/clipped_fraction"]) == 0.5
    assert np.isnan(metrics["qk_clip/max_logit"])


# Heads ever clipped.


def info_of(**maxima):
    params = {name: attention(len(s)) for name, s in maxima.items()}
    return mc.qk_clip(params, {n: {"max_logits": jnp.asarray(s)} for n, s in maxima.items()})[1]


def infos():
    return [
        info_of(a=[400.0, 1.0], b=[1.0, 1.0, 1.0]),
        info_of(a=[1.0, 1.0], b=[1.0, np.inf, 200.0]),
        info_of(a=[1.0, np.nan], b=[1.0, 1.0, 101.0]),
    ]


def test_a_head_once_clipped_stays_marked():
    first, *others = infos()
    ever = mc.heads_ever_clipped(first)
    for info in others:
        ever = mc.heads_ever_clipped(info, ever)
    assert {path: x.tolist() for path, x in ever.items()} == {
        "a": [True, False],
        "b": [False, False, True],
    }
    assert float(mc.qk_clip_metrics(others[-1], ever)["qk_clip/ever_clipped_fraction"]) == (
        np.float32(0.4)
    )


def test_heads_ever_clipped_in_a_scan_equal_a_loop():
    steps = infos()
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *steps)
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), steps[0].gamma)
    scanned, _ = jax.lax.scan(
        lambda ever, info: (mc.heads_ever_clipped(info, ever), None), none, stacked
    )
    assert {path: x.tolist() for path, x in scanned.items()} == {
        "a": [True, False],
        "b": [False, False, True],
    }


def test_heads_of_another_model_raise():
    before = mc.heads_ever_clipped(info_of(a=[1.0, 1.0], c=[1.0]))
    with pytest.raises(ValueError, match="the heads are not the heads of this model") as error:
        mc.heads_ever_clipped(info_of(a=[1.0], b=[1.0]), before)
    assert str(error.value).splitlines()[1:] == [
        "  a: got (2,), expected (1,).",
        "  b: got absent, expected (1,).",
        "  c: got (1,), expected absent.",
    ]

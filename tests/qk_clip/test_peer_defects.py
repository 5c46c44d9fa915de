"""Defects of other implementations, each in its situation, and the behavior of this library.

If the defect is a formula, the test has it too, and fails if both formulas give the same result.
File names: MaxText is AI-Hypercomputer/maxtext, read at commit 03bf39d.
"""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from tests.support import reference_attention as reference
from tests.support.attention_cases import attention, clip_one, draw, same_bits

TAU = 100.0


def peer_gamma(s):
    """The factor as MaxText, Megatron-LM and SimpleTuner had it."""
    return jnp.minimum(1, TAU / jnp.asarray(s, jnp.float32))


def max_logits_of(*maxima):
    return {"max_logits": jnp.asarray(maxima, jnp.float32)}


def unchanged(old, new, head: int | slice = slice(None)):
    """Whether the query and key weights, of all heads or of one, did not change."""
    return all(
        same_bits(old[name]["kernel"][..., head, :], new[name]["kernel"][..., head, :])
        for name in ("query", "key")
    )


# The factor.


def test_megatron_and_maxtext_negative_logit_made_nan_weights():
    # Megatron-LM PR #7517, attention.py; MaxText, src/maxtext/utils/qk_clip_utils.py.
    assert jnp.isnan(jnp.sqrt(peer_gamma(-5.0)))
    old, new, info = clip_one([400.0, -5.0])
    assert unchanged(old, new, head=1)
    assert info.clipped_heads == 1


def test_maxtext_masked_head_was_multiplied_by_zero():
    # MaxText, src/maxtext/utils/qk_clip_utils.py: tau / (S + 1e-6).
    assert peer_gamma(-jnp.inf) == 0
    old, new, info = clip_one([400.0, -jnp.inf])
    assert unchanged(old, new, head=1)
    assert info.nonfinite_heads == 0


def test_maxtext_overflowed_logit_multiplied_the_head_by_zero():
    # MaxText, src/maxtext/utils/qk_clip_utils.py.
    assert peer_gamma(jnp.inf) == 0
    old, new, info = clip_one([400.0, jnp.inf])
    assert unchanged(old, new, head=1)
    assert info.nonfinite_heads == 1


def test_maxtext_bfloat16_weights_came_back_as_float32_and_compiled_the_step_again():
    # MaxText, src/maxtext/utils/qk_clip_utils.py: kernel times a float32 factor.
    params = attention(2, dtype=jnp.bfloat16)
    assert (params["query"]["kernel"] * peer_gamma(400.0)).dtype == jnp.float32
    step = jax.jit(
        chex.assert_max_traces(lambda p: mc.qk_clip(p, max_logits_of(400.0, 7.0))[0], n=1)
    )
    new = step(step(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, params)


def test_multiplication_by_one_flushed_denormal_weights():
    # Any `weights * gamma`: processors that flush denormals do so in a product by one.
    tiny = jnp.full((1, 2, 1), jnp.finfo(jnp.float32).smallest_subnormal)
    assert not same_bits(tiny * peer_gamma(7.0), tiny)
    params = {"query": {"kernel": tiny}, "key": {"kernel": tiny}}
    new, _ = jax.jit(mc.qk_clip)(params, max_logits_of(7.0, 400.0))
    assert unchanged(params, new, head=0)


def test_megatron_and_maxtext_clipped_on_skipped_steps():
    # MaxText, src/maxtext/trainers/pre_train/train.py; Megatron-LM, megatron/training/training.py.
    params, stats = attention(2), max_logits_of(400.0, 7.0)
    assert not unchanged(params, mc.qk_clip(params, stats)[0])
    assert unchanged(params, mc.qk_clip(params, stats, where=jnp.asarray(False))[0])


# Shared factors.


def test_maxtext_scanned_layers_shared_the_factor_of_the_worst():
    # MaxText, src/maxtext/utils/qk_clip_utils.py: maximum over all axes but the last.
    stats = jnp.asarray([[[200.0, 50.0]], [[50.0, 60.0]]])  # [layers, batch, heads]
    np.testing.assert_array_equal(peer_gamma(stats.max((0, 1))), [0.5, 1])
    params = attention(2, stack=(2,))
    new, info = mc.qk_clip(params, {"max_logits": stats})
    np.testing.assert_array_equal(info.gamma[""], [[0.5, 1], [1, 1]])
    assert same_bits(params["query"]["kernel"][1], new["query"]["kernel"][1])


def test_megatron_scaled_all_heads_of_a_group():
    # Megatron-LM, megatron/core/transformer/attention.py: one factor for each group of queries.
    old, grouped, _ = clip_one([400.0, 10.0], key_heads=1, shared_key="group")
    np.testing.assert_array_equal(grouped["query"]["kernel"], old["query"]["kernel"] / 2)
    old, new, _ = clip_one([400.0, 10.0], key_heads=1)
    assert same_bits(old["query"]["kernel"][:, 1], new["query"]["kernel"][:, 1])
    assert same_bits(old["key"]["kernel"], new["key"]["kernel"])


@pytest.mark.parametrize("rule", ["query", "group", "exact"])
def test_square_root_per_head_shrank_a_shared_key_once_for_each_head(rule):
    # The loop over query heads that multiplies the key head of each.
    gammas = peer_gamma([400.0] * 4)
    assert 400 * jnp.sqrt(gammas[0]) * jnp.prod(jnp.sqrt(gammas)) == 12.5
    old, new, _ = clip_one([400.0] * 4, key_heads=1, shared_key=rule)
    factors = [(new[n]["kernel"] / old[n]["kernel"])[0, 0, 0] for n in ("query", "key")]
    assert 400 * factors[0] * factors[1] == TAU


def landing(params, x):
    query, key = (
        reference.project(x, params[n]["kernel"], 2, params[n]["bias"]) for n in ("query", "key")
    )
    return reference.max_logits(query, key).max(0)


def test_biases_that_were_not_scaled_kept_the_logits_above_the_threshold():
    # Most codes scale only `weight` or `kernel`: q = x W + b.
    x, params = draw(9, 2, 5, 3), jax.tree.map(lambda p: 8 * p, attention(2))
    new, _ = mc.qk_clip(params, max_logits_of(*landing(params, x)), threshold=TAU)
    kernels = {n: {**params[n], "kernel": new[n]["kernel"]} for n in ("query", "key")}
    assert landing(kernels, x).max() > 1.1 * TAU
    np.testing.assert_allclose(landing(new, x), TAU, rtol=1e-5)


def test_maxtext_direct_query_of_mla_was_not_recognized():
    # MaxText, src/maxtext/utils/qk_clip_utils.py: of wq_b and wkv_b; q_lora_rank 0 has no wq_b.
    layout = functools.partial(mc.MLALayout, nope_dim=2, rope_dim=1, value_dim=2)
    params = {"q": {"kernel": jnp.ones((3, 1, 3))}, "kv_b": {"kernel": jnp.ones((3, 1, 4))}}
    with pytest.raises(ValueError, match=r"Pass layout=mc.MLALayout\(query='q', "):
        mc.qk_clip(params, max_logits_of(400.0), layout())
    new, _ = mc.qk_clip(params, max_logits_of(400.0), layout(query="q"))
    # On the key alone the nope part lands at 200, and the rotary part stays at its 400.
    assert 400 * jnp.sqrt(peer_gamma(400.0)) == 200
    assert new["kv_b"]["kernel"][0, 0].tolist() == [0.5, 0.5, 1, 1]
    assert new["q"]["kernel"][0, 0].tolist() == [0.5, 0.5, 0.25]


# Source of the max logits.


def test_maxtext_estimate_was_reported_as_the_maximum():
    # MaxText, use_max_logit_estimate, and tokamax, max_logit_const: a number set beforehand.
    q, k = draw(1, 1, 5, 2, 4), draw(2, 1, 5, 2, 4)
    (_, small), (_, large) = (mc.dot_product_attention(q, k * c, k) for c in (1, 100))
    np.testing.assert_allclose(large, 100 * small, rtol=1e-6)
    with pytest.raises(ValueError, match="max_logit must be one of 'exact', 'lse_bound'"):
        mc.dot_product_attention(q, k, k, max_logit="max_logit_const")


def test_log_sum_exp_in_bfloat16_was_below_the_maximum():
    # jax.nn.dot_product_attention(return_residual=True): the residual has the dtype of the keys.
    q, k = (8 * draw(seed, 2, 64, 4, 16, dtype=jnp.bfloat16) for seed in (1, 50))
    _, residual = jax.nn.dot_product_attention(q, k, k, return_residual=True)
    exact = mc.max_attention_logit(q, k)
    assert jnp.any(jnp.max(residual.astype(jnp.float32), axis=1) < exact)
    _, bound = mc.dot_product_attention(q, k, k, max_logit="lse_bound")
    assert jnp.all(bound >= exact)


@pytest.mark.parametrize("value", [-1e9, -0.7 * float(np.finfo(np.float32).max)])
def test_masked_head_reported_the_value_of_the_mask(value):
    # DEFAULT_MASK_VALUE of the attention kernels that MaxText uses, and the usual -1e9.
    q, mask = draw(1, 1, 5, 2, 4), jnp.zeros((1, 1, 5, 5), bool)
    assert np.isfinite(jnp.max(jnp.where(mask, 0.0, value)))
    maxima = mc.max_attention_logit(q, q, mask=mask)
    np.testing.assert_array_equal(maxima, -np.inf)
    _, info = mc.qk_clip(attention(2), {"max_logits": maxima})
    assert (info.min_gamma, info.max_logit) == (1, -jnp.inf)


def test_megatron_maximum_that_starts_at_zero_hid_negative_ones():
    # Megatron-LM, megatron/core/optimizer/qk_clip.py: log_max_attention_logit = 0.
    q = 1 + jnp.abs(draw(1, 1, 5, 2, 4))
    expected = reference.max_logits(q, -q)
    assert expected.max() < 0 == max(0, expected.max())
    maxima = mc.max_attention_logit(q, -q, block_size=2)
    np.testing.assert_allclose(maxima, expected, rtol=2e-6)
    _, info = mc.qk_clip(attention(2), {"max_logits": maxima})
    assert info.max_logit < 0


def test_jax_rejected_the_float32_causal_mask_of_flax():
    # flax.linen.make_causal_mask gives float32, jax.nn.dot_product_attention wants bool.
    x = draw(1, 2, 5, 8)
    mask = nn.make_causal_mask(x[..., 0])
    q = x.reshape(2, 5, 2, 4)
    with pytest.raises(ValueError, match="mask dtype should be bool"):
        jax.nn.dot_product_attention(q, q, q, mask=mask)
    module = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=mc.linen.attention_fn)
    params = module.init(jax.random.key(0), x)["params"]
    settings = {"mask": mask, "sow_weights": True, "mutable": ["intermediates"]}
    result: Any = module.apply({"params": params}, x, **settings)
    query, key = (reference.project(x, params[n]["kernel"], 2) for n in ("query", "key"))
    expected = reference.max_logits(query, key, is_causal=True)
    np.testing.assert_allclose(result[1]["intermediates"]["max_logits"][0], expected, rtol=2e-6)


# How it travels.


def test_maxtext_read_only_the_first_call_of_a_module():
    # MaxText, src/maxtext/utils/qk_clip_utils.py: entry 0 of the tuple that sow makes.
    calls = jnp.asarray([[50.0]]), jnp.asarray([[400.0]])
    assert peer_gamma(calls[0]) == 1
    _, info = mc.qk_clip(attention(1), {"max_logits": calls})
    assert info.min_gamma == 0.25


def test_maxtext_added_max_logits_of_micro_batches():
    # MaxText, src/maxtext/utils/gradient_accumulation.py: auxiliary trees are summed.
    batches = [max_logits_of(s) for s in (60.0, 50.0, 40.0, 30.0)]
    assert peer_gamma(sum(batch["max_logits"] for batch in batches)) < 1
    joined = batches[0]
    for batch in batches[1:]:
        joined = mc.merge_max_logits(joined, batch)
    _, info = mc.qk_clip(attention(1), joined)
    assert (info.max_logit, info.clipped_heads) == (60, 0)


def test_optax_multi_steps_shows_its_inner_optimizer_only_the_last_micro_batch():
    # optax, MultiSteps: the inner update runs for each micro-batch, and only the last is kept.
    params = attention(1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    inner = mc.muonclip(0.0, weight_decay=0.0)
    optimizer = optax.MultiSteps(inner, every_k_schedule=2)
    state, inside, joined = optimizer.init(params), params, max_logits_of(-jnp.inf)
    for stats in (max_logits_of(400.0), max_logits_of(50.0)):
        updates, state = optimizer.update(zeros, state, inside, max_logits=stats)
        inside = optax.apply_updates(inside, updates)
        joined = mc.merge_max_logits(joined, stats)
    assert unchanged(params, inside)
    after, _ = mc.qk_clip(params, joined, where=jnp.asarray(optimizer.has_updated(state)))
    np.testing.assert_array_equal(after["query"]["kernel"], params["query"]["kernel"] / 2)


def test_megatron_reduced_each_layer_on_its_own():
    # Megatron-LM, megatron/core/optimizer/qk_clip.py: a reduction and a wait for each layer.
    names = [f"layers_{i}" for i in range(4)]
    params, stats = {n: attention(2) for n in names}, {n: max_logits_of([1.0] * 2) for n in names}

    def over_batch(function, *args):
        equations = jax.make_jaxpr(function)(*args).eqns
        maxima = [e for e in equations if e.primitive.name == "reduce_max"]
        # The largest number of all heads, for the info, is a maximum of a vector.
        return sum(0 in e.params["axes"] and e.invars[0].aval.ndim > 1 for e in maxima)

    assert over_batch(lambda stats: [jnp.max(stats[n]["max_logits"], 0) for n in names], stats) == 4
    assert over_batch(mc.qk_clip, params, stats) == 1


class Layer(nn.Module):
    """Sows, in the form that `nn.scan` wants."""

    @nn.compact
    def __call__(self, x, _=None):
        query, key = (nn.DenseGeneral((2, 4), name=name)(x) for name in ("query", "key"))
        mc.linen.sow_max_logits(self, mc.max_attention_logit(query, key))
        return x, None


def test_flax_scan_dropped_max_logits_silently():
    # flax.linen.scan keeps only the collections in variable_axes.
    x = draw(1, 2, 5, 8)
    model = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
    params = model.init(jax.random.key(0), x)["params"]
    _, state = model.apply({"params": params}, x, mutable=["intermediates"])
    assert not state.get("intermediates")
    with pytest.raises(ValueError, match=r"not in `variable_axes` of `nn\.scan`"):
        mc.qk_clip(params, state)


# How it is joined to the weights.


def test_maxtext_clipped_nothing_under_a_root_key():
    # MaxText, src/maxtext/utils/qk_clip_utils.py: walks the max logits by the whole path.
    params = {"params": {"attn": attention(1)}}
    stats = {"intermediates": {"attn": max_logits_of(400.0)}}
    assert not set(params) & set(stats["intermediates"])
    new, info = mc.qk_clip(params, stats)
    assert info.clipped_heads == 1
    assert not unchanged(params["params"]["attn"], new["params"]["attn"])


def test_suffixes_of_names_matched_wrong_layers():
    # The join by str.startswith, str.endswith or a search.
    params = {name: attention(1) for name in ("layers_1", "layers_10", "decoder_layers_1")}
    assert all("layers_1" in name for name in params)
    stats = {"layers_1": 400.0, "layers_10": 50.0, "decoder_layers_1": 200.0}
    _, info = mc.qk_clip(params, {name: max_logits_of(s) for name, s in stats.items()})
    gammas = {name: float(gamma[0]) for name, gamma in info.gamma.items()}
    assert gammas == {"layers_1": 0.25, "layers_10": 1, "decoder_layers_1": 0.5}


def test_module_named_value_was_read_as_a_variable():
    # Paths of nnx.State end in an attribute `.value`; `value` is also a module of Flax.
    params = {"value": {"query": jnp.ones((1, 1, 2)), "value": jnp.ones((1, 1, 2))}}
    layout = mc.MultiHeadLayout(query="query", key="value")
    new, info = mc.qk_clip(params, {"value": max_logits_of(400.0)}, layout)
    assert list(info.gamma) == ["value"]
    np.testing.assert_array_equal(new["value"]["value"], params["value"]["value"] / 2)


def test_megatron_layers_without_attention_crashed():
    # Megatron-LM PR #7382, megatron/core/optimizer/qk_clip.py: every layer had to have attention.
    params = {"mamba": {"in": {"kernel": jnp.ones((3, 4))}}, "attn": attention(1)}
    new, info = mc.qk_clip(params, {"attn": max_logits_of(400.0)})
    assert info.clipped_heads == 1
    assert same_bits(new["mamba"]["in"]["kernel"], params["mamba"]["in"]["kernel"])

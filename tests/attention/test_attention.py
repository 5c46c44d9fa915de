"""Attention with max logits: against float64, against `jax.nn`, on devices."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from benchmarks.compiled import collectives
from muonclip_jax._attention.attention import dot_product_attention
from tests.support import reference_attention as reference
from tests.support.attention_cases import draw, same_bits
from tests.support.logit_cases import (
    RULES,
    SPECS,
    boolean,
    close,
    inputs,
    lengths,
    mesh_of_eight,
    sharded_inputs,
)

METHODS = ["exact", "lse_bound"]
DIAGONAL = jnp.eye(13, dtype=bool)[None, None]
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "scale and bias": {"scale": 0.7, "bias": 3 * draw(2, 2, 4, 13, 13)},
    "mask and causal": {"mask": boolean(3, 1, 1, 13, 13) | DIAGONAL, "is_causal": True},
    "window and lengths": {
        "local_window_size": (9, 1),
        "query_seq_lengths": lengths(3, 13),
        "key_value_seq_lengths": lengths(13, 6),
    },
    "all": {
        "scale": 0.7,
        "bias": 3 * draw(2, 1, 4, 13, 13),
        "mask": boolean(3, 2, 1, 13, 13) | DIAGONAL,
        "is_causal": True,
        "local_window_size": 6,
        "query_seq_lengths": lengths(12, 13),
        "key_value_seq_lengths": lengths(13, 9),
    },
}


@functools.cache
def results(max_logit, name):
    """Output, max logits (none if `max_logit` is None: plain `jax.nn`) and gradients."""
    static = {n: x for n, x in OPTIONS[name].items() if not isinstance(x, jax.Array)}
    arrays = {n: x for n, x in OPTIONS[name].items() if isinstance(x, jax.Array)}

    def loss(qkv, arrays):
        if max_logit is None:
            result = jax.nn.dot_product_attention(*qkv, **arrays, **static), None
        else:
            result = dot_product_attention(*qkv, **arrays, **static, max_logit=max_logit)
        return jnp.sum(result[0] ** 2), result

    (_, result), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs(), arrays)
    return *result, grads


def visible_keys(query, key, scale=None, bias=None, **rules):
    """How many keys the query that sees most of them sees, by batch row and head."""
    shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    return reference.visible(shape, **rules).sum(-1).max(-1)


@pytest.mark.parametrize("rules", RULES)
def test_reference_masks_as_jax_nn(rules):
    # Logits of zero and one-hot values: the output is positive at the keys that are seen.
    zero, one_hot = jnp.zeros((2, 11, 1, 11)), jnp.tile(jnp.eye(11)[None, :, None], (2, 1, 1, 1))
    attend = functools.partial(jax.nn.dot_product_attention, **RULES[rules])
    out = jax.jit(attend)(zero, zero, one_hot)
    seen = reference.visible((2, 1, 11, 11), **RULES[rules])[:, 0]
    some = seen.any(-1)  # a row that sees nothing has the mean of all values
    np.testing.assert_array_equal(np.asarray(out)[:, :, 0][some] > 0, seen[some])


@pytest.mark.parametrize("name", OPTIONS)
def test_exact_equals_float64(name):
    close(results("exact", name)[1], reference.max_logits(*inputs()[:2], **OPTIONS[name]))


@pytest.mark.parametrize("name", OPTIONS)
def test_exact_keeps_every_bit_of_output_and_gradients(name):
    (out, _, grads), (expected, _, expected_grads) = (results(m, name) for m in ("exact", None))
    assert same_bits(out, expected)
    assert all(map(same_bits, grads, expected_grads))


@pytest.mark.parametrize("name", OPTIONS)
def test_lse_bound_keeps_output_and_gradients(name):
    (out, _, grads), (expected, _, expected_grads) = (results(m, name) for m in ("lse_bound", None))
    # Measured 2.4e-7 and 9.5e-7, on elements up to 2 and 20; see `return_residual` in XLA.
    np.testing.assert_allclose(out, expected, atol=1e-6)
    for actual, expected in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(actual, expected, atol=5e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_lse_bound_exceeds_by_at_most_the_log_of_keys(name):
    bound, qk = results("lse_bound", name)[1], inputs()[:2]
    exact, seen = (f(*qk, **OPTIONS[name]) for f in (reference.max_logits, visible_keys))
    assert np.all(bound >= exact)
    # 2^-17: the allowance for rounding, twice.
    assert np.all(bound <= (exact + np.log(seen)) * (1 + 2**-17))


@functools.partial(jax.jit, static_argnames="max_logit")
def peaky(q, key, sharpness, max_logit):
    return dot_product_attention(q, key, key, scale=sharpness, max_logit=max_logit)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@hypothesis.given(seed=st.integers(0, 2**31), sharpness=st.sampled_from([0.1, 1.0, 10.0, 100.0]))
def test_bound_is_never_below_the_maximum(dtype, seed, sharpness):
    q, key = draw(seed, 2, 32, 4, 64, dtype=dtype), draw(seed + 1, 2, 32, 4, 64, dtype=dtype)
    bound = peaky(q, key, sharpness, "lse_bound")[1]
    exact = reference.max_logits(q, key, scale=sharpness)
    assert np.all(bound >= exact)
    rounding = 2.0**-6 if dtype == jnp.bfloat16 else 2.0**-17
    assert np.all(bound <= exact + np.log(32) + rounding * (np.abs(exact) + np.log(32)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_unrounded_log_sum_exp_is_no_bound(dtype):
    q, key = (10 * draw(seed, 2, 32, 4, 64, dtype=dtype) for seed in (0, 1))
    attend = functools.partial(jax.nn.dot_product_attention, return_residual=True)
    _, lse = jax.jit(attend)(q, key, key)
    exact = reference.max_logits(q, key)
    # Up to 2^-8 of it too low in bfloat16, 2^-20.8 in float32.
    assert np.any(lse.astype(jnp.float32).max(1) < exact)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_bound_of_masked_heads_is_minus_infinity(dtype):
    q, key, value = inputs(k=4, dtype=dtype)
    mask = jnp.ones((2, 4, 13, 13), bool).at[1, 2].set(False).at[0, 0, 1:].set(False)
    attend = functools.partial(dot_product_attention, mask=mask, max_logit="lse_bound")
    bound = jax.jit(attend)(q, key, value)[1]
    exact = reference.max_logits(q, key, mask=mask)
    assert np.isneginf(exact[1, 2])
    np.testing.assert_array_equal(np.isneginf(bound), np.isneginf(exact))


def test_lse_bound_rejects_float16():
    qkv = inputs(dtype=jnp.float16)
    with pytest.raises(ValueError, match="lse_bound") as error:
        dot_product_attention(*qkv, max_logit="lse_bound")
    assert str(error.value) == (
        'dot_product_attention: max_logit="lse_bound" does not work in float16, in which the '
        'log-sum-exp overflows. Use bfloat16, or max_logit="exact".'
    )


@pytest.mark.parametrize(("max_logit", "products"), [("exact", 3), ("lse_bound", 2)])
def test_only_exact_needs_another_product(max_logit, products):
    attend = functools.partial(dot_product_attention, max_logit=max_logit)
    assert str(jax.make_jaxpr(attend)(*inputs())).count("dot_general[") == products


def test_lse_bound_costs_only_exponentials():
    qkv = inputs(t=128, s=128, h=64)
    bound: Any = functools.partial(dot_product_attention, max_logit="lse_bound")
    plain, bounded = (
        jax.jit(attend).lower(*qkv).compile().cost_analysis() or {}
        for attend in (jax.nn.dot_product_attention, bound)
    )
    # Measured 1.015 and 2.01.
    assert bounded["flops"] < 1.03 * plain["flops"]
    assert 1.9 < bounded["transcendentals"] / plain["transcendentals"] < 2.1


@pytest.mark.parametrize("max_logit", [*METHODS, lambda q, *_, **__: (q, q.sum((1, 3)))])
def test_max_logits_have_no_gradient(max_logit):
    attend = functools.partial(dot_product_attention, max_logit=max_logit)
    grads = jax.jit(jax.grad(lambda *qkv: attend(*qkv)[1].sum(), (0, 1, 2)))(*inputs())
    for grad in grads:
        np.testing.assert_array_equal(grad, np.zeros(grad.shape))


@pytest.mark.parametrize("max_logit", METHODS)
def test_nan_stays_in_its_row_and_head(max_logit):
    q, key, value = inputs()
    attend = jax.jit(functools.partial(dot_product_attention, max_logit=max_logit))
    clean, dirty = attend(q, key, value), attend(q, key.at[1, 12, 1, 3].set(jnp.nan), value)
    for actual, expected, head in zip(dirty, clean, (2, 1), strict=True):
        expected = np.moveaxis(np.array(expected), head, 1)
        expected[1, 2:] = np.nan
        np.testing.assert_array_equal(np.moveaxis(np.asarray(actual), head, 1), expected)


@pytest.mark.parametrize("max_logit", METHODS)
def test_one_example_without_a_batch(max_logit):
    q, key, value = inputs()
    mask = boolean(3, 13, 13) | jnp.eye(13, dtype=bool)
    attend = functools.partial(
        dot_product_attention, mask=mask, max_logit=max_logit, return_residual=True
    )
    (out, lse), max_logits = jax.jit(attend)(q[0], key[0], value[0])
    (outs, lses), all_max_logits = jax.jit(attend)(q[:1], key[:1], value[:1])
    assert same_bits(out, outs[0])
    assert same_bits(lse, lses[0])
    assert same_bits(max_logits, all_max_logits[0])


@pytest.mark.parametrize("max_logit", METHODS)
def test_residual_equals_jax_nn(max_logit):
    qkv = inputs()
    attend = functools.partial(dot_product_attention, return_residual=True, max_logit=max_logit)
    actual, _ = jax.jit(attend)(*qkv)
    expected = jax.jit(functools.partial(jax.nn.dot_product_attention, return_residual=True))(*qkv)
    assert all(map(same_bits, actual, expected))


@pytest.mark.parametrize("max_logit", METHODS)
@pytest.mark.parametrize("width", [5, 12])
def test_values_may_be_narrower_or_wider_than_queries(width, max_logit):
    q, key, _ = inputs()
    value = draw(4, 2, 13, 2, width)
    attend = jax.jit(functools.partial(dot_product_attention, max_logit=max_logit))
    out, max_logits = attend(q, key, value)
    assert out.shape == (2, 13, 4, width)
    # Measured 2e-7.
    np.testing.assert_allclose(out, reference.attention(q, key, value), atol=1e-6)
    _, expected = attend(q, key, key)
    np.testing.assert_allclose(max_logits, expected, rtol=1e-6)


def sharded_qkv():
    arrays = sharded_inputs()
    return {**arrays, "value": arrays["key"]}


def check_sharded(actual, max_logit):
    arrays = sharded_qkv()
    out, max_logits = jax.jit(functools.partial(dot_product_attention, max_logit=max_logit))(
        **arrays
    )
    # Measured equal, in bfloat16.
    np.testing.assert_allclose(actual[0].astype(np.float32), out.astype(np.float32), atol=1e-2)
    np.testing.assert_allclose(actual[1], max_logits, rtol=1e-6)


@pytest.mark.parametrize("max_logit", METHODS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batch_and_heads_need_no_communication(kind, max_logit):
    mesh, attend = (
        mesh_of_eight(kind),
        functools.partial(dot_product_attention, max_logit=max_logit),
    )
    with jax.set_mesh(mesh):
        arrays = {
            name: jax.device_put(x, NamedSharding(mesh, SPECS[name]))
            for name, x in sharded_qkv().items()
        }
        compiled = jax.jit(attend).lower(**arrays).compile()
        result = jax.device_get(compiled(**arrays))
    check_sharded(result, max_logit)
    assert collectives(compiled) == []


@pytest.mark.parametrize("max_logit", METHODS)
def test_works_inside_shard_map(max_logit):
    sharded = jax.shard_map(
        lambda arrays: dot_product_attention(**arrays, max_logit=max_logit),
        mesh=mesh_of_eight(),
        in_specs=(SPECS,),
        out_specs=(SPECS["query"], SPECS["bias"]),
    )
    check_sharded(jax.jit(sharded)(sharded_qkv()), max_logit)

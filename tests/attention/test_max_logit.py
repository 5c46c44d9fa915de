"""The max logit of each head: against float64, against `jax.nn`, under transforms."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support import reference_attention as reference
from tests.support.attention_cases import draw
from tests.support.logit_cases import RULES, boolean, close, lengths, queries_and_keys


def largest(query, key, block_size=512, is_causal=False, local_window_size=None, **arrays):
    """Compiled as a whole, which is faster to test than one operation at a time."""
    max_logits_of = functools.partial(
        mc.max_attention_logit,
        block_size=block_size,
        is_causal=is_causal,
        local_window_size=local_window_size,
    )
    return jax.jit(max_logits_of)(query, key, **arrays)


BLOCKS = [512, 5]


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("k", [4, 2, 1])
def test_equals_float64(block_size, k):
    q, key = queries_and_keys(k=k, s=11)
    close(largest(q, key, block_size=block_size), reference.max_logits(q, key))


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize(("t", "s"), [(13, 13), (7, 13), (13, 7)])
def test_causal_mask_is_top_left_aligned(block_size, t, s):
    q, key = queries_and_keys(t=t, s=s, k=2)
    actual = largest(q, key, is_causal=True, block_size=block_size)
    close(actual, reference.max_logits(q, key, is_causal=True))


@pytest.mark.parametrize(("t", "s", "block_size"), [(13, 11, 5), (11, 13, 5), (13, 11, 512)])
@pytest.mark.parametrize("rules", RULES)
def test_window_and_lengths_hide_pairs(rules, t, s, block_size):
    q, key = queries_and_keys(t=t, s=s, k=2)
    actual = largest(q, key, block_size=block_size, **RULES[rules])
    close(actual, reference.max_logits(q, key, **RULES[rules]))


@pytest.mark.parametrize("block_size", BLOCKS)
def test_window_without_any_pair_gives_minus_infinity(block_size):
    actual = largest(*queries_and_keys(), block_size=block_size, local_window_size=(-2, 1))
    np.testing.assert_array_equal(actual, np.full((2, 4), -np.inf))


def test_nan_in_padding_does_not_count():
    q, key = queries_and_keys()
    rules: dict[str, Any] = {
        "query_seq_lengths": lengths(9, 13),
        "key_value_seq_lengths": lengths(13, 5),
    }
    expected = reference.max_logits(q, key, **rules)
    q, key = q.at[0, 9:].set(jnp.nan), key.at[1, 5:].set(jnp.nan)
    close(largest(q, key, block_size=4, **rules), expected)


SHAPES = [
    (2, 4, 13, 11),
    (1, 4, 13, 11),
    (2, 1, 13, 11),
    (1, 1, 1, 11),
    (2, 4, 13, 1),
    (1, 1, 1, 1),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_mask_and_bias_broadcast_over_each_axis(shape):
    q, key = queries_and_keys(k=2, s=11)
    cases: tuple[dict[str, Any], ...] = (
        {"bias": 5 * draw(2, *shape)},
        {"mask": boolean(3, *shape)},
    )
    for settings in cases:
        actual = largest(q, key, block_size=4, **settings)
        close(actual, reference.max_logits(q, key, **settings))


@pytest.mark.parametrize("block_size", [512, 4])
def test_everything_at_once(block_size):
    q, key = queries_and_keys(k=2, s=11)
    settings = {
        "scale": 0.3,
        "bias": draw(2, 2, 4, 13, 11),
        "mask": boolean(3, 2, 1, 13, 11),
        "is_causal": True,
        "local_window_size": (7, 0),
        "query_seq_lengths": lengths(12, 13),
        "key_value_seq_lengths": lengths(9, 11),
    }
    ids, key_ids = jnp.arange(26).reshape(2, 13) // 5, jnp.asarray([[0] * 5 + [1] * 6, [9] * 11])
    actual = largest(q, key, segment_ids=(ids, key_ids), block_size=block_size, **settings)
    expected = reference.max_logits(q, key, ids=ids, key_ids=key_ids, **settings)
    assert np.isneginf(expected[1]).all()  # no key has a segment of the second row
    close(actual, expected)


def test_one_array_of_segment_ids_serves_queries_and_keys():
    q, key = queries_and_keys()
    ids = jnp.asarray([[0] * 6 + [1] * 7, [2] * 3 + [0] * 10])
    expected = reference.max_logits(q, key, ids=ids, key_ids=ids)
    close(largest(q, key, segment_ids=ids, block_size=5), expected)


@pytest.mark.parametrize("block_size", [512, 4])
def test_negative_maximum_is_negative(block_size):
    q = jnp.full((1, 13, 1, 4), 2.0)
    close(largest(q, -q, block_size=block_size), [[-8.0]], rtol=0)


def test_masked_pair_never_counts_and_masked_head_is_minus_infinity():
    q, key = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3, 2, 4))
    mask = jnp.zeros((1, 2, 3, 3), bool).at[0, 1, 2, 0].set(True)
    np.testing.assert_array_equal(largest(q, -key, mask=mask), [[-jnp.inf, -2.0]])


def test_scale_may_be_traced_and_is_zero_for_zero():
    q, key = queries_and_keys()
    scaled = jax.jit(lambda scale: mc.max_attention_logit(q, key, scale=scale))
    close(scaled(2.0), reference.max_logits(q, key, scale=2.0))
    np.testing.assert_array_equal(scaled(0.0), np.zeros((2, 4)))


@pytest.mark.parametrize("block_size", [512, 4])
def test_nan_stays_in_its_row_and_head(block_size):
    q, key = queries_and_keys(k=2)
    bad = largest(q, key.at[1, 12, 1, 3].set(jnp.nan), block_size=block_size)
    expected = reference.max_logits(q, key)
    expected[1, 2:] = np.nan
    np.testing.assert_allclose(bad, expected, rtol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_bfloat16_and_float16_inputs_accumulate_in_float32(dtype):
    q, key = queries_and_keys(h=64, dtype=dtype)
    # Measured 2e-7: the products of narrow numbers are exact in float32, only sums round.
    close(mc.max_attention_logit(100 * q, key), reference.max_logits(100 * q, key))


def test_float64_inputs_accumulate_in_float64():
    with jax.enable_x64(True):
        q, key = queries_and_keys(dtype=np.float64)
        close(mc.max_attention_logit(q, key), reference.max_logits(q, key), rtol=1e-7)


def test_queries_and_keys_may_differ_in_dtype(strict_promotion):
    q, key = queries_and_keys()
    q = q.astype(jnp.bfloat16)
    close(mc.max_attention_logit(q, key, block_size=4), reference.max_logits(q, key))


def test_logits_equal_jax_nn():
    q, key = queries_and_keys(b=1, k=2, n=4)
    bias, mask = (
        draw(2, 1, 4, 1, 13),
        boolean(3, 1, 1, 13, 13) | jnp.eye(13, dtype=bool)[None, None],
    )
    # The residual is log sum exp; with logits a thousand times apart it is the maximum.
    _, residual = jax.nn.dot_product_attention(
        1000 * q, key, key, 1000 * bias, mask, is_causal=True, return_residual=True
    )
    actual = mc.max_attention_logit(1000 * q, key, bias=1000 * bias, mask=mask, is_causal=True)
    np.testing.assert_allclose(actual, residual.max(1), rtol=1e-5)


def test_gradient_is_zero_without_residuals():
    q, key = queries_and_keys()

    def loss(q, key, bias):
        return mc.max_attention_logit(q, key, bias=bias, block_size=4).sum() + 2 * q.sum()

    grads = jax.grad(loss, (0, 1, 2))(q, key, jnp.ones((1, 1, 13, 13)))
    for grad, value in zip(grads, (2, 0, 0), strict=True):
        np.testing.assert_array_equal(grad, np.full(grad.shape, value))


def test_vmap_equals_loop():
    q, key = draw(0, 3, 2, 9, 4, 8), draw(1, 3, 2, 9, 4, 8)
    actual = jax.vmap(lambda q, k: mc.max_attention_logit(q, k, block_size=4))(q, key)
    close(actual, np.stack([reference.max_logits(a, b) for a, b in zip(q, key, strict=True)]))


def test_one_block_is_one_product_without_a_loop():
    jaxpr = str(jax.make_jaxpr(mc.max_attention_logit)(*queries_and_keys()))
    assert jaxpr.count("dot_general[") == 1
    assert "scan[" not in jaxpr
    assert "Precision.HIGHEST" in jaxpr


@pytest.mark.parametrize(
    ("rules", "pairs"),
    [
        ({}, 16),
        ({"is_causal": True}, 10),
        ({"local_window_size": (2, 1)}, 10),
        ({"local_window_size": (1, 0)}, 7),
        ({"local_window_size": (3, 8), "is_causal": True}, 9),
    ],
)
def test_fully_masked_blocks_are_skipped(rules, pairs):
    max_logits_of = functools.partial(mc.max_attention_logit, block_size=2, **rules)
    jaxpr = jax.make_jaxpr(max_logits_of)(*queries_and_keys(t=8, s=8))
    trips = re.findall(r"length=(\d+)", str(jaxpr))
    assert trips == [str(pairs - 1)]  # one comes before the loop


FAULTS = {
    "query (2, 13, 4) and key (2, 13, 4, 8) need four axes": {"query": (2, 13, 4)},
    "key (3, 13, 4, 8) and query (2, 13, 4, 8) differ in batch or width.": {"key": (3, 13, 4, 8)},
    "key (2, 13, 4, 7) and query (2, 13, 4, 8) differ in batch or width": {"key": (2, 13, 4, 7)},
    "query has 4 heads, not a multiple of the 3 heads of key.": {"key": (2, 13, 3, 8)},
    "there are 13 queries and 0 keys": {"key": (2, 0, 4, 8)},
    "bias (4, 13, 13) does not broadcast to [b, n, t, s] (2, 4, 13, 13).": {"bias": (4, 13, 13)},
    "mask (2, 4, 13, 5) does not broadcast": {"mask": (2, 4, 13, 5)},
    "segment_ids (2, 5) should be (2, 13)": {"segment_ids": (2, 5)},
    "query_seq_lengths (13,) should be (2,), one number for each row.": {
        "query_seq_lengths": (13,)
    },
    "key_value_seq_lengths (1, 2) should be (2,)": {"key_value_seq_lengths": (1, 2)},
    "local_window_size is 1.5; it must be an int or a pair of them.": {"local_window_size": 1.5},
    "local_window_size is (1, None); it must be": {"local_window_size": (1, None)},
    "local_window_size is (1, 2, 3); it must be": {"local_window_size": (1, 2, 3)},
    "block_size must be an integer of at least 1, got 0.": {"block_size": 0},
}


@pytest.mark.parametrize("message", FAULTS)
def test_wrong_shapes_raise(message, no_typecheck):
    settings = {"query": (2, 13, 4, 8), "key": (2, 13, 4, 8), **FAULTS[message]}
    kinds = {"mask": bool, "segment_ids": jnp.int32}
    arguments: dict[str, Any] = {
        name: value
        if name in ("block_size", "local_window_size")
        else jnp.ones(value, kinds.get(name, jnp.float32))
        for name, value in settings.items()
    }
    with pytest.raises(ValueError, match="max_attention_logit: ") as error:
        mc.max_attention_logit(**arguments)
    assert message in str(error.value)


def test_all_faults_come_in_one_error(no_typecheck):
    with pytest.raises(ValueError, match="do not fit") as error:
        mc.max_attention_logit(
            jnp.ones((2, 5, 4, 8)), jnp.ones((2, 5, 3, 8)), bias=jnp.ones(3), block_size=-1
        )
    assert str(error.value) == (
        "max_attention_logit: the arguments do not fit.\n"
        "  query has 4 heads, not a multiple of the 3 heads of key.\n"
        "  bias (3,) does not broadcast to [b, n, t, s] (2, 4, 5, 5).\n"
        "  block_size must be an integer of at least 1, got -1."
    )


def test_mask_of_numbers_raises_with_both_fixes(no_typecheck):
    q, key = queries_and_keys()
    with pytest.raises(TypeError, match=r"mask\.astype\(bool\).*pass it as bias"):
        mc.max_attention_logit(q, key, mask=jnp.zeros((1, 1, 13, 13)))

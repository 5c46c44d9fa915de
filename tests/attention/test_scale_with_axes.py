"""A `scale` with axes, and the number of programs compiled outside of jit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support.logit_cases import inputs

B, T, S, N, H = 2, 5, 7, 4, 8
SHAPES = [(), (N, 1, 1), (1, N, 1, 1), (B, N, 1, 1), (B, 1, 1, 1), (T, S), (N, T, 1), (1, 1)]


def factors(shape):
    """Positive and negative factors, so that the largest product is not the largest logit."""
    return jnp.asarray(np.random.default_rng(5).normal(size=shape), jnp.float32)


def oracle(query, key, scale):
    """All logits, [b, n, t, s], in float64; a factor for each key head is repeated."""
    query, key, scale = (np.asarray(x, np.float64) for x in (query, key, scale))
    groups = query.shape[2] // key.shape[2]
    if scale.ndim >= 3 and scale.shape[-3] == key.shape[2]:
        scale = np.repeat(scale, groups, axis=-3)
    return scale * np.einsum("btnh,bsnh->bnts", query, np.repeat(key, groups, axis=2))


def attention(logits, value):
    value = np.repeat(np.asarray(value, np.float64), logits.shape[1] // value.shape[2], axis=2)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 1, 1)])
def test_max_logit_of_any_scale(shape, key_heads):
    if shape == (2, 1, 1) and key_heads == 4:
        pytest.skip("a factor for each of two key heads")
    query, key, _ = inputs(b=B, t=T, s=S, n=N, k=key_heads, h=H)
    scale = factors(shape)
    expected = oracle(query, key, scale).max((2, 3))
    for block_size in (512, 2):
        got = mc.max_attention_logit(query, key, scale=scale, block_size=block_size)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_logit", ["exact", "lse_bound"])
@pytest.mark.parametrize(
    ("shape", "key_heads"), [((N, 1, 1), 4), ((N, 1, 1), 2), ((2, 1, 1), 2), ((B, N, T, S), 4)]
)
def test_attention_of_any_scale(shape, key_heads, max_logit):
    query, key, value = inputs(b=B, t=T, s=S, n=N, k=key_heads, h=H)
    scale = factors(shape)
    logits = oracle(query, key, scale)

    def attend(scale):
        return mc.dot_product_attention(query, key, value, scale=scale, max_logit=max_logit)

    out, largest = jax.jit(attend)(scale)
    np.testing.assert_allclose(out, attention(logits, value), rtol=1e-4, atol=1e-5)
    above = np.asarray(largest) - logits.max((2, 3))
    assert np.all(above > -1e-5)
    assert np.all(above < (1e-5 if max_logit == "exact" else np.log(S) + 1e-3))


def test_a_learned_scale_gets_the_gradient_of_the_output_alone():
    query, key, value = inputs(b=B, t=T, s=S, n=N, k=N, h=H)
    ours = lambda s: mc.dot_product_attention(query, key, value, scale=s)[0].sum()  # noqa: E731
    theirs = lambda s: jax.nn.dot_product_attention(query, key, value, scale=s).sum()  # noqa: E731
    scale = factors((1, N, 1, 1))
    np.testing.assert_allclose(jax.grad(ours)(scale), jax.grad(theirs)(scale), rtol=1e-5)


BAD: list[Any] = ["0.5", True, jnp.ones((3, 1, 1)), jnp.ones((N,)), jnp.ones((1, 1, N, 1, 1)), 1j]


@pytest.mark.usefixtures("no_typecheck")
@pytest.mark.parametrize("scale", BAD)
def test_a_scale_that_does_not_fit_is_named(scale):
    query, key, value = inputs(b=B, t=T, s=S, n=N, k=N, h=H)
    for call in (
        lambda: mc.max_attention_logit(query, key, scale=scale),
        lambda: mc.dot_product_attention(query, key, value, scale=scale),
    ):
        with pytest.raises(ValueError, match="scale must be a number or an array that broadcasts"):
            call()


def test_tokamax_needs_a_number_as_scale():
    query, key, value = inputs(b=B, t=T, s=S, n=N, k=N, h=H)
    with pytest.raises(ValueError, match="needs a number as scale, got an array"):
        mc.dot_product_attention(query, key, value, scale=factors((N, 1, 1)), max_logit="tokamax")


@pytest.fixture
def compiled():
    """Counts the programs that a call compiles."""
    count = [0]

    def listen(event, *_, **__):
        count[0] += "backend_compile" in event

    def programs(call):
        count[0] = 0
        call()
        return count[0]

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield programs
    jax.monitoring.unregister_event_duration_listener(listen)


X = jnp.ones((1, 24, 2, 4))
CALLS = {
    "max_attention_logit": lambda: mc.max_attention_logit(X, X, is_causal=True, block_size=8),
    "window": lambda: mc.max_attention_logit(X, X, local_window_size=(3, 1), block_size=8),
    "bfloat16": lambda: mc.max_attention_logit(*[X.astype(jnp.bfloat16)] * 2, block_size=8),
    "exact": lambda: mc.dot_product_attention(X, X, X),
    "lse_bound": lambda: mc.dot_product_attention(X, X, X, max_logit="lse_bound"),
    "newton_schulz": lambda: mc.newton_schulz(X[0], method="gram"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_outside_of_jit_compiles_nothing(name, compiled):
    assert compiled(CALLS[name]) > 0
    assert compiled(CALLS[name]) == 0

"""Query heads sharded over a mesh axis and fewer key heads: equal to one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from tests.support.attention_cases import draw
from tests.support.strict import installed

# Mesh axes: 2 for the batch, 4 for the heads. Eight query heads.
HEADS = P("batch", None, "heads")
# Key heads, and the sharding of the queries and of the keys.
PLACEMENTS = [
    (2, HEADS, P("batch")),  # each device has half of a group
    (4, HEADS, P("batch")),
    (4, HEADS, HEADS),
    (1, HEADS, P("batch")),
    (2, P(None, None, ("batch", "heads")), P(None, "heads")),  # keys sharded along the sequence
    (2, HEADS, P(None, None, "batch")),
]


def arrays(key_heads):
    query, key, value = (
        draw(seed, 4, 8, heads, 4) for seed, heads in enumerate((8, key_heads, key_heads))
    )
    return query, key, value


def scale_of(key_heads):
    return jnp.linspace(0.5, 1.5, key_heads).reshape(key_heads, 1, 1)


def exact(query, key, value):
    return mc.dot_product_attention(query, key, value, is_causal=True)


def bound(query, key, value):
    return mc.dot_product_attention(query, key, value, max_logit="lse_bound")


def scaled_by_key_head(query, key, value):
    scale = scale_of(key.shape[2])
    return (
        mc.dot_product_attention(query, key, value, scale=scale),
        mc.max_attention_logit(query, key, scale=scale, block_size=4),
    )


def gradients(query, key, value):
    loss = lambda *arrays: jnp.sum(jnp.square(exact(*arrays)[0]))  # noqa: E731
    return jax.grad(loss, (0, 1, 2))(query, key, value)


def linen(query, key, value):
    return mc.linen.attention_fn(query, key, value)


FUNCTIONS = [exact, bound, scaled_by_key_head, gradients, linen]


@functools.cache
def on_one_device(function, key_heads):
    return jax.device_get(jax.jit(function)(*arrays(key_heads)))


def sharded_call(function, kind, key_heads, query_spec, key_spec):
    mesh = jax.make_mesh((2, 4), ("batch", "heads"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        specs = (query_spec, key_spec, key_spec)
        inputs = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(arrays(key_heads), specs, strict=True)
        ]
        return jax.jit(function)(*inputs)


def check_equal(actual, expected):
    for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("key_heads", "query_spec", "key_spec"), PLACEMENTS, ids=str)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_attention_equals_one_device(kind, key_heads, query_spec, key_spec):
    out, max_logits = sharded_call(exact, kind, key_heads, query_spec, key_spec)
    check_equal((out, max_logits), on_one_device(exact, key_heads))
    if kind == AxisType.Explicit:
        assert jax.typeof(out).sharding.spec[2] == query_spec[2]
        assert jax.typeof(max_logits).sharding.spec[1] == query_spec[2]


@pytest.mark.parametrize("function", FUNCTIONS[1:])
@pytest.mark.parametrize("number", [0, 1])
def test_other_functions_equal_one_device(function, number):
    actual = sharded_call(function, AxisType.Explicit, *PLACEMENTS[number])
    check_equal(actual, on_one_device(function, PLACEMENTS[number][0]))


@pytest.mark.skipif(installed("flax") < (0, 12, 8), reason="Flax 0.12.3 repeats no key heads")
def test_nnx_attention_equals_one_device():
    function = lambda query, key, value: mc.nnx.attention_fn(query, key, value)  # noqa: E731
    actual = sharded_call(function, AxisType.Explicit, *PLACEMENTS[1])
    check_equal(actual, on_one_device(linen, PLACEMENTS[1][0]))

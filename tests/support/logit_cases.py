"""Queries, keys and everything that hides pairs of them, for the tests of attention logits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec as P

from tests.support.attention_cases import draw

SPECS = {
    "query": P("data", None, "model"),
    "key": P("data", None, "model"),
    "value": P("data", None, "model"),
    "bias": P("data", "model"),
    "mask": P("data", "model"),
    "query_seq_lengths": P("data"),
    "key_value_seq_lengths": P("data"),
}


def queries_and_keys(b=2, t=13, s=13, n=4, k=4, h=8, dtype: Any = np.float32):
    return draw(0, b, t, n, h, dtype=dtype), draw(1, b, s, k, h, dtype=dtype)


def inputs(k=2, dtype: Any = np.float32, **shapes):
    q, key = queries_and_keys(k=k, dtype=dtype, **shapes)
    return q, key, draw(4, *key.shape, dtype=dtype)


def boolean(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).random(shape) < 0.5)


def lengths(*numbers):
    return jnp.asarray(numbers, jnp.int32)


def close(actual, expected, rtol=2e-6):
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=rtol)


RULES: dict[str, dict[str, Any]] = {
    "window": {"local_window_size": (3, 1)},
    "one number is both sides": {"local_window_size": 2},
    "window and causal": {"local_window_size": (3, 1), "is_causal": True},
    "only later keys": {"local_window_size": (-2, 5)},
    "query lengths": {"query_seq_lengths": lengths(3, 13)},
    "key lengths": {"key_value_seq_lengths": lengths(1, 6)},
    "all": {
        "local_window_size": (4, 2),
        "is_causal": True,
        "query_seq_lengths": lengths(12, 7),
        "key_value_seq_lengths": lengths(6, 0),
    },
}


def mesh_of_eight(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def sharded_inputs():
    """Every array option, each with all its axes, for a batch of 8."""
    q, key = queries_and_keys(b=8, k=2, dtype=jnp.bfloat16)
    return {
        "query": q,
        "key": key,
        "bias": draw(2, 8, 4, 13, 13, dtype=jnp.bfloat16),
        "mask": boolean(3, 8, 4, 13, 13),
        "query_seq_lengths": lengths(*range(6, 14)),
        "key_value_seq_lengths": lengths(*range(13, 5, -1)),
    }

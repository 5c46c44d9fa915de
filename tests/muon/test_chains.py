"""Optimizers that run in float32 round their results once."""

import jax.numpy as jnp
import numpy as np
import optax

from muonclip_jax._muon.chains import in_float32


def test_a_chain_in_float32_rounds_once():
    tx = in_float32(optax.chain(optax.scale(1 / 3), optax.scale(3.0), optax.trace(0.9)))
    x = jnp.asarray([1.0, 1.0078125], jnp.bfloat16)
    updates, state = tx.update(x, tx.init(x), x)
    np.testing.assert_array_equal(updates, x)
    assert updates.dtype == optax.tree.get(state, "trace").dtype == jnp.bfloat16

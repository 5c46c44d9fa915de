"""Shards are assembled to matrices in the order of the matrix, as tiles or not."""

import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax._sharding.exchange import _assembled, _taken_apart


@pytest.mark.parametrize("grid", [(1, 4), (2, 3), (4, 1)])
# Shards that consist of 8 x 128 tiles, and shards that do not.
@pytest.mark.parametrize("sides", [(16, 256), (8, 130), (6, 128)])
def test_assembled_shards_are_the_matrix(grid, sides):
    (R, C), (height, width) = grid, sides
    X = np.random.default_rng(0).normal(size=(2, R * height, C * width)).astype(np.float32)
    rows = np.split(X, R, axis=-2)
    shards = np.stack([shard for row in rows for shard in np.split(row, C, axis=-1)], axis=1)
    np.testing.assert_array_equal(_assembled(jnp.asarray(shards), grid), X)
    np.testing.assert_array_equal(_taken_apart(jnp.asarray(X), grid), shards)

"""Devices that each have some columns of a matrix orthogonalize it together."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax._orthogonalize.column_shards import ColumnShards
from muonclip_jax._orthogonalize.newton_schulz import Orthogonalizer
from tests.support.sharding_cases import assert_close, make_mesh

PRECONDITIONINGS = ("frobenius", "spectral", "aol", "schatten")
CASES = list(itertools.product(("standard", "gram"), PRECONDITIONINGS))
WIDTH = 32


def coefficients_for(preconditioning):
    # The first needs two windows of the Gram method; the others suit no norm but Frobenius'.
    return mc.ns_coefficients("polar_express" if preconditioning == "frobenius" else "jordan")


def shards_on(devices):
    """Column shards on groups of this many devices of a mesh of 2 x 4."""
    groups = tuple(tuple(range(i, i + devices)) for i in range(0, 8, devices))
    return ColumnShards(("x", "y"), devices, None if devices == 8 else groups)


def on_shards(function, x, devices):
    """Calls a function on each device of 8 / devices groups, with its columns of one matrix."""
    groups, height, width = x.shape
    columns = x.reshape(groups, height, devices, width // devices).transpose(0, 2, 1, 3)
    run = jax.shard_map(
        lambda shard: function(shard[0], shards_on(devices))[None],
        mesh=make_mesh((2, 4), "auto"),
        in_specs=P(("x", "y")),
        out_specs=P(("x", "y")),
        check_vma=False,
    )
    done = np.asarray(jax.jit(run)(columns.reshape(8, height, width // devices)))
    done = done.reshape(groups, devices, height, -1).transpose(0, 2, 1, 3)
    return done.reshape(groups, height, -1)


def draw(groups, height, dtype=np.float32):
    return np.random.default_rng(0).normal(size=(groups, height, WIDTH)).astype(dtype)


# The rows of a product cannot be shared evenly in the second case.
@pytest.mark.parametrize(("devices", "height"), [(2, 12), (4, 7), (8, 16)])
def test_devices_that_share_a_matrix_compute_what_one_device_does(devices, height):
    x = draw(8 // devices, height)

    def shared(shard, shards):
        each = [
            Orthogonalizer(coefficients_for(preconditioning), method, "auto", preconditioning)(
                shard, 1e-8, shards
            )
            for method, preconditioning in CASES
        ]
        return jnp.stack(each, axis=-1).reshape(height, -1)

    got = on_shards(shared, x, devices).reshape(8 // devices, height, WIDTH, -1)
    for i, (method, preconditioning) in enumerate(CASES):
        expected = mc.newton_schulz(
            x,
            coefficients_for(preconditioning),
            method=method,
            preconditioning=preconditioning,
        )
        assert_close(got[..., i], expected, 1e-5)


@pytest.mark.parametrize(("height", "own"), [(8, 2), (7, 7)])
def test_rows_are_shared_and_gathered_in_order(height, own):
    x = np.tile(draw(2, height)[..., :8], 4)  # equal on all devices of a group
    seen = set()

    def there_and_back(shard, shards):
        seen.add(shards.own_rows(shard).shape)
        return shards.all_rows(shards.own_rows(shard), height)

    np.testing.assert_array_equal(on_shards(there_and_back, x, 4), x)
    assert seen == {(own, 8)}


def test_sums_and_maxima_are_within_a_group():
    x = np.array([[[1, 2, 3, 4]], [[50, 60, 70, 80]]], np.float32)
    total = on_shards(lambda shard, shards: shards.sum(shard), x, 4)
    largest = on_shards(lambda shard, shards: shards.max(shard), x, 4)
    np.testing.assert_array_equal(total[..., 0, :], [[10] * 4, [260] * 4])
    np.testing.assert_array_equal(largest[..., 0, :], [[4] * 4, [80] * 4])

"""Devices that have some columns of a matrix each orthogonalize it together."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from muonclip_jax._orthogonalize.team import Team

import muonclip_jax as mc
from muonclip_jax._orthogonalize.newton_schulz import Orthogonalizer, Traced
from tests.support.sharding_cases import assert_close, make_mesh

PRECONDITIONINGS = ("frobenius", "spectral", "aol", "schatten")
CASES = list(itertools.product(("standard", "gram"), PRECONDITIONINGS))
WIDTH = 32


def rows_of(preconditioning):
    # The first needs two windows of the Gram form; the others suit no norm but Frobenius'.
    return mc.ns_coefficients("polar_express" if preconditioning == "frobenius" else "jordan")


def team_of(size):
    """Teams of this size on a mesh of 2 x 4."""
    groups = tuple(tuple(range(i, i + size)) for i in range(0, 8, size))
    return Team(("x", "y"), size, None if size == 8 else groups)


def by_teams(function, x, size):
    """Lets each of 8 / size teams have one matrix, of which each member has some columns."""
    teams, height, width = x.shape
    columns = x.reshape(teams, height, size, width // size).transpose(0, 2, 1, 3)
    run = jax.shard_map(
        lambda part: function(part[0], team_of(size))[None],
        mesh=make_mesh((2, 4), "auto"),
        in_specs=P(("x", "y")),
        out_specs=P(("x", "y")),
        check_vma=False,
    )
    done = jax.jit(run)(columns.reshape(8, height, width // size))
    return done.reshape(teams, size, height, -1).transpose(0, 2, 1, 3).reshape(teams, height, -1)


def draw(teams, height, dtype=np.float32):
    return np.random.default_rng(0).normal(size=(teams, height, WIDTH)).astype(dtype)


# Members of the second team cannot have equal numbers of rows of a product.
@pytest.mark.parametrize(("size", "height"), [(2, 12), (4, 7), (8, 16)])
def test_a_team_does_what_one_device_does(size, height):
    x = draw(8 // size, height)

    def shared(part, team):
        each = [
            Orthogonalizer(rows_of(case[1]), case[0], "auto", case[1], Traced(1e-8)).shared(
                part, team, (height, WIDTH)
            )
            for case in CASES
        ]
        return jnp.stack(each, axis=-1).reshape(height, -1)

    got = by_teams(shared, x, size).reshape(8 // size, height, WIDTH, -1)
    for i, (method, preconditioning) in enumerate(CASES):
        expected = mc.newton_schulz(
            x,
            rows_of(preconditioning),
            method=method,
            preconditioning=preconditioning,
        )
        assert_close(got[..., i], expected, 1e-5)


@pytest.mark.parametrize(("height", "taken"), [(8, 2), (7, 7)])
def test_rows_are_shared_and_gathered_in_order(height, taken):
    x = np.tile(draw(2, height)[..., :8], 4)  # of which all members of a team have the same
    seen = set()

    def there_and_back(part, team):
        seen.add(team.rows(part).shape)
        return team.gather(team.rows(part), height)

    np.testing.assert_array_equal(by_teams(there_and_back, x, 4), x)
    assert seen == {(taken, 8)}


def test_teams_add_up_and_compare_their_own_parts_only():
    x = np.array([[[1, 2, 3, 4]], [[50, 60, 70, 80]]], np.float32)
    total = by_teams(lambda part, team: team.sum(part), x, 4)
    largest = by_teams(lambda part, team: team.max(part), x, 4)
    np.testing.assert_array_equal(total[..., 0, :], [[10] * 4, [260] * 4])
    np.testing.assert_array_equal(largest[..., 0, :], [[4] * 4, [80] * 4])

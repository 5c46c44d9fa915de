"""The Muon family on a mesh: equal to one device, with the collectives that its equations need."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from benchmarks.compiled import collectives
from tests.support.sharding_cases import (
    Leaf,
    assert_close,
    draw,
    each_kind,
    make_mesh,
    no_rematerialization,  # noqa: F401  (of every test here)
    shardings_of,
)

LEAVES = {
    "wte": Leaf((24, 8), P(("x", "y"))),
    "lm_head": {"kernel": Leaf((8, 24), P("x", "y"))},
    "up": {"kernel": Leaf((8, 16), P("x", "y")), "bias": Leaf((16,), P("y"))},
    "layers": {"up": {"kernel": Leaf((2, 8, 16), P("x"))}},
}
FAMILY: dict[str, Any] = {
    "preconditioning": "outputs",
    "neuron_b2": 0.9,
    "cautious_weight_decay": True,
    "consistent_rms": "spectral",
    "weight_decay": 0.3,
    "adam_weight_decay": 0.3,
    "overrides": {"wte": mc.Sinkhorn(), "lm_head/*": mc.Sinkhorn(-1)},
}
TRANSFORMS = {
    "normuon": mc.normalize_neurons,
    "muoneq": lambda: mc.normalize_matrices("outputs"),
    "muon+": lambda: mc.normalize_matrices("matrix"),
    "sinkhorn": mc.scale_by_sinkhorn,
}


def on_mesh(leaves, kind, sizes=(2, 4)):
    shardings = shardings_of(make_mesh(sizes, kind), leaves)
    return jax.device_put(draw(leaves), shardings), shardings


def steps(tx, params, count=2):
    """Returns the updates of the last of some steps, and the state."""

    @jax.jit
    def step(params, state):
        return tx.update(jax.tree.map(jnp.sin, params), state, params)

    state, updates = tx.init(params), None
    for _ in range(count):
        updates, state = step(params, state)
    return updates, state


@each_kind
def test_the_whole_family_equals_one_device(kind):
    params, shardings = on_mesh(LEAVES, kind)
    got, _ = steps(mc.muon(0.1, shardings=shardings, **FAMILY), params)
    expected, _ = steps(mc.muon(0.1, **FAMILY), draw(LEAVES))
    # Measured: 2e-6.
    assert_close(got, expected, 1e-5)
    same = jax.tree.map(lambda u, p: u.sharding.is_equivalent_to(p.sharding, u.ndim), got, params)
    assert all(jax.tree.leaves(same))


@each_kind
@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_transform_equals_one_device(name, kind):
    leaves = {"w": Leaf((8, 16), P("x", "y"))}
    params, _ = on_mesh(leaves, kind)
    got, _ = steps(TRANSFORMS[name](), params)
    expected, _ = steps(TRANSFORMS[name](), draw(leaves))
    assert_close(got, expected, 1e-5)


@each_kind
def test_normuon_keeps_its_moment_sharded_as_the_outputs(kind):
    leaves = {"w": Leaf((8, 16), P("x", "y"))}
    params, _ = on_mesh(leaves, kind)
    state = mc.normalize_neurons().init(params)
    for nu in (state.nu["w"], steps(mc.normalize_neurons(), params)[1].nu["w"]):
        assert nu.shape == (1, 16)
        assert {shard.data.shape for shard in nu.addressable_shards} == {(1, 4)}


@each_kind
@pytest.mark.parametrize("name", TRANSFORMS)
def test_sharded_stacks_send_nothing(name, kind):
    params, _ = on_mesh({"w": Leaf((8, 4, 6), P(("x", "y")))}, kind)
    assert _collectives(TRANSFORMS[name](), params) == []


@each_kind
def test_sharded_outputs_send_one_number_of_each_matrix_for_normuon(kind):
    params, _ = on_mesh({"w": Leaf((2, 8, 16), P(None, None, "y"))}, kind)
    found = _collectives(mc.normalize_neurons(), params)
    assert {one.kind for one in found} == {"all-reduce"}
    assert sum(one.bytes for one in found) == 2 * 2 * 4  # two norms of two matrices


@each_kind
def test_vocabulary_sharded_tables_send_sums_only(kind):
    params, _ = on_mesh({"wte": Leaf((64, 6), P(("x", "y")))}, kind)
    tx = mc.scale_by_sinkhorn()
    found = _collectives(tx, params)
    # Five normalizations of the columns, and the mean norm of the rows.
    assert [one.kind for one in found] == ["all-reduce"] * 6
    assert sorted(one.bytes for one in found) == [4, *[6 * 4] * 5]
    text = jax.jit(tx.update).lower(params, tx.init(params)).compile().as_text() or ""
    assert "maximum" not in "".join(x for x in text.splitlines() if "all-reduce(" in x)


@each_kind
def test_cautious_decay_sends_nothing(kind):
    params, _ = on_mesh({"w": Leaf((8, 16), P("x", "y"))}, kind)
    assert _collectives(mc.add_cautious_weight_decay(0.1), params) == []


def _collectives(tx, params):
    compiled = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
    return collectives(compiled)

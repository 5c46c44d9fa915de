"""The communication of a planned update: counted in the compiled program, and as planned."""

import math
import os
import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from benchmarks.compiled import Collective, collectives
from muonclip_jax._sharding import strategies
from tests.support.sharding_cases import (
    Leaf,
    draw,
    each_kind,
    make_mesh,
    no_rematerialization,  # noqa: F401  (of every test here)
    planned,
    shardings_of,
)

DEAR = 1e-9  # FLOPs with the cost of a byte, so that small matrices are shared by all


def compiled(leaves, mesh, factory=mc.scale_by_muon, **settings):
    """Compiles an update of leaves that are sharded over a mesh."""
    shardings = shardings_of(mesh, leaves)
    params = jax.device_put(draw(leaves), shardings)
    tx = factory(**settings, shardings=shardings)
    return jax.jit(tx.update).lower(params, tx.init(params), params).compile()


def muon(**settings):
    return mc.muon(0.1, weight_decay=0.1, consistent_rms=0.2, **settings)


@pytest.mark.skipif(
    os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "3", reason="conftest.py silences old jaxlib"
)
def test_a_rematerialization_is_seen(capfd):
    mesh = make_mesh((2, 4), "auto")
    before, after = (NamedSharding(mesh, s) for s in (P(None, "x", "y"), P(("y", "x"))))
    factor = time.time()  # a new program in each run: XLA prints nothing about a cached one
    f = jax.jit(lambda x: factor * x, in_shardings=before, out_shardings=after)
    f.lower(jax.ShapeDtypeStruct((8, 16, 16), jnp.float32)).compile()
    assert "rematerialization" in capfd.readouterr().err


# Strategies.

NOTHING_MOVES = {
    "layers": {"kernel": Leaf((8, 16, 24), P("x"))},
    "experts": {"up": Leaf((2, 8, 16, 24), P(None, ("x", "y")))},
    "blocks": {"attention": {"query": {"kernel": Leaf((8, 16, 2, 8), P(("y", "x")))}}},
    "embedding": Leaf((16, 8), P("x", "y")),
    "norm": {"scale": Leaf((16,), P("y"))},
}


@each_kind
def test_divided_stacks_and_experts_send_nothing_in_a_whole_step(kind):
    assert collectives(compiled(NOTHING_MOVES, make_mesh((2, 4), kind), muon)) == []


@each_kind
@pytest.mark.parametrize("sizes", [(8,), (2, 4), (2, 2, 2)])
def test_full_stacks_move_by_two_all_to_all(kind, sizes):
    leaves = {
        "up": Leaf((16, 16, 64), P(None, ("x", "z"), "y")),
        "down": Leaf((8, 64, 16), P(None, "y", ("x", "z"))),
        "fc1": Leaf((8, 16, 16), P(None, "z", ("y", "x"))),
        "norm": {"scale": Leaf((16,), P("x"))},
    }
    found = collectives(compiled(leaves, make_mesh(sizes, kind), muon))
    assert [c.kind for c in found] == 4 * ["all-to-all"]
    local = sum(math.prod(leaves[name].shape) * 4 / 8 for name in ("up", "down", "fc1"))
    assert sum(c.bytes for c in found) == 2 * local


@each_kind
def test_a_mesh_of_one_device_sends_nothing(kind):
    leaves = {"up": Leaf((3, 16, 32), P(None, "x", "y"))}
    assert collectives(compiled(leaves, make_mesh((1, 1), kind), muon)) == []


def test_axes_of_one_device_send_nothing():
    leaves = {"up": Leaf((3, 16, 32), P(None, "x")), "down": Leaf((8, 32, 16), P("y"))}
    assert collectives(compiled(leaves, make_mesh((1, 8)), muon)) == []


def test_replicas_gather_once(monkeypatch):
    monkeypatch.setattr(strategies, "FLOPS_PER_BYTE", DEAR)
    leaves = {"a": Leaf((3, 16, 24), P()), "b": Leaf((5, 24, 16), P())}
    found = collectives(compiled(leaves, make_mesh((2, 4))))
    assert found == [Collective("all-gather", 8 * 16 * 24 * 4, times=1)]


def test_replicas_of_what_moves_gather_once(monkeypatch):
    monkeypatch.setattr(strategies, "FLOPS_PER_BYTE", DEAR)
    found = collectives(compiled({"a": Leaf((8, 16, 24), P(None, "x"))}, make_mesh((2, 4))))
    assert [c.kind for c in found] == ["all-to-all", "all-to-all", "all-gather"]


# No more than planned.

SHARED = {
    "one by eight": (Leaf((1, 16, 64), P(None, ("x", "y"))), "exchange: 1 on 8 devices each"),
    "three by two": (
        Leaf((11, 16, 32), P(None, "y", "x")),
        "exchange: 1 full + 3 on 2 devices each",
    ),
    "held by eight": (Leaf((16, 64), P(None, ("x", "y"))), "no exchange: each on 8 devices"),
    "held by four": (Leaf((2, 16, 64), P("x", None, "y")), "no exchange: each on 4 devices"),
}


@pytest.mark.parametrize("spec", [P(None, "x", "y"), P(None, ("y", "x")), P(None, None, "x")])
@pytest.mark.parametrize("count", [9, 16])
def test_moves_send_what_is_planned(spec, count):
    mesh, leaves = make_mesh((2, 4)), {"w": Leaf((count, 16, 32), spec)}
    (group,) = planned(leaves, mesh).groups
    found = collectives(compiled(leaves, mesh))
    pieces = math.prod(mesh.shape[name] for name in group.axes)
    # One of the pieces that a device gets is its own.
    assert sum(c.bytes for c in found) * (pieces - 1) / pieces == group.bytes_sent


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("case", SHARED)
def test_teams_send_no_more_than_planned(case, method, monkeypatch):
    monkeypatch.setattr(strategies, "FLOPS_PER_BYTE", DEAR)
    mesh, (leaf, strategy) = make_mesh((2, 4)), SHARED[case]
    (group,) = planned({"w": leaf}, mesh).groups
    assert group.strategy() == strategy
    found = collectives(compiled({"w": leaf}, mesh, ns_method=method))
    moves = [c for c in found if c.kind == "all-to-all"]
    team = [c for c in found if c.kind != "all-to-all"]
    assert len(moves) == 2 * (group.full > 0) + 2 * (not group.in_place)
    # Sums of m x m and the rows of such products, never a matrix; two of one number for the norm.
    sizes = [("all-gather", 4 * 16**2), ("all-reduce", 4), ("all-reduce", 4 * 16**2)]
    assert sorted({c[:2] for c in team}) == sizes
    sums, others = 2 * (group.sharers - 1) / group.sharers, (group.sharers - 1) / group.sharers
    by_team = sum(c.bytes * (sums if c.kind == "all-reduce" else others) for c in team)
    assert sum(c.bytes for c in moves) * 7 / 8 + by_team <= group.bytes_sent

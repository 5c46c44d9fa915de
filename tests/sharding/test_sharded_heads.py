"""`per_head` on a mesh: sharded heads send nothing, and train as on one device."""

from typing import Any, NamedTuple

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

FLAT, OUTPUTS_FIRST = "inputs (heads head_dim)", "(heads head_dim) inputs"


class Case(NamedTuple):
    """A head layout, and the kernels of a module on a mesh of x=2, y=4."""

    layout: Any
    kernels: dict[str, Leaf]


def _tree(case):
    return {"attn": {name: {"kernel": leaf} for name, leaf in case.kernels.items()}}


# Eight query heads and four key heads, over the four devices of y.
LOCAL = {
    "three axes": Case(
        mc.MultiHeadLayout(value="value"),
        {
            "query": Leaf((16, 8, 6), P(None, "y")),
            "key": Leaf((16, 4, 6), P(None, "y")),
            "value": Leaf((16, 4, 6), P(None, "y")),
        },
    ),
    "flat": Case(
        mc.MultiHeadLayout(kernel=FLAT, head_dim=6),
        {"query": Leaf((16, 48), P(None, ("y", "x"))), "key": Leaf((16, 24), P(None, "y"))},
    ),
    "stacked, outputs first": Case(
        mc.MultiHeadLayout(kernel=OUTPUTS_FIRST, head_dim=6),
        {"query": Leaf((2, 48, 16), P("x", "y")), "key": Leaf((2, 24, 16), P("x", "y"))},
    ),
    "pairs": Case(
        mc.MultiHeadLayout(kernel=FLAT, head_dim=6, heads_per_matrix=2),
        {"query": Leaf((16, 48), P(None, "y")), "key": Leaf((16, 24), P(None, "x"))},
    ),
    "latent": Case(
        mc.MLALayout(nope_dim=4, rope_dim=2, value_dim=5, kernel=FLAT),
        {"q_b": Leaf((12, 48), P(None, "y")), "kv_b": Leaf((10, 72), P(None, ("x", "y")))},
    ),
    "fused": Case(
        mc.FusedQKVLayout(head_dim=6, num_kv_heads=4), {"qkv": Leaf((16, 96), P(None, ("x", "y")))}
    ),
}
# Matrices that several devices have a part of.
EXCHANGED = {
    "heads and inputs": Case(
        LOCAL["flat"].layout,
        {"query": Leaf((16, 48), P("x", "y")), "key": Leaf((16, 24), P("x", "y"))},
    ),
    "more devices than key heads": Case(
        mc.MultiHeadLayout(kernel=FLAT, head_dim=8),
        {"query": Leaf((16, 64), P(None, "y")), "key": Leaf((16, 16), P(None, ("x", "y")))},
    ),
    "latent": Case(
        LOCAL["latent"].layout, {"q_b": Leaf((12, 48), P("x")), "kv_b": Leaf((10, 72), P("x", "y"))}
    ),
    "values in one": Case(
        mc.FusedQKVLayout(head_dim=6, kernel="inputs 3 heads head_dim", split_values=False),
        {"qkv": Leaf((16, 3, 8, 6), P("x", None, "y"))},
    ),
}


def _optimizer(case, shardings=None):
    return mc.muon(0.1, weight_decay=0.1, per_head=case.layout, shardings=shardings)


def _step(tx, params):
    return jax.jit(tx.update)(jax.tree.map(jnp.sin, params), tx.init(params), params)[0]


def _on_mesh(case, kind):
    mesh = make_mesh((2, 4), kind)
    shardings = shardings_of(mesh, _tree(case))
    params = jax.device_put(draw(_tree(case)), shardings)
    return _optimizer(case, shardings), params


@each_kind
@pytest.mark.parametrize("name", LOCAL)
def test_sharded_heads_send_nothing_and_equal_one_device(name, kind):
    case = LOCAL[name]
    tx, params = _on_mesh(case, kind)
    compiled = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
    assert collectives(compiled) == []
    plan = mc.sharding_plan(params, per_head=case.layout, shardings=_shardings(params))
    assert {group.strategy() for group in plan.groups} == {"local"}
    _assert_equals_one_device(case, tx, params)


@each_kind
@pytest.mark.parametrize("name", EXCHANGED)
def test_heads_on_several_devices_equal_one_device(name, kind):
    tx, params = _on_mesh(EXCHANGED[name], kind)
    _assert_equals_one_device(EXCHANGED[name], tx, params)


OVER_ALL = Leaf((16, 24), P(None, ("x", "y")))
FUSED = mc.FusedQKVLayout(head_dim=6, num_kv_heads=4, split_values=False)
CUT = {
    "a head on two devices": (
        Case(LOCAL["flat"].layout, {**LOCAL["flat"].kernels, "key": OVER_ALL}),
        r"attn/key/kernel: float32\[16, 24\]: .* shards 4 x 6 over 8 devices",
    ),
    "values in one": (
        Case(FUSED, LOCAL["fused"].kernels),
        r"attn/qkv/kernel: .* shards the axis of its queries\+keys, values",
    ),
}


@each_kind
@pytest.mark.parametrize("name", CUT)
def test_leaves_that_are_sharded_across_heads_raise(name, kind):
    case, message = CUT[name]
    tx, params = _on_mesh(case, kind)
    with pytest.raises(ValueError, match=message) as error:
        _step(tx, params)
    assert "Shard the inputs" in str(error.value)


def _shardings(params):
    return jax.tree.map(lambda x: x.sharding, params)


def _assert_equals_one_device(case, tx, params):
    expected = _step(_optimizer(case), draw(_tree(case)))
    got = _step(tx, params)
    assert_close(got, expected, 1e-5)
    same = jax.tree.map(lambda u, p: u.sharding.is_equivalent_to(p.sharding, u.ndim), got, params)
    assert all(jax.tree.leaves(same))

"""Sharded matrices are orthogonalised to the same numbers, and stay where they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
import reference
from muonclip_jax import _sharding_plan
from sharding_cases import Leaf, draw, each_kind, make_mesh, numbers_of, on, shardings_of

HEADS = mc.MuonDimensionNumbers(-3, (-2, -1))
PER_HEAD = mc.MuonDimensionNumbers(-3, -1)
OUT = mc.MuonDimensionNumbers((-3, -2), -1)

# Leaves of every kind. Mesh axes that a mesh does not have are left out.
LEAVES = {
    # One group: wide, tall and stacked; with the five of `stack`, seven matrices.
    "up": Leaf((16, 24), P("x", "y")),
    "down": Leaf((24, 16), P("y", "x")),
    "stack": Leaf((5, 16, 24), P(None, "x", "y")),
    # One group of squares, turned.
    "query": Leaf((8, 8), P("x", "y")),
    "out": Leaf((3, 8, 8), P(None, "y", "x")),
    # Several axes on one side, in both orders; three, eleven and one.
    "both_rows": Leaf((3, 16, 24), P(None, ("x", "y"))),
    "both_columns": Leaf((11, 16, 24), P(None, None, ("y", "x"))),
    "all": Leaf((16, 8), P(("z", "x", "y"))),
    # Stacks and experts.
    "layers": Leaf((8, 16, 24), P("x", None, None)),
    "experts": Leaf((2, 8, 16, 24), P(None, ("x", "y"))),
    "sharded_experts": Leaf((3, 8, 16, 24), P(None, "y", "x")),
    # Attention: a merged side divided by heads, by head_dim, by both; each head alone.
    "heads": Leaf((2, 16, 8, 4), P(None, "x", "y"), HEADS),
    "head_dim": Leaf((16, 4, 8), P("z", None, ("y", "x")), HEADS),
    "heads_and_dim": Leaf((5, 16, 8, 8), P(None, None, "x", "y"), HEADS),
    "output": Leaf((8, 4, 16), P("x", "z", "y"), OUT),
    "per_head": Leaf((16, 8, 4), P("y", "x"), PER_HEAD),
    # Replicated, and tiny.
    "replicated": Leaf((3, 12, 20), P()),
    "tiny": Leaf((2, 3), P()),
    "row": Leaf((1, 16), P(None, "x")),
    "rows": Leaf((3, 1, 16), P(None, None, ("x", "y"))),
    "column": Leaf((16, 1), P("y")),
}
SIZES = [(8,), (2, 4), (4, 2), (1, 8), (8, 1), (2, 2, 2)]


@pytest.fixture(autouse=True)
def no_rematerialisation(capfd):
    """XLA says it on file descriptor 2 when it gathers an array to lay it out in another way."""
    yield
    assert "rematerialization" not in capfd.readouterr().err


@pytest.fixture
def dear_work(monkeypatch):
    """Makes every FLOP dearer than any byte, so that small matrices too are shared by all."""
    monkeypatch.setattr(_sharding_plan, "FLOPS_PER_BYTE", 0)


def step(params, shardings=None, **settings):
    """Makes one update, jitted; the gradients are the parameters."""
    tx = mc.scale_by_muon(**settings, shardings=shardings)
    return jax.jit(tx.update)(params, tx.init(params))[0]


@functools.cache
def expected(dtype=jnp.float32, **settings):
    return step(draw(LEAVES, dtype=dtype), weight_dimension_numbers=numbers_of(LEAVES), **settings)


def assert_equal(got, expected, tolerance=1e-5):
    errors = {
        jax.tree_util.keystr(path): reference.relative_error(g, e)
        for (path, g), e in zip(
            jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
        )
    }
    print(errors)
    assert {path: error for path, error in errors.items() if not error < tolerance} == {}


def assert_lie_alike(got, params):
    for g, p in zip(*map(jax.tree.leaves, (got, params)), strict=True):
        assert g.sharding.is_equivalent_to(p.sharding, g.ndim)
        assert jax.typeof(g) == jax.typeof(p)


@pytest.mark.parametrize("sizes", SIZES)
@each_kind
def test_sharded_equals_unsharded(kind, sizes, dear_work):
    mesh = make_mesh(sizes, kind)
    shardings = shardings_of(mesh, LEAVES)
    params = jax.device_put(draw(LEAVES), shardings)
    settings = {"weight_dimension_numbers": numbers_of(LEAVES), "ns_coeffs": ((1.5, -0.5, 0.1),)}
    with jax.set_mesh(mesh):
        got = step(params, shardings if kind == "auto" else None, **settings)
    assert_lie_alike(got, params)
    assert_equal(got, expected(ns_coeffs=((1.5, -0.5, 0.1),)))

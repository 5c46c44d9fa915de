"""Sharded matrices are orthogonalized to the same numbers, and stay where they are."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import muonclip_jax as mc
from benchmarks.compiled import collectives
from muonclip_jax._sharding import plan, strategies
from tests.support import reference
from tests.support.by_day import at_night
from tests.support.sharding_cases import (
    DEAR,
    ONE_STEP,
    Leaf,
    assert_close,
    draw,
    each_kind,
    make_mesh,
    no_rematerialization,  # noqa: F401  (of every test here)
    numbers_of,
    planned,
    shardings_of,
)

HEADS = mc.MuonDimensionNumbers(-3, (-2, -1))
PER_HEAD = mc.MuonDimensionNumbers(-3, -1)
OUT = mc.MuonDimensionNumbers((-3, -2), -1)

# Leaves of every kind. Mesh axes that a mesh does not have are left out.
LEAVES = {
    # One group: wide, tall and stacked, seven matrices.
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
    "divided_experts": Leaf((3, 8, 16, 24), P(None, "y", "x")),
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


def step(params, **settings):
    """Makes one update, jitted; the gradients are the parameters."""
    tx = mc.scale_by_muon(**settings)
    update = jax.jit(tx.update)
    return update(params, tx.init(params))[0]


def assert_lie_alike(got, params):
    for g, p in zip(*map(jax.tree.leaves, (got, params)), strict=True):
        assert g.sharding.is_equivalent_to(p.sharding, g.ndim)
        assert jax.typeof(g) == jax.typeof(p)


@functools.cache
def without_a_mesh():
    numbers = numbers_of(LEAVES)
    return step(draw(LEAVES), weight_dimension_numbers=numbers, ns_coeffs=ONE_STEP)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("explicit", (2, 2, 2)),
        ("auto", (4, 2)),
        *at_night(*(("explicit", s) for s in [(8,), (2, 4), (1, 8)])),
        *at_night(*(("auto", s) for s in [(8, 1), (2, 2, 2)])),
    ],
)
def test_sharded_equals_unsharded(kind, sizes, dear_work):
    mesh = make_mesh(sizes, kind)
    shardings = shardings_of(mesh, LEAVES)
    params = jax.device_put(draw(LEAVES), shardings)
    settings = {"weight_dimension_numbers": numbers_of(LEAVES), "ns_coeffs": ONE_STEP}
    with jax.set_mesh(mesh):
        got = step(params, shardings=shardings if kind == "auto" else None, **settings)
    assert_lie_alike(got, params)
    assert_close(got, without_a_mesh(), 1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_leaves_that_are_exchanged_on_their_own_equal_unsharded_ones(kind, dear_work, monkeypatch):
    monkeypatch.setattr(plan, "_MIN_STACK", 1)
    test_sharded_equals_unsharded(kind, (2, 2, 2), dear_work)


# Numbers, with every strategy in one tree.

# On a mesh of 2 x 4, for dear work: see `test_these_leaves_need_every_strategy`.
FEW = {
    "moved": Leaf((11, 12, 24), P(None, "x", "y")),
    "held": Leaf((16, 48), P(None, ("y", "x"))),
    "held_odd": Leaf((12, 40), P(None, ("x", "y"))),
    "shared": Leaf((3, 20, 12), P()),
    "local": Leaf((8, 6, 6), P(("x", "y"))),
}


@functools.cache
def update_of_few(kind="explicit", dtype=jnp.float32, **settings):
    """Compiles the update of these leaves; returns it with the state and the shardings."""
    mesh = make_mesh((2, 4), kind)
    shardings = shardings_of(mesh, FEW)
    said = shardings if kind == "auto" else None
    tx = mc.scale_by_muon(**settings, shardings=said)
    params = jax.device_put(draw(FEW, dtype=dtype), shardings)
    state = tx.init(params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies, "FLOPS_PER_BYTE", DEAR)
        lowered = jax.jit(tx.update).lower(params, state)
    return lowered.compile(), state, shardings


@functools.cache
def update_without(**settings):
    tx = mc.scale_by_muon(**settings)
    return tx.init, jax.jit(tx.update)


def without_mesh(grads, **settings):
    """Updates these leaves on one device."""
    init, update = update_without(**settings)
    return update(grads, init(grads))[0]


def on_mesh(grads, **settings):
    """Updates on the mesh; gives the result on the host."""
    compiled, state, shardings = update_of_few(**settings)
    return jax.tree.map(np.asarray, compiled(jax.device_put(grads, shardings), state)[0])


def test_these_leaves_need_every_strategy(dear_work):
    strategies = [g.strategy() for g in planned(FEW, make_mesh((2, 4))).groups]
    assert sorted(strategies) == [
        "exchange: 1 full + 3 on 2 devices each",
        "local",
        "no exchange: each on 8 devices",
        "no exchange: each on 8 devices",
        "split over replicas",
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"ns_method": "gram", "nesterov": False},
        {"ns_coeffs": "polar_express", "adaptive": True},
        *at_night(
            {"preconditioning": "aol"},
            {"ns_method": "standard"},
            {"preconditioning": "spectral"},
            {"preconditioning": "schatten", "ns_coeffs": "you"},
            {"kind": "auto", "ns_coeffs": "polar_express", "ns_method": "gram"},
        ),
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_settings_do_on_a_mesh_what_they_do_without(settings):
    grads = draw(FEW)
    plain = {name: value for name, value in settings.items() if name != "kind"}
    assert_close(on_mesh(grads, **settings), without_mesh(grads, **plain), 1e-5)


@pytest.mark.nightly
def test_complex_matrices():
    grads = draw(FEW, dtype=jnp.complex64)
    assert_close(on_mesh(grads, dtype=jnp.complex64), without_mesh(grads), 1e-5)


def test_float64_matrices():
    with jax.enable_x64(True):
        grads = draw(FEW, dtype=jnp.float64)
        assert_close(on_mesh(grads, dtype=jnp.float64), without_mesh(grads), 1e-12)


def test_bfloat16_parameters_are_rounded_once():
    grads = draw(FEW, dtype=jnp.bfloat16)
    got, expected = on_mesh(grads, dtype=jnp.bfloat16), without_mesh(grads)
    chex.assert_trees_all_equal_dtypes(got, grads)
    # Measured: 2e-5, of numbers between two neighbors; another rounding would be 1e-3.
    assert_close(got, expected, 1e-4)


@pytest.mark.parametrize("ns_dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits_lose_no_more_than_without_a_mesh(ns_dtype):
    grads = draw(FEW)
    exact, plain = without_mesh(grads), without_mesh(grads, ns_dtype=ns_dtype)
    got = on_mesh(grads, ns_dtype=ns_dtype)
    for g, p, e in zip(*map(jax.tree.leaves, (got, plain, exact)), strict=True):
        assert np.vdot(g, p) > 0.999 * np.linalg.norm(g) * np.linalg.norm(p)
        # Measured: 1.2; the sums of a team are taken in another order, before they are rounded.
        assert reference.relative_error(g, e) < 1.5 * reference.relative_error(p, e)


each_wire = pytest.mark.parametrize(
    "wire", [{}, {"ns_dtype": jnp.float16}], ids=["float32", "float16"]
)


@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100])
@each_wire
def test_the_scale_of_a_gradient_does_not_matter(scale, wire):
    grads = draw(FEW)
    got = on_mesh(jax.tree.map(lambda g: g * scale, grads), **wire)
    assert_close(got, on_mesh(grads, **wire), 1e-5)


@pytest.mark.nightly
def test_float64_that_moves_as_float32_does_not_overflow():
    with jax.enable_x64(True):
        grads = draw(FEW, dtype=jnp.float64)
        settings = {"dtype": jnp.float64, "ns_dtype": jnp.float32}
        got = on_mesh(jax.tree.map(lambda g: g * 1e100, grads), **settings)
        assert_close(got, without_mesh(grads), 1e-5)


def broken(grads, value):
    """Puts a value into one matrix that is moved, one of a team, one of a replica and others."""
    return {
        "moved": grads["moved"].at[2, 3, 4].set(value).at[9, 11, 23].set(value),
        "held": grads["held"].at[3, 4].set(value),
        "held_odd": grads["held_odd"],
        "shared": grads["shared"].at[1, 5, 6].set(value),
        "local": grads["local"].at[7, 0, 0].set(value),
    }


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@each_wire
def test_a_broken_matrix_loses_only_itself(bad, wire):
    grads = draw(FEW)
    clean, got = on_mesh(grads, **wire), on_mesh(broken(grads, bad), **wire)
    lost = jax.tree.map(lambda g: np.any(np.isnan(g), axis=(-2, -1)), got)
    assert {name: np.flatnonzero(where).tolist() for name, where in lost.items()} == {
        "moved": [2, 9],
        "held": [0],
        "held_odd": [],
        "shared": [1],
        "local": [7],
    }
    for name, where in lost.items():
        np.testing.assert_array_equal(got[name][~where], clean[name][~where])


def test_zero_matrices_stay_zero():
    grads = draw(FEW)
    zero = {"moved": np.array([0, 8, 10]), "shared": 2, "local": 1, "held": slice(None)}
    for name, which in zero.items():
        grads[name] = grads[name].at[which].set(0)
    got = on_mesh(grads)
    for name, which in zero.items():
        np.testing.assert_array_equal(got[name][which], np.zeros_like(got[name][which]))
    expected = without_mesh(grads)
    del got["held"], expected["held"]
    assert_close(got, expected, 1e-5)


def test_a_tree_of_zeros_stays_zero():
    zeros = jax.tree.map(jnp.zeros_like, draw(FEW))
    chex.assert_trees_all_equal(on_mesh(zeros), zeros)


def test_equal_gradients_give_equal_bits():
    chex.assert_trees_all_equal(on_mesh(draw(FEW)), on_mesh(draw(FEW)))


@each_kind
def test_without_jit_too(kind, dear_work):
    leaves = {name: FEW[name] for name in ("moved", "shared")}
    shardings = shardings_of(make_mesh((2, 4), kind), leaves)
    params = jax.device_put(draw(leaves), shardings)
    tx = mc.scale_by_muon(ONE_STEP, shardings=shardings)
    got = tx.update(params, tx.init(params))[0]
    assert_lie_alike(got, params)
    assert_close(got, step(draw(leaves), ns_coeffs=ONE_STEP), 1e-5)


def test_what_moved_in_sixteen_bits_is_as_wide_as_before(strict_promotion):
    shardings = shardings_of(make_mesh((2, 4)), FEW)
    params = jax.device_put(draw(FEW), shardings)
    tx = mc.scale_by_muon(ns_dtype=jnp.bfloat16, adaptive=True)
    got = jax.eval_shape(tx.update, params, tx.init(params))[0]
    chex.assert_trees_all_equal_dtypes(got, params)


@each_kind
def test_leaves_without_a_number(kind):
    leaves = {
        "none": Leaf((0, 8, 8), P(None, "x")),
        "low": Leaf((3, 0, 8), P(None, None, "y")),
        "narrow": Leaf((3, 8, 0), P(None, "x")),
    }
    shardings = shardings_of(make_mesh((2, 4), kind), leaves)
    params = jax.device_put(draw(leaves), shardings)
    tx = mc.scale_by_muon()
    # On an Auto mesh, JAX drops the sharding of an empty array without out_shardings, even in
    # jax.jit(lambda x: x).
    outputs = {"out_shardings": shardings} if kind == "auto" else {}
    got = jax.jit(lambda p, s: tx.update(p, s)[0], **outputs)(params, tx.init(params))
    chex.assert_trees_all_equal(got, params)
    assert_lie_alike(got, params)


def test_a_mesh_with_axes_of_both_kinds(dear_work):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Explicit))
    shardings = shardings_of(mesh, FEW)
    params = jax.device_put(draw(FEW), shardings)
    got = step(params, shardings=shardings, ns_coeffs=ONE_STEP)
    assert_close(got, step(draw(FEW), ns_coeffs=ONE_STEP), 1e-5)
    # The types of jax 0.12 have no Auto axis on a dimension that an Explicit one shards further.
    # XLA chooses the Auto axis of such an update.
    for tree in (got, params):
        del tree["held_odd"], tree["local"]
    assert_lie_alike(got, params)


def test_whole_matrices_move_some_at_a_time(monkeypatch):
    leaves = {"w": Leaf((46, 8, 24), P(None, "x", "y")), "turned": Leaf((24, 8), P("y", "x"))}
    params = jax.device_put(draw(leaves), shardings_of(make_mesh((2, 4)), leaves))
    one_go = step(params)
    monkeypatch.setattr(strategies, "MAX_EXCHANGED_BYTES", 2 * 8 * 24 * 4)
    tx = mc.scale_by_muon()
    compiled = jax.jit(tx.update).lower(params, tx.init(params)).compile()
    moves = [c for c in collectives(compiled) if c.kind == "all-to-all"]
    # The stack alone fills the memory, so it does not meet the turned leaf. Two of six at once.
    assert sorted((c.times != 1, c.bytes) for c in moves) == [
        (False, 8 * 24 * 4),
        (False, 8 * 24 * 4),
        (True, 2 * 8 * 24 * 4),
        (True, 2 * 8 * 24 * 4),
    ]
    assert_close(compiled(params, tx.init(params))[0], one_go, 1e-5)

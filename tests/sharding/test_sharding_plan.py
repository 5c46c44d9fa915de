"""The device of each matrix, from shapes and shardings alone."""

from typing import Any

import numpy as np
import pytest

from muonclip_jax._orthogonalize.matrices import Axes
from muonclip_jax._sharding import plan as plans, strategies
from muonclip_jax._sharding.placement import PlacedLeaf
from muonclip_jax._sharding.plan import make_plan
from tests.support.sharding_cases import F16, F32, work


def leaf(path, shape, *spec, axes=None, dtype: Any = F32):
    """A leaf whose matrices are its last two axes, and the mesh axes that divide each axis."""
    axes = axes or Axes(tuple(range(len(shape) - 2)), (len(shape) - 2,), (len(shape) - 1,))
    names = [tuple(entry.split()) for entry in (*spec, *[""] * (len(shape) - len(spec)))]
    return PlacedLeaf(path, shape, np.dtype(dtype), axes, tuple(names))


def plan(*leaves, transfer_dtype=lambda dtype: dtype, **mesh):
    return make_plan(leaves, mesh, work, transfer_dtype)


def only_group(*leaves, **mesh):
    (group,) = plan(*leaves, **mesh).groups
    return group


def moved(m, n, count, pieces, item=4):
    """Bytes that leave a device when `count` matrices in `pieces` shards are exchanged twice."""
    return 2 * count * (m * n * item / pieces) * (pieces - 1) / pieces


def exchanged(m, item=4):
    """Bytes that leave a member of a team: two sums in float32, both ways, and fourteen gathers."""
    return 16 * m * m + 14 * m * m * item


# Strategies, with all numbers by hand.


def test_full_matrices_are_local():
    group = only_group(leaf("w", (8, 64, 128), "x"), x=4)
    assert group.strategy() == "local"
    assert (group.count, group.full, group.flops, group.bytes_sent) == (
        2,
        2,
        2 * work(64, 128, F32),
        0,
    )


def test_experts_and_layers_are_counted_on_each_device():
    group = only_group(leaf("w", (6, 8, 64, 128), "y", "x"), x=4, y=2)
    assert (group.strategy(), group.count) == ("local", 6 // 2 * 8 // 4)


def test_as_many_matrices_as_devices_are_one_for_each():
    group = only_group(leaf("w", (8, 512, 1024), "", "x"), x=8)
    assert group.strategy() == "exchange: 1 full"
    assert (group.flops, group.bytes_sent) == (work(512, 1024, F32), moved(512, 1024, 8, 8))
    assert group.bytes_sent == 3_670_016


def test_both_sides_may_be_divided_and_by_several_axes_each():
    group = only_group(leaf("w", (24, 512, 1024), "", "z", "y x"), x=2, y=2, z=2)
    assert (group.row_axes, group.column_axes, group.axes) == (("z",), ("y", "x"), ("z", "y", "x"))
    assert (group.strategy(), group.full) == ("exchange: 3 full", 3)


def test_batch_axes_stay_divided_while_sides_move():
    group = only_group(leaf("w", (3, 4, 64, 64), "", "x", "y"), x=2, y=2)
    assert (group.strategy(), group.count, group.replica_axes) == ("exchange: 3 full", 6, ())


def test_a_small_remainder_is_padded_with_zeros():
    group = only_group(leaf("w", (11, 64, 128), "", "x"), x=8)
    assert group.strategy() == "exchange: 2 full"
    # Sixteen are sent and two orthogonalized on each device, five of them zero.
    assert (group.flops, group.bytes_sent) == (2 * work(64, 128, F32), moved(64, 128, 16, 8))


@pytest.mark.parametrize(
    ("count", "strategy", "whole", "rest", "team"),
    [
        (3, "exchange: 3 on 2 devices each", 0, 3, 2),
        (11, "exchange: 1 full + 3 on 2 devices each", 1, 3, 2),
        (2, "exchange: 2 on 4 devices each", 0, 2, 4),
        (1, "exchange: 1 on 8 devices each", 0, 1, 8),
        (5, "exchange: 1 full", 1, 0, 1),  # more than half the number of devices: no two for each
    ],
)
def test_a_large_remainder_is_shared(count, strategy, whole, rest, team):
    m, n = 8192, 16384
    group = only_group(leaf("w", (count, m, n), "", "x"), x=8)
    assert group.strategy() == strategy
    assert (group.full, group.remainder, group.sharers, group.in_place) == (
        whole,
        rest,
        team,
        False,
    )
    if rest:
        assert group.flops == (whole + 1 / team) * work(m, n, F32)
        assert group.bytes_sent == moved(m, n, 8 * whole + 8 // team, 8) + exchanged(m)


def test_devices_that_share_a_matrix_need_equal_columns():
    # 8200 / 8 columns are odd: no two devices can have equal parts of a shard.
    group = only_group(leaf("w", (1, 8200, 8200), "", "", "x y"), x=4, y=2)
    assert group.in_place
    group = only_group(leaf("w", (1, 8192, 8200), "", "z", "x y"), x=4, y=2, z=2)
    assert group.strategy() == "exchange: 1 full"


def test_sharded_columns_are_not_exchanged():
    for w in (
        leaf("wide", (8192, 16384), "", "x"),
        leaf("tall", (16384, 8192), "x"),
        leaf("square", (8192, 8192), "x"),
    ):
        group = only_group(w, x=8)
        assert group.strategy() == "no exchange: each on 8 devices"
        assert (group.flops, group.bytes_sent) == (work(group.m, group.n, F32) / 8, exchanged(8192))


def test_many_long_thin_matrices_are_not_exchanged():
    # A member sends 16 sums of 16 x 16 instead of moving 16 matrices of 16 x 65536.
    group = only_group(leaf("w", (16, 16, 65536), "", "", "x"), x=8)
    assert (group.in_place, group.remainder, group.sharers) == (True, 16, 8)
    assert group.bytes_sent == 16 * exchanged(16) < moved(16, 65536, 16, 8) / 40


# Replicas.


def test_replicas_split_large_matrices():
    group = only_group(leaf("w", (3, 2048, 2048)), x=4)
    assert (group.strategy(), group.replica_axes, group.full) == ("split over replicas", ("x",), 1)
    # Each gets one from each of three others, and one of those is padding.
    assert (group.flops, group.bytes_sent) == (work(2048, 2048, F32), 3 * 2048**2 * 4)


def test_replicas_split_what_is_exchanged_over_other_axes():
    group = only_group(leaf("w", (8, 2048, 2048), "", "x"), x=2, y=4)
    assert (group.strategy(), group.replica_axes) == ("exchange: 1 full", ("y",))
    matrix = 2048**2 * 4
    assert group.flops == work(2048, 2048, F32)
    assert group.bytes_sent == moved(2048, 2048, 2, 2) + 8 * (matrix / 2) * 3 / 4


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4096, 4096), (4096, 4096)])
def test_each_replica_works_alone_on_one_matrix_and_on_small_ones(shape):
    group = only_group(leaf("w", shape), x=4)
    assert (group.strategy(), group.replica_axes, group.bytes_sent) == ("local", (), 0)


def test_many_replicas_of_two_matrices_would_mostly_send_padding():
    shape = (2, 1024, 1024)
    # One matrix less, 20 · 2³⁰ FLOPs, for matrices of 2²² bytes from one other device, or from 63.
    assert only_group(leaf("w", shape), x=2).strategy() == "split over replicas"
    assert only_group(leaf("w", shape), x=64).strategy() == "local"


# Groups.


def paths_of(p):
    """The leaves of a group, and the transposed ones among them."""
    return sorted(
        sorted((p.leaves[m.leaf].path, m.transposed) for m in group.members) for group in p.groups
    )


def test_tall_leaves_share_a_group_with_wide_ones():
    p = plan(leaf("up", (2, 8, 16), "", "x", "y"), leaf("down", (16, 8), "y", "x"), x=2, y=2)
    assert paths_of(p) == [[("down", True), ("up", False)]]
    (group,) = p.groups
    assert (group.m, group.n, group.row_axes, group.column_axes, group.count) == (
        8,
        16,
        ("x",),
        ("y",),
        3,
    )


def test_tall_leaves_whose_axes_do_not_fit_stay_apart():
    p = plan(leaf("up", (8, 16), "x", "y"), leaf("down", (16, 8), "x", "y"), x=2, y=2)
    assert paths_of(p) == [[("down", True)], [("up", False)]]


def test_square_matrices_are_transposed_to_share_a_group():
    specs = {"q": "xy", "o": "yx", "row": "x ", "column": " x"}
    squares = [leaf(name, (8, 8), *spec) for name, spec in specs.items()]
    p = plan(*squares, x=2, y=2)
    assert paths_of(p) == [[("column", False), ("row", True)], [("o", True), ("q", False)]]


def test_other_shapes_dtypes_and_batch_axes_stay_apart():
    leaves = [
        leaf("w", (4, 8, 16), "", "x"),
        leaf("shape", (4, 8, 32), "", "x"),
        leaf("dtype", (4, 8, 16), "", "x", dtype=np.float64),
        leaf("batch", (4, 8, 16), "y", "x"),
    ]
    assert len(plan(*leaves, x=2, y=2).groups) == 4


def test_batch_axes_meet_in_any_order():
    leaves = [leaf("a", (2, 2, 8, 16), "y", "x"), leaf("b", (2, 2, 8, 16), "x", "y")]
    assert only_group(*leaves, x=2, y=2).count == 2


def test_merged_sides_are_divided_by_the_axes_of_all_their_parts():
    heads = Axes((0,), (1,), (2, 3))
    per_head = Axes((0, 2), (1,), (3,))
    shape, spec = (3, 8, 4, 4), ("", "x", "y", "z")
    merged = only_group(leaf("q", shape, *spec, axes=heads), x=2, y=2, z=2)
    assert (merged.m, merged.n, merged.row_axes, merged.column_axes) == (8, 16, ("x",), ("y", "z"))
    each = only_group(leaf("q", shape, *spec, axes=per_head), x=2, y=2, z=2)
    # 4 x 8, as its matrices are tall: rows and columns are swapped, and the heads are sharded.
    assert (each.m, each.n, each.row_axes, each.column_axes, each.count) == (
        4,
        8,
        ("z",),
        ("x",),
        6,
    )


def test_large_leaves_with_a_multiple_of_the_devices_are_stacks_of_their_own(monkeypatch):
    leaves = [
        leaf("one", (3, 8, 8), "", "x", "y"),
        leaf("q", (8, 8, 8), "", "x", "y"),
        leaf("o", (4, 8, 8), "", "y", "x"),
        leaf("two", (6, 8, 8), "", "y", "x"),
    ]
    group = only_group(*leaves, x=2, y=2)
    assert (group.full, group.remainder) == (6, 0)  # padded
    assert group.stacks({"x": 2, "y": 2}) == [group]
    monkeypatch.setattr(plans, "_MIN_STACK", 4 * 8 * 8 // 4)
    q, o, others = group.stacks({"x": 2, "y": 2})
    assert (q.count, q.full, q.row_axes, q.members[0].transposed) == (8, 2, ("x",), False)
    # A square leaf stays as it is, so its rows are sharded over the other axis.
    assert (o.count, o.full, o.row_axes, o.members[0].transposed) == (4, 1, ("y",), False)
    assert (others.count, others.full, len(others.members)) == (9, 3, 2)
    assert others.members[1].transposed
    assert [stack.chunk for stack in (q, o, others)] == [2, 1, 3]


def test_a_tall_stack_is_transposed_later(monkeypatch):
    monkeypatch.setattr(plans, "_MIN_STACK", 0)
    tall, wide = leaf("tall", (4, 16, 8), "", "x", "y"), leaf("wide", (3, 8, 16), "", "y", "x")
    stack, rest = only_group(tall, wide, x=2, y=2).stacks({"x": 2, "y": 2})
    assert (stack.m, stack.n, stack.row_axes, stack.column_axes) == (16, 8, ("x",), ("y",))
    assert (rest.m, rest.n, rest.row_axes, rest.full + rest.remainder) == (8, 16, ("y",), 1)


def test_many_leaves_are_one_stack(monkeypatch):
    monkeypatch.setattr(plans, "_MIN_STACK", 0)
    leaves = [leaf(f"layer_{i}", (2, 8, 16), "", "x") for i in range(5)]
    group = only_group(*leaves, x=2)
    assert group.stacks({"x": 2}) == [group]
    four = only_group(*leaves[:4], x=2)
    assert len(four.stacks({"x": 2})) == 4


def test_a_leaf_that_fills_the_memory_of_a_move_is_alone(monkeypatch):
    leaves = [
        leaf(name, (count, 8, 16), "", "x")
        for name, count in zip("abcd", (8, 9, 9, 8), strict=True)
    ]
    monkeypatch.setattr(strategies, "MAX_EXCHANGED_BYTES", 8 * 8 * 16 * 4 // 2)
    p = plan(*leaves, x=2)
    assert paths_of(p) == [[("a", False), ("d", False)], [("b", False)], [("c", False)]]
    halved = plan(*leaves, x=2, transfer_dtype=lambda dtype: F16)
    assert len(halved.groups) == 1


@pytest.mark.parametrize(("fit", "chunk"), [(0, 1), (1, 1), (3, 3), (5, 4), (11, 6), (12, 12)])
def test_chunks_are_equal_and_fit(monkeypatch, fit, chunk):
    monkeypatch.setattr(strategies, "MAX_EXCHANGED_BYTES", fit * 8 * 16 * 4)
    assert only_group(leaf("w", (24, 8, 16), "", "x"), x=2).chunk == chunk


def test_a_narrow_transfer_dtype_halves_the_bytes_sent():
    w = leaf("w", (8, 512, 1024), "", "x")
    wide, narrow = (
        plan(w, x=8, transfer_dtype=lambda _, d=d: d).groups[0].bytes_sent for d in (F32, F16)
    )
    assert narrow == wide / 2


def test_axes_of_one_device_are_no_axes():
    p = plan(leaf("w", (8, 16, 32), "", "y"), x=1, y=8, z=1)
    assert p.mesh == {"y": 8}
    assert p.groups[0].replica_axes == ()


def test_an_empty_tree():
    assert plan(x=8).groups == ()


# The printed plan.

GOLDEN = """\
mesh fsdp=4, tp=2; per device and step 4.3e+12 FLOPs, 1,635.8 MB sent
matrices  rows         columns          on each device                          FLOPs     MB sent  leaves
11        4096 / fsdp  8192 / tp        exchange: 1 full + 3 on 2 devices each  4.12e+12  1,560.3  up and 1 more
3         128          256              local                                   2.52e+08  0.0      experts
1         1024         65536 / fsdp.tp  no exchange: each on 8 devices          1.72e+11  75.5     thin"""  # noqa: E501


def test_the_table():
    p = plan(
        leaf("up", (10, 4096, 8192), "", "fsdp", "tp"),
        leaf("down", (8192, 4096), "tp", "fsdp"),
        leaf("experts", (6, 4, 256, 128), "", "fsdp tp"),
        leaf("thin", (1024, 65536), "", "fsdp tp"),
        fsdp=4,
        tp=2,
    )
    assert str(p) == GOLDEN

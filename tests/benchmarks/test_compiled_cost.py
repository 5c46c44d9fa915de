"""What a compiled program costs is counted as its formulas say, on CPU and in the text of TPUs."""

import functools
import importlib
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from benchmarks import compiled

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
with pytest.MonkeyPatch.context() as patch:  # as a benchmark finds them
    patch.syspath_prepend(BENCHMARKS)
    ahead = importlib.import_module("ahead")

N, TIMES = 16, 7
FLOAT = 4  # bytes
ROWS = (64, N)  # of all devices; each has 8
MINE = 8 * N * FLOAT  # bytes


def cost_of(f, *shapes):
    """Costs of a function of each device's part of arrays that 8 devices divide."""
    mesh = Mesh(np.array(jax.devices()), "x")
    f = jax.shard_map(f, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    where = NamedSharding(mesh, P("x"))
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where) for shape in shapes]
    return compiled.compiled_cost(jax.jit(f).lower(*leaves).compile())


def repeated(f):
    return lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, length=TIMES)[0]


def text_cost(*lines, functions=""):
    """Costs of a program as the TPU compiler writes it."""
    body = "\n".join(f"  {line}" for line in lines)
    head = "ENTRY %main.1_spmd (param: f32[2]) -> f32[2] {"
    return compiled.program_cost(f"HloModule jit_step\n{functions}\n{head}\n{body}\n}}\n")


@pytest.mark.parametrize(
    ("f", "shapes", "flops"),
    [
        (jnp.matmul, [(8 * N, 5), (8 * 5, 3)], 2 * N * 5 * 3),
        (lambda x: x.T @ x, [(8 * N, 5)], 2 * N * 5 * 5),
        (lambda x: x @ x.mT, [(16, 4, 6)], 2 * 2 * 4 * 4 * 6),
        (repeated(lambda x: x @ x), [(8 * N, N)], TIMES * 2 * N**3),
        (repeated(repeated(lambda x: x @ x)), [(8 * N, N)], TIMES**2 * 2 * N**3),
    ],
    ids=["product", "transposed", "batch", "loop", "loop_in_loop"],
)
def test_products_are_counted(f, shapes, flops):
    cost = cost_of(f, *shapes)
    assert (cost.flops, cost.unknown_loops) == (flops, 0)


@pytest.mark.parametrize(
    ("f", "kind", "times", "sent"),
    [
        (functools.partial(jax.lax.psum, axis_name="x"), "all-reduce", 1, MINE),
        (repeated(lambda x: 0.1 * jax.lax.psum(x, "x")), "all-reduce", TIMES, MINE),
        (lambda x: jax.lax.all_to_all(x, "x", 0, 1, tiled=True), "all-to-all", 1, MINE),
        (lambda x: jax.lax.all_gather(x, "x", tiled=True)[:8] + 1, "all-gather", 1, 8 * MINE),
        (lambda x: jax.lax.psum_scatter(x, "x", tiled=True), "reduce-scatter", 1, MINE),
        (
            lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]),
            "collective-permute",
            1,
            MINE,
        ),
    ],
    ids=["psum", "psum_in_loop", "all_to_all", "all_gather", "psum_scatter", "ppermute"],
)
def test_collectives_are_counted_with_the_larger_of_what_goes_in_and_out(f, kind, times, sent):
    cost = cost_of(f, ROWS)
    assert (cost.counts, cost.sent) == ({kind: times}, {kind: times * sent})


def test_a_device_alone_sends_nothing():
    alone = [[i] for i in range(8)]
    cost = cost_of(lambda x: jax.lax.psum(x, "x", axis_index_groups=alone) + x, ROWS)
    assert cost.counts == {}


def test_a_loop_of_unknown_length_is_counted_once_and_told():
    def halve(x):
        return jax.lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: 0.01 * x @ x, x)

    cost = cost_of(halve, (8 * N, N))
    assert (cost.flops, cost.unknown_loops) == (2 * N**3, 1)


def test_of_several_branches_the_dearest_is_counted():
    def branch(x):
        return jax.lax.cond(jnp.max(x) > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert cost_of(branch, (8 * N, N)).flops == 2 * 2 * N**3


def test_memory_is_what_the_compiler_says():
    cost = cost_of(lambda x: x @ x, (8 * N, N))
    assert cost.argument_bytes == N * N * FLOAT
    assert cost.temporary_bytes is not None
    assert cost.seconds is None  # a figure of TPUs


def test_a_batch_that_is_a_window_full_of_holes_is_counted_once():
    """As TPUs write a batch of products: of the 2 x 2 pairs only the equal ones are there."""
    cost = text_cost(
        "%a = f32[2,4096,4096]{2,1,0:T(8,128)} parameter(0)",
        "%b = f32[2,4096,4096]{2,1,0:T(8,128)} convolution(%a, %a), "
        "window={size=2 lhs_dilate=2}, dim_labels=0bf_0io->0bf",
    )
    assert cost.flops == 2 * 2 * 4096**3


def test_a_window_is_counted_where_it_meets_its_input():
    cost = text_cost(
        "%a = f32[3,10,5]{2,1,0} parameter(0)",
        "%b = f32[4,5,7]{2,1,0} parameter(1)",
        "%c = f32[3,10,7]{2,1,0} convolution(%a, %b), window={size=4 pad=1_2}, "
        "dim_labels=b0f_0io->b0f",
    )
    pairs = sum(0 <= o + k - 1 < 10 for o in range(10) for k in range(4))
    assert cost.flops == 2 * 3 * 7 * 5 * pairs


def test_kernels_bring_their_cycles_and_the_products_inside():
    functions = """
%fused (p: bf16[8,4], q: bf16[4,6]) -> bf16[8,6] {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[4,6]{1,0:T(8,128)(2,1)} parameter(1)
  %inner = bf16[8,4]{1,0} fusion(%p), calls=%other, backend_config={"estimated_cycles":"5"}
  ROOT %dot = bf16[8,6]{1,0} convolution(%inner, %q), dim_labels=bf_io->bf
}

%other (p: bf16[8,4]) -> bf16[8,4] {
  ROOT %p = bf16[8,4]{1,0} parameter(0)
}
"""
    cost = text_cost(
        "%x = (bf16[8,6]{1,0}, s32[]) fusion(%p, %q), kind=kOutput, calls=%fused, "
        'backend_config={"window_config":{"estimated_cycles":"1234"}}',
        functions=functions,
    )
    assert (cost.flops, cost.cycles) == (2 * 8 * 4 * 6, 1234)


LOOP = """
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %g = f32[4]{0} get-tuple-element(%p), index=1
  %r = f32[4]{0:T(128)} all-reduce(%g), replica_groups={{0,1},{2,3}}, to_apply=%sum
  ROOT %t = (s32[]{:T(128)}, f32[4]{0}) tuple(%i, %r)
}

%condition (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(11)
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}
"""


def test_a_loop_that_counts_up_to_a_constant_is_known():
    cost = text_cost(
        "%w = (s32[], f32[4]{0}) while(%t), condition=%condition, body=%body", functions=LOOP
    )
    assert (cost.counts, cost.sent) == ({"all-reduce": 11}, {"all-reduce": 11 * 4 * FLOAT})
    assert cost.unknown_loops == 0


@pytest.mark.parametrize(("step", "times"), [(1, 11), (2, 6)])
def test_a_loop_of_two_turns_in_one_runs_half_as_often(step, times):
    counter = "  %i = s32[]{:T(128)} get-tuple-element(%p), index=0\n"
    added = f"  %s = s32[]{{:T(128)}} constant({step})\n  %j = s32[]{{:T(128)}} add(%i, %s)\n"
    loop = LOOP.replace("  ROOT %t", f"{counter}{added}  ROOT %t").replace("tuple(%i", "tuple(%j")
    loop = loop.replace("  ROOT %less", f"{counter}  ROOT %less")
    line = "%w = (s32[], f32[4]{0}) while(%t), condition=%condition, body=%body"
    assert text_cost(line, functions=loop).counts == {"all-reduce": times}


def test_a_loop_counts_once_where_loops_are_left_out():
    head = f"HloModule m\n{LOOP}\nENTRY %main (p: f32[]) -> f32[] {{\n"
    line = "  %w = (s32[], f32[4]{0}) while(%t), condition=%condition, body=%body\n}\n"
    assert compiled.program_cost(head + line, loops=False).counts == {"all-reduce": 1}


def test_a_collective_in_two_halves_is_one():
    cost = text_cost(
        "%a = bf16[32,256]{1,0:T(8,128)(2,1)} parameter(0)",
        "%s = (bf16[32,256]{1,0}, bf16[128,256]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) "
        "all-gather-start(%a), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}",
        "%d = bf16[128,256]{1,0} all-gather-done(%s)",
    )
    assert (cost.counts, cost.sent) == ({"all-gather": 1}, {"all-gather": 128 * 256 * 2})


def test_a_collective_on_a_sparse_core_is_counted():
    functions = """
%gathered (p: bf16[2,8]) -> bf16[4,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  ROOT %g = bf16[4,8]{1,0} all-gather(%p), replica_groups=[1,2]<=[2], dimensions={0}
}
"""
    cost = text_cost(
        "%s = ((bf16[2,8]{1,0}, token[]), bf16[4,8]{1,0}) call-start(%a, %t), "
        'async_execution_thread="sparsecore", to_apply=%gathered, '
        'backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}',
        functions=functions,
    )
    assert (cost.counts, cost.sent) == ({"all-gather": 1}, {"all-gather": 4 * 8 * 2})
    assert cost.cycles == 0


def test_a_collective_of_several_arrays_sends_all_of_them():
    cost = text_cost(
        "%a = f32[8]{0} parameter(0)",
        "%b = pred[6]{0} parameter(1)",
        "%t = (f32[8]{0}, /*index=1*/pred[6]{0}) all-to-all(%a, %b), replica_groups=[4,2]<=[8]",
    )
    assert cost.sent == {"all-to-all": 8 * FLOAT + 6}


def test_what_is_no_compiled_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        compiled.program_cost("module @jit_step {}")


def test_what_is_written_below_python_is_caught():
    with ahead.captured_stderr() as log:
        os.write(2, b"Involuntary full rematerialization")
    assert log == [ahead.REMATERIALISATION]


def test_a_state_lies_as_the_parameters_do():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    where = NamedSharding(mesh, P("a", "b"))
    params = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=where)}
    state = {"mu": {"w": jnp.zeros((8, 8), jnp.bfloat16)}, "count": jnp.zeros((), jnp.int32)}
    placed = ahead.placed_like(params, state)
    assert placed["mu"]["w"].sharding == where
    assert placed["mu"]["w"].dtype == jnp.bfloat16
    assert placed["count"].sharding.spec == P()

"""The cost of a compiled program equals its formulas, for CPU programs and for the text of TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from benchmarks.compiled import (
    Collective,
    collectives,
    compiled_cost,
    instruction_counts,
    program_cost,
)

N, TIMES = 16, 7
FLOAT = 4  # bytes
ROWS = (64, N)  # on all devices; each has 8 rows
SHARD = 8 * N * FLOAT  # bytes


def compiled(f, *shapes):
    """Compiles a function of the shards of arrays that are sharded over 8 devices."""
    mesh = Mesh(np.array(jax.devices()), "x")
    f = jax.shard_map(f, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    sharding = NamedSharding(mesh, P("x"))
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in shapes]
    return jax.jit(f).lower(*leaves).compile()


def cost_of(f, *shapes):
    return compiled_cost(compiled(f, *shapes))


def repeated(f):
    return lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, length=TIMES)[0]


def text_cost(*lines, computations=""):
    """Reads the cost of a program as the TPU compiler writes it."""
    body = "\n".join(f"  {line}" for line in lines)
    head = "ENTRY %main.1_spmd (param: f32[2]) -> f32[2] {"
    return program_cost(f"HloModule jit_step\n{computations}\n{head}\n{body}\n}}\n")


@pytest.mark.parametrize(
    ("f", "shapes", "flops"),
    [
        (jnp.matmul, [(8 * N, 5), (8 * 5, 3)], 2 * N * 5 * 3),
        (lambda x: x.T @ x, [(8 * N, 5)], 2 * N * 5 * 5),
        (lambda x: x @ x.mT, [(16, 4, 6)], 2 * 2 * 4 * 4 * 6),
        (repeated(lambda x: x @ x), [(8 * N, N)], TIMES * 2 * N**3),
        (repeated(repeated(lambda x: x @ x)), [(8 * N, N)], TIMES**2 * 2 * N**3),
    ],
    ids=["product", "transposed", "batch", "loop", "nested_loop"],
)
def test_flops_count_matrix_products(f, shapes, flops):
    cost = cost_of(f, *shapes)
    assert (cost.flops, cost.unknown_loops) == (flops, 0)


@pytest.mark.parametrize(
    ("f", "kind", "times", "sent"),
    [
        (functools.partial(jax.lax.psum, axis_name="x"), "all-reduce", 1, SHARD),
        (repeated(lambda x: 0.1 * jax.lax.psum(x, "x")), "all-reduce", TIMES, SHARD),
        (lambda x: jax.lax.all_to_all(x, "x", 0, 1, tiled=True), "all-to-all", 1, SHARD),
        (lambda x: jax.lax.all_gather(x, "x", tiled=True)[:8] + 1, "all-gather", 1, 8 * SHARD),
        (lambda x: jax.lax.psum_scatter(x, "x", tiled=True), "reduce-scatter", 1, SHARD),
        (
            lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]),
            "collective-permute",
            1,
            SHARD,
        ),
    ],
    ids=["psum", "psum_in_loop", "all_to_all", "all_gather", "psum_scatter", "ppermute"],
)
def test_collectives_count_the_larger_of_operands_and_results(f, kind, times, sent):
    program = compiled(f, ROWS)
    cost = compiled_cost(program)
    assert (cost.counts, cost.sent) == ({kind: times}, {kind: times * sent})
    assert collectives(program) == [Collective(kind, sent, times)]


def test_groups_of_one_device_send_nothing():
    alone = [[i] for i in range(8)]
    program = compiled(lambda x: jax.lax.psum(x, "x", axis_index_groups=alone) + x, ROWS)
    assert compiled_cost(program).counts == {}
    assert collectives(program) == []


def test_loop_without_trip_count_counts_once_and_is_reported():
    def halve(x):
        def body(x):
            return 0.01 * x @ jax.lax.psum(x, "x")

        return jax.lax.while_loop(lambda x: jnp.max(x) > 1, body, x)

    program = compiled(halve, (8 * N, N))
    cost = compiled_cost(program)
    assert (cost.flops, cost.unknown_loops) == (2 * N**3, 1)
    assert collectives(program) == [Collective("all-reduce", N * N * FLOAT, None)]


def test_instructions_in_a_loop_count_once():
    counts = instruction_counts(compiled(repeated(lambda x: x @ x), (8 * N, N)))
    assert (counts["dot"], counts["while"]) == (1, 1)


def test_most_expensive_branch_is_counted():
    def branch(x):
        return jax.lax.cond(jnp.max(x) > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert cost_of(branch, (8 * N, N)).flops == 2 * 2 * N**3


def test_memory_is_read_from_the_compiler():
    cost = cost_of(lambda x: x @ x, (8 * N, N))
    assert cost.argument_bytes == N * N * FLOAT
    assert cost.temporary_bytes is not None
    assert cost.seconds is None  # only for TPUs


def test_batch_written_as_a_dilated_window_counts_once():
    """TPUs write a batch of products like this: of the 2 x 2 pairs only the equal ones exist."""
    cost = text_cost(
        "%a = f32[2,4096,4096]{2,1,0:T(8,128)} parameter(0)",
        "%b = f32[2,4096,4096]{2,1,0:T(8,128)} convolution(%a, %a), "
        "window={size=2 lhs_dilate=2}, dim_labels=0bf_0io->0bf",
    )
    assert cost.flops == 2 * 2 * 4096**3


def test_window_counts_only_inside_its_input():
    cost = text_cost(
        "%a = f32[3,10,5]{2,1,0} parameter(0)",
        "%b = f32[4,5,7]{2,1,0} parameter(1)",
        "%c = f32[3,10,7]{2,1,0} convolution(%a, %b), window={size=4 pad=1_2}, "
        "dim_labels=b0f_0io->b0f",
    )
    pairs = sum(0 <= o + k - 1 < 10 for o in range(10) for k in range(4))
    assert cost.flops == 2 * 3 * 7 * 5 * pairs


def test_fusion_has_its_cycles_and_its_products():
    computations = """
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
        computations=computations,
    )
    assert (cost.flops, cost.cycles, cost.product_cycles) == (2 * 8 * 4 * 6, 1234, 1234)


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


def test_trip_count_is_read_from_the_loop_condition():
    cost = text_cost(
        "%w = (s32[], f32[4]{0}) while(%t), condition=%condition, body=%body", computations=LOOP
    )
    assert (cost.counts, cost.sent) == ({"all-reduce": 11}, {"all-reduce": 11 * 4 * FLOAT})
    assert cost.unknown_loops == 0


@pytest.mark.parametrize(("step", "times"), [(1, 11), (2, 6)])
def test_unrolled_loop_has_half_the_trip_count(step, times):
    counter = "  %i = s32[]{:T(128)} get-tuple-element(%p), index=0\n"
    added = f"  %s = s32[]{{:T(128)}} constant({step})\n  %j = s32[]{{:T(128)}} add(%i, %s)\n"
    loop = LOOP.replace("  ROOT %t", f"{counter}{added}  ROOT %t").replace("tuple(%i", "tuple(%j")
    loop = loop.replace("  ROOT %less", f"{counter}  ROOT %less")
    line = "%w = (s32[], f32[4]{0}) while(%t), condition=%condition, body=%body"
    assert text_cost(line, computations=loop).counts == {"all-reduce": times}


def test_loops_false_counts_each_loop_once():
    head = f"HloModule m\n{LOOP}\nENTRY %main (p: f32[]) -> f32[] {{\n"
    line = "  %w = (s32[], f32[4]{0}) while(%t), condition=%condition, body=%body\n}\n"
    assert program_cost(head + line, loops=False).counts == {"all-reduce": 1}


def test_asynchronous_collective_counts_once():
    cost = text_cost(
        "%a = bf16[32,256]{1,0:T(8,128)(2,1)} parameter(0)",
        "%s = (bf16[32,256]{1,0}, bf16[128,256]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) "
        "all-gather-start(%a), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}",
        "%d = bf16[128,256]{1,0} all-gather-done(%s)",
    )
    assert (cost.counts, cost.sent) == ({"all-gather": 1}, {"all-gather": 128 * 256 * 2})


def test_collective_on_a_sparse_core_counts():
    computations = """
%gathered (p: bf16[2,8]) -> bf16[4,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  ROOT %g = bf16[4,8]{1,0} all-gather(%p), replica_groups=[1,2]<=[2], dimensions={0}
}
"""
    cost = text_cost(
        "%s = ((bf16[2,8]{1,0}, token[]), bf16[4,8]{1,0}) call-start(%a, %t), "
        'async_execution_thread="sparsecore", to_apply=%gathered, '
        'backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}',
        computations=computations,
    )
    assert (cost.counts, cost.sent) == ({"all-gather": 1}, {"all-gather": 4 * 8 * 2})
    assert cost.cycles == 0


def test_combined_collective_sends_all_its_arrays():
    cost = text_cost(
        "%a = f32[8]{0} parameter(0)",
        "%b = pred[6]{0} parameter(1)",
        "%t = (f32[8]{0}, /*index=1*/pred[6]{0}) all-to-all(%a, %b), replica_groups=[4,2]<=[8]",
    )
    assert cost.sent == {"all-to-all": 8 * FLOAT + 6}


def test_text_without_entry_computation_raises():
    with pytest.raises(ValueError, match="no ENTRY"):
        program_cost("module @jit_step {}")


def test_a_pallas_kernel_counts_as_its_estimate_says():
    estimate = '"cost_estimate":{"flops":"3940","transcendentals":"0","bytes_accessed":"16"}'
    kernel = (
        "%gram.1 = bf16[1,8,8]{2,1,0} custom-call(%rows, %X), "
        'custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/gram/pallas_call"}, '
        f"backend_config={{{estimate}}}"
    )
    arguments = ("%rows = s32[3]{0} parameter(0)", "%X = bf16[1,8,16]{2,1,0} parameter(1)")
    cost = text_cost(*arguments, kernel, kernel.replace("%gram.1", "%gram.2"))
    assert cost.flops == 2 * 3940
    assert cost.kernels == {"gram bf16[1,8,16]": 2}
    assert cost.cycles == 0
    result_in_vmem = kernel.replace("{2,1,0}", "{2,1,0:T(8,128)(2,1)S(1)}")
    operand_in_vmem = arguments[1].replace("{2,1,0}", "{2,1,0:S(1)}")
    settings_in_vmem = arguments[0].replace("{0}", "{0:S(1)}")
    for program in ((*arguments, result_in_vmem), (arguments[0], operand_in_vmem, kernel)):
        assert text_cost(*program).kernels == {"gram bf16[1,8,16] S(1)": 1}
    assert text_cost(settings_in_vmem, arguments[1], kernel).kernels == {"gram bf16[1,8,16]": 1}


def test_a_kernel_inside_of_a_fusion_is_read():
    """XLA then prints its settings on several lines."""
    kernel = (
        '  %gram.1 = bf16[1,8,8]{2,1,0} custom-call(%X), custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(f)/gram/pallas_call"}, backend_config={"custom_call_config": '
        '{"body": "TUz", "cost_estimate": {\n"bytes_accessed":16,\n"flops":3940\n}, '
        '"needs_layout_passes": true}}'
    )
    fused = (
        "%fused (X: bf16[1,8,16], Y: bf16[1,8,16]) -> bf16[1,8,8] {\n"
        "  %X = bf16[1,8,16]{2,1,0} parameter(0)\n"
        f"{kernel}\n"
        "  %Y = bf16[1,8,16]{2,1,0} parameter(1)\n"
        f"{kernel.replace('%gram.1', 'ROOT %gram.2')}\n"
        "}\n"
    )
    entry = (
        "ENTRY %main (X: bf16[1,8,16]) -> bf16[1,8,8] {\n"
        "  %X = bf16[1,8,16]{2,1,0} parameter(0)\n"
        "  ROOT %f = bf16[1,8,8]{2,1,0} fusion(%X, %X), kind=kOutput, calls=%fused\n"
        "}\n"
    )
    cost = program_cost(f"HloModule jit_step\n{fused}\n{entry}")
    assert cost.flops == 2 * 3940
    assert cost.kernels == {"gram bf16[1,8,16]": 2}

"""The cycles of the kernel equal the bundles in a dump of the compiler, here a small one."""

import json

import pytest

from benchmarks import report
from benchmarks.kernel_cycles import PASSES, bundles_of_block, cycles_of, read_regions
from muonclip_jax._orthogonalize.tiles import CHIPS, Regions, Shape, cycles, fastest, fastest_full

# Depth in loops, label and instructions of each bundle.
HEAD = [
    ("", "", "%1 = sfence"),
    (">", "LB", "%2 = sld [smem:[#a]]"),
    (">", "", "%3 = sbr.rel (%p1) target = $region1"),  # the pipeline's own branch
    (">", "", "%4 = smov 0"),
    (">", "PF", "%5 = smov 1 /* Start/End empty region 1 */"),
    (">", "", "%6 = sbr.rel (!%p2) target = $region9"),  # everything inside the kernel
]
FULL = [
    (">", "", "%7 = sbr.rel (%p3) target = $region2"),  # the sum
    (">", "", "%8 = smov 0"),
    (">>", "LB", "%9 = vmatmul %v1"),
    (">>", "", "%10 = vst [vmem:[#t]] %v2 /* with a\nline break */"),
    (">>", "", "%11 = sbr.rel (%p4) target = $region3"),  # backwards
    (">", "PF", "%12 = smov 2 /* Start/End empty region 2 */"),
    (">", "", "%13 = sbr.rel (%p5) target = $region4"),  # the last chunk
    (">", "", "%14 = vst [vmem:[#o]] %v3"),
    (">", "PF", "%15 = smov 3 /* Start region 4 */"),
]
OTHERS = [
    (">", "", "%16 = sbr.rel (%p6) target = $region5"),  # the transposed tile
    (">", "", "%17 = vld %v4"),
    (">", "", "%18 = vst [vmem:[#o]] %v5"),
    (">", "PF", "%19 = smov 4 /* Start/End empty region 5 */"),
    (">", "", "%20 = sbr.rel (%p7) target = $region6"),  # the sum of a tile on the diagonal
    (">>", "LB", "%21 = vmatmul %v1"),
    (">>", "", "%22 = vst [vmem:[#t]] %v2"),
    (">", "PF", "%23 = smov 5 /* Start/End empty region 6 */"),
    (">", "", "%24 = sbr.rel (%p8) target = $region7"),  # its last chunk
    (">", "", "%25 = vmatmul %v1"),
    (">", "", "%26 = vxpose %v1"),
    (">", "", "%27 = smov 6"),
    (">", "", "%28 = vst [vmem:[#o]] %v3"),
    (">", "PF", "%29 = smov 7 /* Start/End empty region 7 */"),
]
TAIL = [
    (">", "PF", "%30 = smov 8 /* Start/End empty region 9 */"),
    ("", "LE", "%31 = shalt"),
]
SYMMETRIC = [*HEAD, *FULL, *OTHERS, *TAIL]


def dump(bundles):
    lines = (
        f"{hex(i) if i else 0:>6} {label:2} : {loops} {{ {text} }}"
        for i, (loops, label, text) in enumerate(bundles)
    )
    return "PF: predicated region fallthrough\n\n" + "\n".join(lines)


def in_loop(bundles):
    return sum(loops != "" for loops, _, _ in bundles)


def test_regions_are_the_bundles_between_branches():
    step = in_loop(SYMMETRIC) - 3 - 1 - 2 - 2 - 4
    expected = Regions(512, step, 3, 1, 2, diagonal_sum=2, diagonal_write=4)
    assert read_regions(dump(SYMMETRIC), 512) == expected


def test_regions_of_a_full_product_have_no_transposed_tile():
    full = [*HEAD, *FULL, *TAIL]
    assert read_regions(dump(full), 512) == Regions(512, in_loop(full) - 3 - 1, 3, 1)


def test_a_dump_without_the_transposed_tile_raises():
    without = [x for x in SYMMETRIC if "region5" not in x[2] and "region 5" not in x[2]]
    with pytest.raises(ValueError, match="this dump has 2 and 2"):
        read_regions(dump(without), 512)


def test_a_dump_with_an_array_in_fast_memory_raises():
    """Its pipeline would copy blocks by instructions, which a DMA does elsewhere."""
    head = "%s1 = inlined_call_operand.{} [shape: {}, index: 3, kind: output]\n"
    settings = head.format("vmem", "s32[10]")
    in_hbm = settings + head.format("hbm", "bf16[1,2048,2048]") + dump(SYMMETRIC)
    assert read_regions(in_hbm, 512) == read_regions(dump(SYMMETRIC), 512)
    with pytest.raises(ValueError, match=r"bf16\[1,2048,2048\] is in fast memory"):
        read_regions(in_hbm.replace("operand.hbm", "operand.vmem"), 512)
    with pytest.raises(ValueError, match=r"an array of full_product .* is in fast"):
        cycles_of({"full_product bf16[1,8,8] bf16[1,8,8] S(1)": 1}, "TPU v5")


def test_cycles_of_a_program_are_those_of_its_kernels():
    cut, chip = fastest(2048, 2048, 2, "TPU v5"), CHIPS["TPU v5"]
    assert cut is not None
    one = cycles(Shape(2048, 2048, 2048, 2, True), cut, chip.sides[cut.side], chip)
    shape = "bf16[3,2048,2048]"
    kernels = {f"symmetric_product {shape} {shape} {shape}": 5}
    # Three matrices, five times. Factors and one matrix of the sum.
    assert cycles_of(kernels, "TPU v5") == pytest.approx(15 * one)


def test_cycles_of_a_full_product_are_those_of_its_sides():
    cut, chip = fastest_full(2048, 7168, 2048, 2, "TPU v5"), CHIPS["TPU v5"]
    assert cut is not None
    shape = Shape(2048, 7168, 2048, 2, False)
    one = cycles(shape, cut, chip.full_sides[cut.side], chip)
    name = "full_product bf16[3,2048,2048] bf16[3,2048,7168] bf16[3,2048,7168]"
    assert cycles_of({name: 2}, "TPU v5") == pytest.approx(6 * one)


@pytest.mark.parametrize(("kind", "cores"), [("TPU v5 lite", 1), ("TPU v5", 2), ("TPU7x", 1)])
def test_a_pass_takes_its_bytes_or_its_bundles(kind, cores):
    """Of 2²⁰ numbers; the cores of a chip share them."""
    chip, shards = CHIPS[kind], "bf16[1,16,256,256]"
    (_, sums), (_, assembled) = PASSES["sums_of_squares"], PASSES["assembled"]
    reads = sums * 2**10 / cores
    assert cycles_of({f"sums_of_squares {shards}": 3}, kind) == pytest.approx(3 * reads)
    moves = max(4 * 2**20 / chip.bandwidth, assembled * 2**10) / cores
    assert cycles_of({f"assembled {shards}": 1}, kind) == pytest.approx(moves)
    assert (moves * cores > assembled * 2**10) == (kind != "TPU7x")


def test_bundles_of_a_block_are_those_inside_the_loop():
    assert bundles_of_block(dump(SYMMETRIC)) == in_loop(SYMMETRIC)


def test_bundles_of_passes_are_the_most_of_all_generations():
    chips = json.loads((report.RESULTS / "tpu_kernel_cycles.json").read_text())["chips"].values()
    for name, (_, bundles) in PASSES.items():
        assert bundles == pytest.approx(max(chip["passes"][name] for chip in chips), abs=0.01)


def test_an_unknown_kernel_raises():
    with pytest.raises(ValueError, match="flash is not the kernel of products"):
        cycles_of({"flash bf16[1,8,8]": 1}, "TPU v5")

"""The cycles of the kernel equal the bundles in a dump of the compiler, here a small one."""

import pytest

from benchmarks.kernel_cycles import cycles_of, read_regions
from muonclip_jax._orthogonalize.tiles import CHIPS, Regions, cycles, fastest

# Depth in loops, label and instructions of each bundle.
BUNDLES = [
    ("", "", "%1 = sfence"),
    (">", "LB", "%2 = sld [smem:[#a]]"),
    (">", "", "%3 = sbr.rel (%p1) target = $region1"),  # the pipeline's own branch
    (">", "", "%4 = smov 0"),
    (">", "PF", "%5 = smov 1 /* Start/End empty region 1 */"),
    (">", "", "%6 = sbr.rel (!%p2) target = $region9"),  # everything inside the kernel
    (">", "", "%7 = sbr.rel (%p3) target = $region2"),  # the sum
    (">", "", "%8 = smov 0"),
    (">>", "LB", "%9 = vmatmul %v1"),
    (">>", "", "%10 = vst [vmem:[#t]] %v2 /* with a\nline break */"),
    (">>", "", "%11 = sbr.rel (%p4) target = $region3"),  # backwards
    (">", "PF", "%12 = smov 2 /* Start/End empty region 2 */"),
    (">", "", "%13 = sbr.rel (%p5) target = $region4"),  # the epilogue
    (">", "", "%14 = vst [vmem:[#o]] %v3"),
    (">", "PF", "%15 = smov 3 /* Start region 4 */"),
    (">", "", "%16 = sbr.rel (%p6) target = $region5"),  # the mirrored tile
    (">", "", "%17 = vxpose %v4"),
    (">", "", "%18 = vst [vmem:[#o]] %v5"),
    (">", "PF", "%19 = smov 4 /* Start/End empty region 5 */"),
    (">", "PF", "%20 = smov 5 /* Start/End empty region 9 */"),
    ("", "LE", "%21 = shalt"),
]


def dump(bundles):
    lines = (
        f"{hex(i) if i else 0:>6} {label:2} : {loops} {{ {text} }}"
        for i, (loops, label, text) in enumerate(bundles)
    )
    return "PF: predicated region fallthrough\n\n" + "\n".join(lines)


def test_regions_are_the_bundles_between_branches():
    in_loop = sum(loops != "" for loops, _, _ in BUNDLES)
    expected = Regions(chunk=512, sum=3, write=1, mirror=2, step=in_loop - 3 - 1 - 2)
    assert read_regions(dump(BUNDLES), 512) == expected


def test_a_dump_without_the_mirrored_tile_raises():
    without = [x for x in BUNDLES if "region5" not in x[2]]
    with pytest.raises(ValueError, match="has three parts, this dump has 2"):
        read_regions(dump(without), 512)


def test_cycles_of_a_program_are_those_of_its_kernels():
    cut, chip = fastest(2048, 2048, 2, "TPU v5"), CHIPS["TPU v5"]
    assert cut is not None
    one = cycles(2048, 2048, 2, 1, cut, chip.sides[cut.side], chip)
    shape = "bf16[3,2048,2048]"
    kernels = {f"symmetric_product {shape} {shape} {shape}": 5}
    # Three matrices, five times. Factors and one matrix of the sum.
    assert cycles_of(kernels, "TPU v5") == pytest.approx(15 * one)


def test_an_unknown_kernel_raises():
    with pytest.raises(ValueError, match="flash is not the symmetric-product kernel"):
        cycles_of({"flash bf16[1,8,8]": 1}, "TPU v5")

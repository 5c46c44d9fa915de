"""The tiles of the TPU kernel: their counts, their choice, and the committed cycles behind it."""

import numpy as np
import pytest

from muonclip_jax._orthogonalize import tiles
from muonclip_jax._orthogonalize.tiles import CHIPS, Regions, Shape, Tiles, fastest, fastest_full
from tests.support.pages import result

BFLOAT16 = 2  # bytes


def _chosen(n, m, itemsize, kind):
    found = fastest(n, m, itemsize, kind)
    assert found is not None
    return found


@pytest.mark.parametrize(("n", "count"), [(512, 1), (513, 3), (1024, 3), (4096, 36), (11008, 253)])
def test_positions_are_the_tiles_on_and_above_the_diagonal(n, count):
    found = Tiles(512, 512, 512)
    assert found.positions(n) == count == len(np.triu_indices(-(-n // 512))[0])


@pytest.mark.parametrize(("side", "computed"), [(128, 6 * 128**2), (256, 2.5 * 256**2)])
def test_area_has_three_of_four_blocks_of_tiles_on_the_diagonal(side, computed):
    """Blocks of 64 would not fill a row of a register: such tiles are computed in full."""
    found = Tiles(side, 512, 512)
    n = 384 if side == 128 else 512
    assert found.area(n) == computed
    assert found.flop_fraction(n) == computed / n**2
    parts = np.zeros((side, side), int)
    for part in found.parts(is_diagonal=True):
        parts[part] += 1
    assert parts.max() == 1
    assert (parts + parts.T).min() >= 1


def test_cycles_of_the_table_are_the_committed_ones():
    chips = result("tpu_kernel_cycles")["chips"]
    for kind, chip in chips.items():
        for side, r in CHIPS[kind].sides.items():
            assert Regions(**chip["regions"]["square"][str(side)]) == r
        for side, r in CHIPS[kind].full_sides.items():
            assert Regions(**chip["regions"]["full"][str(side)]) == r


def test_the_kernel_is_used_where_it_is_estimated_to_be_faster():
    for kind, chip in result("tpu_kernel_cycles")["chips"].items():
        for symmetric in (True, False):
            rows = [row for row in chip["products"] if (row["kind"] != "full") == symmetric]
            used = [row for row in rows if row["is_used"]]
            assert len(used) >= 2
            assert all(row["kernel_by_xla"] < 1 for row in used)
            smallest = CHIPS[kind].smallest if symmetric else CHIPS[kind].smallest_full
            assert used == [row for row in rows if row["n"] >= smallest]


def test_products_on_v5p_take_at_most_the_share_of_the_cycles_of_xla_that_is_our_goal():
    rows = result("tpu_kernel_cycles")["chips"]["TPU v5"]["products"]
    ratio = {(row["kind"], row["n"], row["m"]): row["kernel_by_xla"] for row in rows}
    assert ratio["square", 4096, 4096] <= 0.62
    assert ratio["product", 4096, 4096] <= 0.62
    assert ratio["gram", 2048, 7168] <= 0.68


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("n", "m"), [(2048, 2048), (2100, 5000), (7168, 18432), (11008, 11008)])
def test_chosen_tiles_fit_the_fast_memory(itemsize, n, m):
    for kind, chip in CHIPS.items():
        found = _chosen(n, m, itemsize, kind)
        assert found.vmem(itemsize) < chip.vmem
        assert found.depth == m or found.depth % found.chunk == 0
        assert found.flop_fraction(n) < 0.95
        # All products of a matrix have tiles of one side, which the count of FLOPs assumes.
        assert found.side == _chosen(n, n, itemsize, kind).side


@pytest.mark.parametrize("sides", [(2048, 2048, 2048), (2100, 5000, 2100), (7168, 18432, 7168)])
def test_chosen_tiles_of_full_products_fit_the_fast_memory(sides):
    for kind, chip in CHIPS.items():
        found = fastest_full(*sides, BFLOAT16, kind)
        assert found is not None
        assert found.vmem(BFLOAT16, is_symmetric=False) < chip.vmem
        # The cycles of the matrix units alone.
        least = np.prod(sides) / chip.macs / chip.cores
        rows, columns, terms = sides
        shape = Shape(rows, columns, terms, BFLOAT16, False)
        assert tiles.cycles(shape, found, chip.full_sides[found.side], chip) >= least


def test_small_sides_have_no_tiles():
    chip = CHIPS["TPU v5"]
    assert fastest(chip.smallest - 1, 4096, BFLOAT16, "TPU v5") is None
    assert fastest_full(4096, 4096, chip.smallest_full - 1, BFLOAT16, "TPU v5") is None


def test_full_products_of_float32_are_those_of_xla():
    assert fastest_full(4096, 4096, 4096, 4, "TPU v5") is None


def test_more_cores_or_bandwidth_never_take_more_cycles():
    chip = CHIPS["TPU v5"]
    cut, r = _chosen(4096, 4096, BFLOAT16, "TPU v5"), chip.sides[512]
    shape = Shape(4096, 4096, 4096, BFLOAT16, True)
    base = tiles.cycles(shape, cut, r, chip)
    assert tiles.cycles(shape, cut, r, chip._replace(cores=4)) < base
    assert tiles.cycles(shape, cut, r, chip._replace(bandwidth=10)) > base
    # The cycles of the matrix units alone, for the tiles above the diagonal.
    assert base >= cut.flop_fraction(4096) * 4096**3 / chip.macs / chip.cores

"""The tiles of the TPU kernel: their counts, their choice, and the committed cycles behind it."""

import json
import pathlib

import numpy as np
import pytest

from muonclip_jax._orthogonalize import tiles
from muonclip_jax._orthogonalize.tiles import CHIPS, Regions, Tiles, fastest

ROOT = pathlib.Path(__file__).parents[2]
BFLOAT16 = 2  # bytes


def _chosen(n, m, itemsize, kind):
    found = fastest(n, m, itemsize, kind)
    assert found is not None
    return found


def _result(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize(("n", "count"), [(512, 1), (513, 3), (1024, 3), (4096, 36), (11008, 253)])
def test_positions_are_the_tiles_on_and_above_the_diagonal(n, count):
    found = Tiles(512, 512, 512)
    assert found.positions(n) == count == len(np.triu_indices(-(-n // 512))[0])
    assert found.share(n) == count * 512**2 / n**2


def test_cycles_of_the_table_are_the_committed_ones():
    chips = _result("tpu_kernel_cycles")["chips"]
    for kind, chip in chips.items():
        for side, r in CHIPS[kind].sides.items():
            assert Regions(**chip["regions"]["square"][str(side)]) == r


def test_the_smallest_side_is_one_from_which_the_kernel_is_estimated_to_be_faster():
    for kind, chip in _result("tpu_kernel_cycles")["chips"].items():
        above = [row for row in chip["products"] if row["n"] >= CHIPS[kind].smallest]
        assert len(above) >= 2
        assert all(row["kernel_by_xla"] < 1 for row in above)


def test_products_on_v5p_take_at_most_the_share_of_the_cycles_of_xla_that_is_our_goal():
    rows = _result("tpu_kernel_cycles")["chips"]["TPU v5"]["products"]
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
        assert found.share(n) < 0.95
        # All products of a matrix have tiles of one side, which the count of FLOPs assumes.
        assert found.side == _chosen(n, n, itemsize, kind).side


def test_small_sides_have_no_tiles():
    assert fastest(CHIPS["TPU v5"].smallest - 1, 4096, BFLOAT16, "TPU v5") is None


def test_more_cores_or_bandwidth_never_take_more_cycles():
    chip = CHIPS["TPU v5"]
    cut, r = _chosen(4096, 4096, BFLOAT16, "TPU v5"), chip.sides[512]
    base = tiles.cycles(4096, 4096, BFLOAT16, 1, cut, r, chip)
    assert tiles.cycles(4096, 4096, BFLOAT16, 1, cut, r, chip._replace(cores=4)) < base
    assert tiles.cycles(4096, 4096, BFLOAT16, 1, cut, r, chip._replace(bandwidth=10)) > base
    # The matrix units alone need so many cycles for the tiles above the diagonal.
    assert base >= cut.share(4096) * 4096**3 / chip.macs / chip.cores

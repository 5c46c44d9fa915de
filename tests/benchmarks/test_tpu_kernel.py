"""The script for the owner of a TPU: its advice, and that it runs."""

import json

import pytest

from benchmarks import tpu_kernel
from benchmarks.kernel_products import LARGEST_ERROR


def rows(*ratios, error=0.002):
    shape = {"kind": "gram", "n": 2048, "m": 7168}
    return [shape | {"error": error, "kernel_by_xla": ratio} for ratio in ratios]


@pytest.mark.parametrize(
    ("measured", "advice"),
    [
        (rows(0.5, 0.72), "Use ns_products='pallas': the kernel takes 0.60 of the time"),
        (rows(0.5, 2.0), "Use ns_products='xla': the kernel takes 1.00 of the time"),
        (rows(0.5, error=0.1), "Do not use the kernel: wrong numbers for gram 2048 x 7168"),
        (rows(0.5, error=float("nan")), "Do not use the kernel: wrong numbers"),
    ],
)
def test_advice(measured, advice):
    assert tpu_kernel.advice(measured).startswith(advice)


def test_it_needs_a_tpu(capsys):
    with pytest.raises(SystemExit):
        tpu_kernel.main([])
    assert "this measures a TPU, got cpu; --quick runs anywhere" in capsys.readouterr().err


@pytest.mark.nightly
def test_quick_run_finds_the_right_numbers(tmp_path):
    tpu_kernel.main(["--quick", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    products = json.loads(path.read_text())["products"]
    assert [row["kind"] for row in products] == ["gram", "square", "product", "full"]
    assert all(row["error"] <= LARGEST_ERROR for row in products)

"""The script for the owner of a GPU: its advice, its list, and that it runs."""

import json

import pytest

from benchmarks import gpu_kernel
from benchmarks.kernel_products import LARGEST_ERROR


def products(*ratios, error=0.002):
    return [
        {"kind": "gram", "n": 2048, "m": 7168, "error": error, "kernel_by_xla": x} for x in ratios
    ]


def updates(bfloat16, float32, distance=0.02):
    """One row for each setting: the two times belong to the standard method and XLA."""
    rows = [{"optimizer": "optax", "rate_by_peak": 0.5}]
    for settings in gpu_kernel.candidates():
        time = bfloat16 if settings["ns_dtype"] == "bfloat16" else float32
        slower = (settings["ns_method"] == "gram") + (settings["ns_products"] == "pallas")
        figures = {"time_by_optax": time + slower, "rate_by_peak": 0.7}
        rows.append(settings | figures | {"distance_from_optax": distance})
    return rows


@pytest.mark.parametrize(
    ("measured", "advice"),
    [
        (
            (products(0.5, 0.72), updates(0.3, 0.9)),
            "Use ns_dtype='bfloat16', ns_method='standard', ns_products='xla': an update takes 0.30"
            " of the time of optax's, at 0.70 of the measured peak. The kernel takes 0.60 of",
        ),
        ((products(0.5), updates(0.3, 0.31)), "Use ns_dtype='float32', ns_method='standard'"),
        ((products(0.5, error=0.1), updates(0.3, 0.9)), "Wrong numbers for gram 2048 x 7168"),
        (
            (products(0.5), updates(0.3, 0.9, distance=float("nan"))),
            "Wrong numbers for ns_dtype='bfloat16', ns_method='standard', ns_products='xla'; ",
        ),
    ],
)
def test_advice(measured, advice):
    assert gpu_kernel.advice(*measured).startswith(advice)


def test_list_names_everything_that_is_measured_and_measures_nothing(capsys, tmp_path):
    gpu_kernel.main(["--list", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    rows = len(gpu_kernel.RATES) + len(gpu_kernel.WORK.products) + len(gpu_kernel.candidates())
    assert len(lines) == rows + 2  # what is updated, and torch
    assert not list(tmp_path.iterdir())


def test_it_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        gpu_kernel.main([])
    assert "this measures a GPU, got cpu; --quick runs anywhere" in capsys.readouterr().err


@pytest.mark.nightly
def test_quick_run_finds_the_right_numbers(tmp_path):
    gpu_kernel.main(["--quick", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert [row["kind"] for row in results["products"]] == ["gram", "square", "product"]
    assert all(row["error"] <= LARGEST_ERROR for row in results["products"])
    ours = [row for row in results["updates"] if "ns_dtype" in row]
    assert len(ours) == len(gpu_kernel.candidates())
    assert all(row["distance_from_optax"] <= gpu_kernel.LARGEST_DISTANCE for row in ours)
    assert results["advice"].startswith("Use ")

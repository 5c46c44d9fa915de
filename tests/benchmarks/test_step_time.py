"""The benchmark of one optimizer step compares equal work and counts FLOPs as the formulas do."""

import json

import jax
import jax.numpy as jnp
import pytest

import muonclip_jax as mc
from benchmarks import step_time
from benchmarks.workloads import WORKLOADS, matrices, minimum_flops
from tests.support.by_day import at_night

N = 8
PEERS = ("optax", "torch") if step_time.TORCH else ("optax",)
# At night: a smoke run compiles a step of each optimizer twice.
each_workload = pytest.mark.parametrize("name", at_night(*sorted(WORKLOADS)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the benchmark once for each workload; returns its folder and its results."""
    runs = {}

    def smoke_run(name):
        if name not in runs:
            folder = tmp_path_factory.mktemp(name)
            step_time.main(["--quick", "--workload", name, "--out", str(folder)])
            runs[name] = folder, json.loads((folder / "step_time.json").read_text())
        return runs[name]

    return smoke_run


@each_workload
def test_results_have_commands_versions_and_machine(name, run):
    _, results = run(name)
    assert set(results) == {
        *("command", "date", "versions", "machine", "load_before", "optimizers", "trees")
    }
    assert results["command"] == "python -m benchmarks.step_time"
    assert {"python", "muonclip-jax", "jax", "optax"} <= set(results["versions"])
    assert ("torch" in results["versions"]) == ("torch" in PEERS)
    assert ("not installed" in results["optimizers"]["torch"]) == ("torch" not in PEERS)


@each_workload
def test_ratios_are_quotients_of_the_figures(name, run):
    workload = run(name)[1]["trees"][name]
    by_optax, by_torch = workload["ours_by_optax"], workload.get("ours_by_torch")
    assert set(by_optax) == {
        *("flops", "temporary_bytes", "compile_time", "wall_time", "wall_time_quartiles")
    }
    for key, figure in (("flops", "flops"), ("compile_time", "compile_seconds")):
        ratio = workload["ours"][figure] / workload["optax"][figure]
        assert by_optax[key] == pytest.approx(ratio, rel=1e-2)
    assert (by_torch is not None) == ("torch" in PEERS)
    for ratios in filter(None, (by_optax, by_torch)):
        low, high = ratios["wall_time_quartiles"]
        assert 0 < low <= ratios["wall_time"] <= high


@each_workload
def test_each_optimizer_has_its_figures(name, run):
    workload = run(name)[1]["trees"][name]
    for optimizer in ("ours", *PEERS):
        figures = {"flops", "flops_by_floor", "wall_seconds", "rate_by_square_product"}
        figures |= {"time_by_floor"}
        if optimizer != "torch":
            figures |= {"temporary_bytes", "compile_seconds"}
        assert set(workload[optimizer]) == figures
        ratio = workload[optimizer]["flops"] / workload["floor_flops"]
        assert workload[optimizer]["flops_by_floor"] == pytest.approx(ratio, rel=1e-3)


@each_workload
def test_optimizers_compute_the_same_update(name, run):
    distances = run(name)[1]["trees"][name]["distance_from_ours"]
    assert set(distances) == set(PEERS)
    assert distances["optax"] < 1e-4  # measured: 2.4e-6


@each_workload
def test_optax_has_the_flops_of_the_standard_iteration(name, run):
    workload = WORKLOADS[name].quick()
    expected = 0
    for batch, n_in, n_out in matrices(workload.params(workload.counted)):
        n, m = sorted((n_in, n_out))
        expected += batch * 5 * (4 * n * n * m + 2 * n**3)  # X Xᵀ and Z X, A A
    assert run(name)[1]["trees"][name]["optax"]["flops"] == expected


@each_workload
def test_plot_is_a_small_png(name, run):
    image = (run(name)[0] / "step_time.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) < 60_000


@pytest.mark.nightly
def test_different_update_raises(monkeypatch):
    monkeypatch.setitem(step_time.OPTIMIZERS, "optax", mc.muon(0.02, ns_steps=4))
    with pytest.raises(RuntimeError, match="optax computes a different update"):
        step_time.time_interleaved(WORKLOADS["kimi_k2_experts"].quick(), 32)


def test_minimum_flops_halve_every_symmetric_product():
    params = {"layer": {"square": jax.ShapeDtypeStruct((N, N), jnp.float32)}}
    assert minimum_flops(params) == 20 * N**3
    params["layer"]["tall"] = jax.ShapeDtypeStruct((4 * N, N), jnp.float32)
    assert minimum_flops(params) == (20 + 29) * N**3


def test_parameter_of_adamw_raises():
    with pytest.raises(ValueError, match="must be assigned to Muon"):
        matrices({"layer": {"scale": jax.ShapeDtypeStruct((N,), jnp.float32)}})

"""The step of Kimi K2 has the parameters of the model, fits its chips, and its costs add up."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks import kimi_k2_step, report
from benchmarks.compiled import Cost

N = 8
MESH = jax.sharding.AbstractMesh((16, 64), ("expert", "fsdp"))


def test_committed_step_fits_its_chips():
    slices = json.loads((report.RESULTS / "kimi_k2_step.json").read_text())["slices"]
    assert slices.keys() == kimi_k2_step.MESHES.keys()
    for figures in slices.values():
        assert figures["argument_bytes"] + figures["temporary_bytes"] < kimi_k2_step.MEMORY
        assert figures["rematerializations"] == figures["unknown_loops"] == 0
    assert slices["v5p:8x8x16"]["compile_cpu_seconds"] < 300


def test_model_has_the_parameters_of_kimi_k2():
    leaves = jax.tree.leaves(kimi_k2_step.Model().parameters(MESH))
    experts = 60 * 384 * 3 * 7168 * 2048
    assert sum(leaf.size for leaf in leaves) == pytest.approx(1.0264e12, rel=1e-4)
    assert sum(leaf.size for leaf in leaves if leaf.ndim == 4) == experts


def test_large_parameters_are_sharded_over_all_chips():
    for leaf in jax.tree.leaves(kimi_k2_step.Model().parameters(MESH)):
        held = math.prod(leaf.sharding.shard_shape(leaf.shape))
        assert held <= max(2**22, leaf.size // 1024)


def test_standard_flops_are_five_steps_on_each_matrix():
    mesh = jax.make_mesh((8,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    leaf = jax.ShapeDtypeStruct((3, 4 * N, N), jnp.float32, sharding=sharding)
    flops = kimi_k2_step.standard_flops({"layer": {"kernel": leaf}})
    assert flops == 3 * 5 * (4 * 4 + 2) * N**3


def test_optimizer_share_adds_kernels_and_links():
    cost = Cost(
        flops=0.0,
        counts={},
        sent={"all-to-all": 600e9},
        cycles=3.5e9,
        seconds=1.0,
        unknown_loops=0,
    )
    share = kimi_k2_step.training_step(cost, 1024)
    model = 6 * 32.6e9 * 67e6 / (1024 * 459e12 * 0.4)
    assert share["model_seconds"] == pytest.approx(model)
    assert share["optimizer_seconds"] == pytest.approx(2.0 + 1.0)
    assert share["optimizer_share"] == pytest.approx(3 / (3 + model))


@pytest.mark.nightly
def test_smoke_run_plans_the_step_and_knows_every_trip_count(tmp_path):
    kimi_k2_step.main(["--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "kimi_k2_step.json").read_text())
    assert set(results) > {"command", "date", "versions", "machine", "note", "model", "slices"}
    step = results["slices"]["attached"]
    assert step["plan"][0].startswith("mesh expert=2, fsdp=4")
    assert step["unknown_loops"] == 0
    assert step["flops_by_standard"] == pytest.approx(step["flops"] / step["standard_flops"], 1e-3)

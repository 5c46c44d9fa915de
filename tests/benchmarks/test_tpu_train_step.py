"""The costs of the training program on TPU slices are read from its output."""

import json
import pathlib

import jax
import jax.numpy as jnp

from benchmarks import report, tpu_train_step
from benchmarks.compiled import Cost
from examples.language_model.config import Config
from examples.language_model.measurement import ahead, cost_table

PAGE = pathlib.Path(__file__).parents[2] / "examples" / "cloud_tpu" / "README.md"


def test_figures_are_read_from_the_output_of_the_training_program():
    sent = {"all-gather": 1.5e9, "all-reduce": 2e6}
    cost = Cost(2e13, {"all-gather": 3, "all-reduce": 1}, sent, 0.0, 0.5, 0, 2**30, 3 * 2**30)
    mesh = jax.sharding.Mesh(jax.devices(), ("fsdp",))
    config = Config(preset="medium", aot_topology="v5e:4x2")
    head = ahead._head(config, mesh, {"w": jnp.ones((2, 4))})
    plan = "mesh fsdp=8; per device and step 1e+11 FLOPs, 0.3 MB sent"
    assert tpu_train_step.parse("\n".join([*head, *cost_table.cost_table(cost, 16), plan])) == {
        "chips": 8,
        "mesh": "fsdp=8",
        "parameters": 8,
        "fits": True,
        "used_gib": 4.0,
        "chip_gib": 16,
        "refused": "",
        "flops": 2e13,
        "muon_flops": 1e11,
        "counts": {"all-gather": 3, "all-reduce": 1},
        "sent_mb": {"all-gather": 1500, "all-reduce": 2},
    }


def test_slice_that_is_too_small_is_marked():
    reason = "Ran out of memory on HBM, the total memory required exceeds available HBM (95.74G)."

    class Lowered:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {reason}\nmore")

    head = "v5e:2x2: 4 chips, mesh fsdp=4\ngqa medium, 9 parameters, float32; per step 8 sequences"
    mesh = jax.sharding.Mesh(jax.devices(), ("fsdp",))
    refused = cost_table.compile_and_format(Lowered(), mesh)
    case = tpu_train_step.Case("v5litepod-4", "v5e:2x2", "gqa", "medium", "")
    found = tpu_train_step.parse("\n".join([head, *refused]))
    assert not found["fits"]
    cells = tpu_train_step.row(vars(case) | found)
    assert cells[2:4] == ["fsdp=4", f"**does not fit**: {reason}"]


def test_page_has_the_committed_table():
    results = json.loads((report.RESULTS / "tpu_train_step.json").read_text())
    assert tpu_train_step.table(results) in PAGE.read_text()
    assert results["cases"]

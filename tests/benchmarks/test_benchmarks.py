"""The benchmarks of steps run, compare equal work, and count FLOPs as the formulas do."""

import importlib
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest
from lm import ahead
from lm.config import Config

import muonclip_jax as mc
from benchmarks.compiled import Cost

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
N, M = 8, 24
WIDE, SQUARE = jnp.ones((N, M)), jnp.ones((N, N))

with pytest.MonkeyPatch.context() as patch:  # as `python benchmarks/muon_step.py` finds them
    patch.syspath_prepend(BENCHMARKS)
    muon_step, trees, sharded_step, kimi_k2, cloud_tpu = map(
        importlib.import_module, ("muon_step", "trees", "sharded_step", "kimi_k2", "cloud_tpu")
    )

OTHERS = ("optax", "torch") if muon_step.TORCH else ("optax",)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    muon_step.main(["--quick", "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def results(out):
    return json.loads((out / "muon_step.json").read_text())


@pytest.fixture(params=sorted(trees.TREES))
def tree(request, results):
    return results["trees"][request.param]


def _flops(f, *arguments):
    return trees.dot_flops(jax.make_jaxpr(f)(*arguments).jaxpr)


def test_a_run_says_what_it_was(results):
    assert set(results) == {
        "command",
        "date",
        "versions",
        "machine",
        "load_before",
        "optimizers",
        "trees",
    }
    assert {"python", "muonclip-jax", "jax", "optax"} <= set(results["versions"])
    assert ("torch" in results["versions"]) == ("torch" in OTHERS)
    assert ("not installed" in results["optimizers"]["torch"]) == ("torch" not in OTHERS)


def test_ratios_are_those_of_the_figures(tree):
    by_optax, by_torch = tree["ours_by_optax"], tree.get("ours_by_torch")
    assert set(by_optax) == {
        "flops",
        "temporary_bytes",
        "compile_time",
        "wall_time",
        "wall_time_quartiles",
    }
    for key, figure in (("flops", "flops"), ("compile_time", "compile_seconds")):
        ratio = tree["ours"][figure] / tree["optax"][figure]
        assert by_optax[key] == pytest.approx(ratio, rel=1e-2)
    assert (by_torch is not None) == ("torch" in OTHERS)
    for ratios in filter(None, (by_optax, by_torch)):
        low, high = ratios["wall_time_quartiles"]
        assert 0 < low <= ratios["wall_time"] <= high


def test_figures_stand_beside_the_ratios(tree):
    for name in ("ours", *OTHERS):
        figures = {"flops", "flops_by_floor", "wall_seconds", "rate_by_square_product"}
        figures |= {"time_by_floor"}
        if name != "torch":
            figures |= {"temporary_bytes", "compile_seconds"}
        assert set(tree[name]) == figures
        ratio = tree[name]["flops"] / tree["floor_flops"]
        assert tree[name]["flops_by_floor"] == pytest.approx(ratio, rel=1e-3)


def test_the_optimizers_did_the_same_work(tree):
    assert set(tree["distance_from_ours"]) == set(OTHERS)
    assert tree["distance_from_ours"]["optax"] < 1e-4  # measured: 2.4e-6


def test_other_work_stops_the_run(monkeypatch):
    monkeypatch.setitem(muon_step.OPTIMIZERS, "optax", mc.muon(0.02, ns_steps=4))
    with pytest.raises(RuntimeError, match="optax does other work"):
        muon_step.time_in_turn(trees.TREES["gpt2_small"].quick(), 32)


def test_the_picture_is_small(out):
    image = (out / "muon_step.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) < 60_000


def test_a_product_is_counted_whatever_its_axes():
    assert _flops(jnp.matmul, SQUARE, WIDE) == 2 * N * N * M
    assert _flops(lambda x: jnp.tensordot(x, x, axes=[[0], [0]]), WIDE) == 2 * M * M * N
    assert _flops(jax.vmap(jnp.matmul), jnp.ones((5, M, N)), jnp.ones((5, N, N))) == 10 * M * N * N


def test_a_product_in_a_loop_is_counted_as_often_as_it_runs():
    def loop(x):
        inner = jax.jit(lambda x: SQUARE @ x)
        return jax.lax.fori_loop(0, 3, lambda i, x: jax.lax.scan(_twice(inner), x, None, 2)[0], x)

    def _twice(f):
        return lambda x, _: (f(f(x)), None)

    assert _flops(loop, WIDE) == 3 * 2 * 2 * (2 * N * N * M)
    assert (
        _flops(lambda x: jax.lax.map(lambda x: x @ x.T, x), jnp.ones((5, N, M))) == 10 * N * N * M
    )


def test_a_loop_of_unknown_length_is_refused():
    def loop(x, n):
        return jax.lax.fori_loop(0, n, lambda i, x: SQUARE @ x, x)

    with pytest.raises(ValueError, match="no fixed count"):
        _flops(loop, WIDE, 3)


@pytest.mark.parametrize("name", sorted(trees.TREES))
def test_optax_is_counted_as_the_unrolled_iteration(name, results):
    tree = trees.TREES[name].quick()
    expected = 0
    for batch, rows, columns in trees.matrices(tree.leaves(tree.counted)):
        n, m = sorted((rows, columns))
        expected += batch * 5 * (4 * n * n * m + 2 * n**3)  # X Xᵀ and Z X, A A
    assert results["trees"][name]["optax"]["flops"] == expected


def test_the_floor_is_half_of_every_hermitian_product():
    leaves = {"layer": {"square": jax.ShapeDtypeStruct((N, N), jnp.float32)}}
    assert trees.floor(leaves) == 20 * N**3
    leaves["layer"]["tall"] = jax.ShapeDtypeStruct((4 * N, N), jnp.float32)
    assert trees.floor(leaves) == (20 + 29) * N**3


def test_a_leaf_of_adamw_is_refused():
    with pytest.raises(ValueError, match="must go to Muon"):
        trees.matrices({"layer": {"scale": jax.ShapeDtypeStruct((N,), jnp.float32)}})


WHAT_AND_WHEN = {"command", "date", "versions", "machine", "load_before", "note"}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    sharded_step.main(["--quick", "--out", str(folder)])
    return json.loads((folder / "sharded_step.json").read_text())


@pytest.fixture(scope="module")
def kimi(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kimi")
    kimi_k2.main(["--quick", "--out", str(folder)])
    results = json.loads((folder / "kimi_k2.json").read_text())
    return results | results["slices"]["here"]


def test_runs_ahead_of_time_say_what_they_were(sharded, kimi):
    assert set(sharded) == WHAT_AND_WHEN | {"goals", "cases"}
    assert set(kimi) > WHAT_AND_WHEN | {"model", "slices"}
    for results in (sharded, kimi):
        assert {"python", "muonclip-jax", "jax", "optax"} <= set(results["versions"])
        assert "leave out the links" in results["note"]


@pytest.mark.parametrize("name", sorted(sharded_step.QUICK))
def test_ratios_of_sharded_steps_are_those_of_the_figures(name, sharded):
    case = sharded["cases"][name]
    for key, ratio in case["ours_by_optax"].items():
        assert ratio == pytest.approx(case["ours"][key] / case["optax"][key], rel=1e-2)
    assert {"flops", "sent_bytes", "temporary_bytes"} <= set(case["ours_by_optax"])
    for figures in (case["ours"], case["optax"]):
        assert figures["sent_bytes"] == pytest.approx(sum(figures["sent"].values()), rel=1e-3)
        assert figures["unknown_loops"] == 0


def test_our_sharded_step_sends_less_and_gathers_nothing(sharded):
    """Eight layers on eight devices: every matrix is moved whole."""
    case = sharded["cases"]["stacks"]
    assert case["ours_by_optax"]["sent_bytes"] < 0.2  # measured: 0.03
    assert set(case["ours"]["counts"]) == {"all-to-all"}


def test_goals_are_shown_with_what_was_reached(sharded):
    shown = sharded_step.table(sharded)
    assert "stacks sent_bytes: 0.0" in shown
    missed = sharded | {"goals": {}}
    missed["cases"] = {"stacks": {"topology": "", "ours_by_optax": {"flops": 0.61}}}
    assert "stacks flops: 0.610, at most 0.60: MISSED" in sharded_step.table(missed)


@pytest.mark.parametrize(
    ("case", "figure"), [(c, f) for c, goals in sharded_step.GOALS.items() for f in goals]
)
def test_committed_figures_reach_the_goals(case, figure):
    path = BENCHMARKS / "results" / "sharded_step.json"
    got = json.loads(path.read_text())["cases"][case]
    assert got["ours_by_optax"][figure] <= sharded_step.GOALS[case][figure]
    assert got["ours"]["rematerializations"] == got["ours"]["unknown_loops"] == 0


def test_the_committed_step_of_kimi_fits_its_chips():
    slices = json.loads((BENCHMARKS / "results" / "kimi_k2.json").read_text())["slices"]
    assert slices.keys() == kimi_k2.MESHES.keys()
    for figures in slices.values():
        assert figures["argument_bytes"] + figures["temporary_bytes"] < kimi_k2.MEMORY
        assert figures["rematerializations"] == figures["unknown_loops"] == 0
    assert slices["v5p:8x8x16"]["compile_cpu_seconds"] < 300


def test_one_case_alone_leaves_the_others_as_they_were(tmp_path, monkeypatch):
    path = tmp_path / "sharded_step.json"
    path.write_text(json.dumps({"cases": {"v5e": {"topology": "old", "ours_by_optax": {}}}}))
    monkeypatch.setattr(sharded_step, "LIBTPU", True)
    monkeypatch.setattr(sharded_step, "measure", lambda case, n: {"ours_by_optax": {}} | vars(case))
    sharded_step.main(["--case", "v6e", "--out", str(tmp_path)])
    assert {k: v["topology"] for k, v in json.loads(path.read_text())["cases"].items()} == {
        "v5e": "old",
        "v6e": "v6e:4x4",
    }


@pytest.mark.parametrize(
    "benchmark_", [sharded_step, kimi_k2, cloud_tpu], ids=["sharded_step", "kimi_k2", "cloud_tpu"]
)
def test_without_libtpu_a_run_says_what_to_install(benchmark_, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_, "LIBTPU", False)
    with pytest.raises(SystemExit):
        benchmark_.main([])
    assert 'pip install "muonclip-jax[tpu]"' in capsys.readouterr().err


def test_the_tree_of_kimi_has_its_parameters():
    mesh = jax.sharding.AbstractMesh((16, 64), ("expert", "fsdp"))
    leaves = jax.tree.leaves(kimi_k2.Model().parameters(mesh))
    experts = 60 * 384 * 3 * 7168 * 2048
    assert sum(leaf.size for leaf in leaves) == pytest.approx(1.0264e12, rel=1e-4)
    assert sum(leaf.size for leaf in leaves if leaf.ndim == 4) == experts


def test_no_large_leaf_of_kimi_is_on_all_chips():
    mesh = jax.sharding.AbstractMesh((16, 64), ("expert", "fsdp"))
    for leaf in jax.tree.leaves(kimi_k2.Model().parameters(mesh)):
        held = math.prod(leaf.sharding.shard_shape(leaf.shape))
        assert held <= max(2**22, leaf.size // 1024)


def test_the_floor_of_kimi_is_five_standard_steps_once():
    where = jax.sharding.NamedSharding(jax.make_mesh((8,), ("x",)), jax.sharding.PartitionSpec())
    leaf = jax.ShapeDtypeStruct((3, 4 * N, N), jnp.float32, sharding=where)
    assert kimi_k2.standard_flops({"layer": {"kernel": leaf}}) == 3 * 5 * (4 * 4 + 2) * N**3


def test_a_step_of_kimi_is_planned_and_every_loop_is_known(kimi):
    assert kimi["plan"][0].startswith("mesh expert=2, fsdp=4")
    assert kimi["unknown_loops"] == 0
    assert kimi["flops_by_standard"] == pytest.approx(kimi["flops"] / kimi["standard_flops"], 1e-3)


def test_the_share_of_the_optimizer_counts_kernels_and_links():
    cost = kimi_k2.Cost(
        flops=0.0,
        counts={},
        sent={"all-to-all": 600e9},
        cycles=3.5e9,
        seconds=1.0,
        unknown_loops=0,
    )
    share = kimi_k2.training_step(cost, 1024)
    model = 6 * 32.6e9 * 67e6 / (1024 * 459e12 * 0.4)
    assert share["model_seconds"] == pytest.approx(model)
    assert share["optimizer_seconds"] == pytest.approx(2.0 + 1.0)
    assert share["optimizer_share"] == pytest.approx(3 / (3 + model))


def test_figures_of_a_slice_are_read_off_what_the_training_program_prints():
    sent = {"all-gather": 1.5e9, "all-reduce": 2e6}
    cost = Cost(2e13, {"all-gather": 3, "all-reduce": 1}, sent, 0.0, 0.5, 0, 2**30, 3 * 2**30)
    mesh = jax.sharding.Mesh(jax.devices(), ("fsdp",))
    config = Config(preset="medium", aot_topology="v5e:4x2")
    head = ahead._head(config, mesh, {"w": jnp.ones((2, 4))})
    plan = "mesh fsdp=8; per device and step 1e+11 FLOPs, 0.3 MB sent"
    read = cloud_tpu.parse("\n".join([*head, *ahead._table(cost, 16), plan]))
    assert read == {
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


def test_a_slice_that_is_too_small_is_said_to_be():
    report = "v5e:2x2: 4 chips as fsdp=4\ngqa medium, 9 parameters, float32; a step\n"
    refused = "  does not fit: Used 20.10G of 15.75G hbm; give more chips, or more --accumulate\n"
    case = cloud_tpu.Case("v5litepod-4", "v5e:2x2", "gqa", "medium", "")
    found = cloud_tpu.parse(report + refused)
    assert not found["fits"]
    row = cloud_tpu.row(vars(case) | found)
    assert row.endswith("| fsdp=4 | Used 20.10G of 15.75G hbm: **does not fit** | | | |")


def test_what_to_expect_on_a_slice_is_the_committed_table():
    page = BENCHMARKS.parent / "examples" / "cloud_tpu" / "README.md"
    results = json.loads((BENCHMARKS / "results" / "cloud_tpu.json").read_text())
    assert cloud_tpu.table(results) in page.read_text()
    assert results["cases"]

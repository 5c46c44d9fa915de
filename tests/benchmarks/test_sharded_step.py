"""The benchmark of a sharded step has its figures, and the committed ones reach the goals."""

import json

import pytest

from benchmarks import gpu, report, sharded_step, tpu


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    sharded_step.main(["--quick", "--out", str(folder)])
    return json.loads((folder / "sharded_step.json").read_text())


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(sharded_step.QUICK))
def test_ratios_are_quotients_of_the_figures(name, results):
    case = results["cases"][name]
    for key, ratio in case["ours_by_optax"].items():
        assert ratio == pytest.approx(case["ours"][key] / case["optax"][key], rel=1e-2)
    assert {"flops", "sent_bytes", "temporary_bytes"} <= set(case["ours_by_optax"])
    for figures in (case["ours"], case["optax"]):
        assert figures["sent_bytes"] == pytest.approx(sum(figures["sent"].values()), rel=1e-3)
        assert figures["unknown_loops"] == 0


@pytest.mark.nightly
def test_our_step_sends_less_and_only_by_all_to_all(results):
    """Eight layers on eight devices: each device gets full matrices."""
    case = results["cases"]["stacks"]
    assert case["ours_by_optax"]["sent_bytes"] < 0.2  # measured: 0.03
    assert set(case["ours"]["counts"]) == {"all-to-all"}


def test_table_shows_goals_beside_the_figures():
    ratios = {"flops": 0.61, "sent_bytes": 0.027}
    case = {"topology": "", "ours_by_optax": ratios}
    results = {"note": "", "goals": sharded_step.GOALS, "cases": {"stacks": case}}
    shown = sharded_step.table(results)
    assert "stacks flops: 0.610, at most 0.60: MISSED" in shown
    assert "stacks sent_bytes: 0.027, at most 0.03: met" in shown


@pytest.mark.parametrize(
    ("case", "figure"), [(c, f) for c, goals in sharded_step.GOALS.items() for f in goals]
)
def test_committed_figures_reach_the_goals(case, figure):
    path = report.RESULTS / "sharded_step.json"
    got = json.loads(path.read_text())["cases"][case]
    assert got["ours_by_optax"][figure] <= sharded_step.GOALS[case][figure]
    assert got["ours"]["rematerializations"] == got["ours"]["unknown_loops"] == 0


@pytest.mark.parametrize("case", sorted(sharded_step.GPU_CASES))
def test_committed_figures_of_gpus_reach_the_goals(case):
    results = json.loads((report.RESULTS / "sharded_step_gpu.json").read_text())
    got = results["cases"][case]
    for figure, most in sharded_step.GPU_GOALS["stacks"].items():
        assert got["ours_by_optax"][figure] <= most
    assert got["ours"]["rematerializations"] == got["ours"]["unknown_loops"] == 0


def test_case_of_other_devices_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PLUGIN", True)
    with pytest.raises(SystemExit):
        sharded_step.main(["--gpu", "--case", "v5e"])
    assert "--case: got v5e, expected stacks, layers, h200, b200" in capsys.readouterr().err


def test_missing_cuda_plugin_is_reported_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PLUGIN", False)
    with pytest.raises(SystemExit):
        sharded_step.main(["--gpu"])
    assert 'pip install "muonclip-jax[cuda]"' in capsys.readouterr().err


def test_one_case_leaves_the_others_unchanged(tmp_path, monkeypatch):
    path = tmp_path / "sharded_step.json"
    path.write_text(json.dumps({"cases": {"v5e": {"topology": "old", "ours_by_optax": {}}}}))
    monkeypatch.setattr(tpu, "LIBTPU", True)
    monkeypatch.setattr(sharded_step.aot, "head", lambda module, on_gpu: {"note": ""})
    monkeypatch.setattr(sharded_step, "measure", lambda case, n: {"ours_by_optax": {}} | vars(case))
    sharded_step.main(["--case", "v6e", "--out", str(tmp_path)])
    assert {k: v["topology"] for k, v in json.loads(path.read_text())["cases"].items()} == {
        "v5e": "old",
        "v6e": "v6e:4x4",
    }

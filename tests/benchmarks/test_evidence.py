"""The committed evidence is what its trainings say, and what the pages say of it."""

import dataclasses
import importlib
import json
import math
import pathlib
import re
import sys
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import muonclip_jax as mc
from tests.support import pages

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # as `python -m benchmarks.evidence` has it
program, measures, page, runner, split, tasks, token_efficiency = (
    importlib.import_module(f"benchmarks.evidence.{name}")
    for name in (
        "__main__", "measures", "page", "runner", "split", "tasks", "token_efficiency"
    )
)  # fmt: skip
sys.path.remove(str(ROOT))

RESULTS = ROOT / "benchmarks" / "evidence" / "results"
KEYS = (
    "experiment claim source published command date versions seeds ours verdict runs"
).split()  # as the issue of the experiments pins them

every_experiment = pytest.mark.parametrize("name", program.EXPERIMENTS)


def result_of(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


# What is committed


@every_experiment
def test_result_is_complete(name):
    result = result_of(name)
    assert list(result) == KEYS
    assert result["experiment"] == name
    assert result["command"] == f"python -m benchmarks.evidence {name}"
    assert len(result["seeds"]) >= 3
    assert result["verdict"] in ("reproduced", "partly", "not reproduced")
    assert (RESULTS / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@every_experiment
def test_figures_follow_from_the_runs(name):
    """Whoever changes a run, a figure or a verdict alone is found out."""
    result, experiment = result_of(name), program.EXPERIMENTS[name]
    ours = experiment.study(runner.lookup(result["runs"]))
    assert_same(json.loads(json.dumps(ours)), result["ours"])
    assert experiment.verdict(result["ours"]) == result["verdict"]
    said = experiment.CLAIM, experiment.SOURCE, experiment.PUBLISHED
    assert said == (result["claim"], result["source"], result["published"])


def assert_same(got, expected, where=""):
    """Equal, but for the last digits of a number that is computed anew."""
    if isinstance(expected, dict):
        assert list(got) == list(expected), where
        for key in expected:
            assert_same(got[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, float) and not isinstance(got, bool):
        assert got == pytest.approx(expected, rel=1e-3), where
    else:
        assert got == expected, where


@every_experiment
def test_every_run_was_asked_for(name):
    result, asked = result_of(name), []
    known = runner.lookup(result["runs"])

    def ask(wanted):
        asked.extend(runner.described(task) for task in wanted)
        return known(wanted)

    program.EXPERIMENTS[name].study(ask)
    assert all(run["settings"] in asked for run in result["runs"])
    assert len(result["runs"]) == len({json.dumps(run["settings"]) for run in result["runs"]})


@every_experiment
def test_plot_is_drawn_from_the_result(name):
    figure = program.EXPERIMENTS[name].draw(result_of(name))
    assert isinstance(figure, Figure)
    assert all(axes.has_data() for axes in figure.axes)


def test_page_is_what_the_results_say():
    results = {name: result_of(name) for name in program.EXPERIMENTS}
    assert (ROOT / "docs" / "evidence.md").read_text() == page.page(results)


def test_readme_has_the_figures_of_the_results():
    results = {name: result_of(name) for name in program.EXPERIMENTS}
    rows = pages.table("README.md", "evidence", folder=".")
    found = [re.findall(r"\d[\d.,]*", here) for _, _, here, _ in rows]
    shown = (program.EXPERIMENTS[name].short(result["ours"]) for name, result in results.items())
    assert found == [re.findall(r"\d[\d.,]*", text) for text in shown]


def test_advice_has_the_figures_of_the_results():
    advice = pages.numbers("docs/choosing.md")
    you = result_of("exactness")["ours"]["you"]["minus_reference"]
    assert advice["you_behind_jordan"] == measures.text(you)
    share = result_of("no-harm")["ours"]["12"]["ever_clipped"]["mean"]
    assert advice["ever_clipped_at_12"] == f"{100 * share:.0f}"


# How it is made


@dataclasses.dataclass(frozen=True)
class Square:
    """A task that takes no time, and says in which file it was done."""

    x: int
    log: str

    @property
    def program(self):
        return self.x % 2

    def measure(self):
        with pathlib.Path(self.log).open("a") as file:
            file.write(f"{self.x}\n")
        return {"square": self.x**2}


@pytest.fixture
def squares(tmp_path):
    log = tmp_path / "log"
    log.touch()
    return lambda *xs: [Square(x, str(log)) for x in xs], log, tmp_path / "done"


def test_runner_does_each_task_once_and_answers_in_order(squares):
    tasks_of, log, memory = squares
    ask = runner.Runner(memory, workers=1)
    assert [r["square"] for r in ask(tasks_of(3, 1, 2, 1))] == [9, 1, 4, 1]
    assert [r["square"] for r in ask(tasks_of(1, 4))] == [1, 16]
    assert sorted(log.read_text().split()) == ["1", "2", "3", "4"]
    assert [r["square"] for r in ask.records] == [9, 1, 4, 16]


def test_runner_goes_on_after_an_interruption(squares):
    tasks_of, log, memory = squares
    runner.Runner(memory, workers=1)(tasks_of(1, 2))
    memory.write_text(memory.read_text() + '\n{"settings": {"ta')  # a kill while writing
    again = runner.Runner(memory, workers=1)
    assert [r["square"] for r in again(tasks_of(1, 2, 3))] == [1, 4, 9]
    assert sorted(log.read_text().split()) == ["1", "2", "3"]
    assert [r["square"] for r in runner.Runner(memory, workers=1)(tasks_of(3))] == [9]
    assert sorted(log.read_text().split()) == ["1", "2", "3"]


def test_runner_does_not_mix_versions(squares, monkeypatch):
    tasks_of, log, memory = squares
    runner.Runner(memory, workers=1)(tasks_of(1))
    monkeypatch.setattr(runner, "versions", lambda: {"jax": "another"})
    runner.Runner(memory, workers=1)(tasks_of(1))
    assert log.read_text().split() == ["1", "1"]


def test_program_writes_the_committed_result_from_the_same_runs(tmp_path, monkeypatch, capsys):
    result = result_of("no-harm")
    memory = tmp_path / "done"
    lines = [json.dumps(run | {"versions": runner.versions()}) for run in result["runs"]]
    memory.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(program, "MEMORY", memory)
    program.main(["no-harm", "--out", str(tmp_path), "--workers", "1"])
    written = json.loads((tmp_path / "no-harm.json").read_text())
    assert written == result | {"versions": runner.versions()}
    assert (tmp_path / "no-harm.png").exists()
    assert capsys.readouterr().out == f"no-harm: {result['verdict']}\n"


def test_program_refuses_an_unknown_experiment(capsys):
    with pytest.raises(SystemExit) as leave:
        program.main(["no-such"])
    assert leave.value.code == 2
    assert "exploding-logits" in capsys.readouterr().err


# The trainings


@pytest.fixture(scope="module")
def short():
    return tasks.Run(0.01, 0, threshold=1.0, steps=3).measure()


def test_training_writes_down_its_curves(short):
    assert short["logged"] == [1, 2, 3]
    assert np.shape(short["max_logits"]) == (3, tasks.LAYERS, tasks.HEADS)
    assert len(short["losses"]) == len(short["clipped"]) == 3
    assert 4 < short["validation_loss"] < math.log(256) + 0.1
    assert short["losses"][0] == pytest.approx(math.log(256), rel=0.05)
    assert 0 < short["ever_clipped"] <= 1
    assert sum(short["clipped"]) > 0


def test_training_depends_on_its_fields_alone(short):
    assert tasks.Run(0.01, 0, threshold=1.0, steps=3).measure() == short


def test_seed_rate_and_threshold_are_arguments_of_one_program(short):
    runs = [tasks.Run(0.01, 1, steps=3), tasks.Run(0.02, 0, steps=3), tasks.Run(0.01, 0, steps=3)]
    assert len({run.program for run in runs}) == 1
    seed, rate, plain = (run.measure() for run in runs)
    assert seed["max_logits"][0] != plain["max_logits"][0]  # other weights and text
    assert rate["max_logits"][0] == plain["max_logits"][0]
    assert rate["losses"][2] != plain["losses"][2]
    assert plain["clipped"] == [0, 0, 0]


def test_diverged_training_is_written_down_as_such():
    curves = tasks.summary(
        [
            {
                "loss": loss,
                "max_logits": {"attn": np.full((2, 2), loss)},
                "qk_clip/clipped_heads": 0,
                "qk_clip/ever_clipped_fraction": 0.0,
            }
            for loss in (1.0, math.nan)
        ]
    )
    assert curves["losses"] == [1.0, None]
    json.dumps(curves, allow_nan=False)
    assert measures.over_seeds([1.0, None]) == {"mean": None, "sd": None, "n": 2}


def test_mean_and_spread_are_those_of_a_sample():
    assert measures.over_seeds([1.0, 2.0, 3.0]) == {"mean": 2.0, "sd": 1.0, "n": 3}


def test_tuned_rate_is_the_best_and_what_diverges_is_the_worst():
    losses = {0.1: 3.0, 0.2: 1.0, 0.4: None}

    def ask(runs):
        return [{"validation_loss": losses[run.learning_rate]} for run in runs]

    tuned = measures.tune(ask, tasks.Run(0.0, 0), (0.1, 0.2, 0.4))
    assert (tuned["learning_rate"], tuned["inside"]) == (0.2, True)
    losses[0.4] = 0.5
    tuned = measures.tune(ask, tasks.Run(0.0, 0), (0.1, 0.2, 0.4))
    assert (tuned["learning_rate"], tuned["inside"]) == (0.4, False)


@pytest.mark.parametrize(
    ("losses", "steps"),
    [([3.0, 2.0, 1.0], 200 * 2**0.5), ([3.0, 2.0, 1.6], None), ([1.0, 0.9, 0.8], None)],
)
def test_steps_to_a_loss(losses, steps):
    found = token_efficiency.crossing([100, 200, 400], losses, 1.5)
    assert math.isnan(found) if steps is None else found == pytest.approx(steps)


def test_last_clip_counts_steps_from_one():
    assert measures.last_clip({"clipped": [0, 3, 0]}) == 2
    assert measures.last_clip({"clipped": [0, 0]}) == 0


def latent_params():
    random = np.random.default_rng(0)
    shapes = {"q_b": (2, 48, 96), "kv_b": (2, 32, 128), "out": (2, 64, 64)}
    return {
        name: {"kernel": jnp.float32(random.normal(size=shape))} for name, shape in shapes.items()
    }


def test_split_kernels_come_back():
    params = latent_params()
    viewed = split.split(params)
    assert [x.shape for x in viewed["kv_b"]["kernel"]] == [(2, 4, 32, 16)] * 2
    back = split.join(viewed, params)
    for name, module in params.items():
        np.testing.assert_array_equal(back[name]["kernel"], module["kernel"])


def test_each_head_of_a_split_kernel_is_a_matrix():
    params = latent_params()
    tx = split.by_head(mc.scale_by_muon(beta=0.0, nesterov=False, ns_method="standard"))
    updates, _ = tx.update(params, tx.init(params), params)
    kernel, update = (np.asarray(tree["kv_b"]["kernel"]) for tree in (params, updates))
    for head in range(4):
        for part in (slice(0, 16), slice(16, 32)):  # key, value
            columns = np.arange(32 * head, 32 * head + 32)[part]
            alone = mc.newton_schulz(kernel[1][:, columns], method="standard")
            np.testing.assert_allclose(update[1][:, columns], alone, rtol=1e-4, atol=1e-5)


def test_model_has_the_columns_that_are_split():
    sizes: Any = tasks.MODELS["mla"]("exact").attention
    assert split.HEADS == sizes.heads
    assert split.COLUMNS == {"q_b": (sizes.nope + sizes.rope,), "kv_b": (sizes.nope, sizes.value)}


def test_heads_are_matrices_only_where_asked():
    shapes = {"attn": {"query": {"kernel": jnp.zeros((2, 64, 4, 16))}}}
    shapes = {"blocks": shapes}
    numbers = tasks.dimension_numbers(shapes, per_head=True)
    assert numbers["blocks"]["attn"]["query"]["kernel"] == mc.MuonDimensionNumbers(-3, -1)
    whole = tasks.dimension_numbers(shapes, per_head=False)
    rows = mc.routing_table(shapes, whole).rows
    assert "2 x 64 x 64" in str(mc.routing_table(shapes, whole))
    assert len(rows) == 1


@pytest.mark.parametrize("name", ["mc.muon", "optax.muon"])
def test_both_muons_get_the_same_settings(name):
    params = {"dense": {"kernel": jnp.float32(np.random.default_rng(0).normal(size=(8, 16)))}}
    tx = tasks.optimizer(tasks.Run(0.1, 0, optimizer=name), params, 0.1)
    other = optax.contrib.muon(0.1)
    updates, expected = (t.update(params, t.init(params), params)[0] for t in (tx, other))
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)

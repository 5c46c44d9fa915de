"""The committed evidence follows from its records, and the pages show its figures."""

import dataclasses
import json
import math
import pathlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import muonclip_jax as mc
from benchmarks.evidence import (
    __main__ as program,
    runner,
    summaries,
    token_efficiency,
    training,
)
from tests.support import pages

RESULTS, PAGE = program.RESULTS, program.PAGE
KEYS = (
    "experiment claim source published command date versions seeds ours verdict runs"
).split()  # as the issue of the experiments pins them

every_experiment = pytest.mark.parametrize("name", program.EXPERIMENTS)


def result_of(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


# Committed results


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
    """A changed record, figure or verdict alone fails."""
    result, experiment = result_of(name), program.EXPERIMENTS[name]
    ours = experiment.study(runner.lookup(result["runs"]))
    assert_same(json.loads(json.dumps(ours)), result["ours"])
    assert experiment.verdict(result["ours"]) == result["verdict"]
    texts = experiment.CLAIM, experiment.SOURCE, experiment.PUBLISHED
    assert texts == (result["claim"], result["source"], result["published"])


def assert_same(got, expected, where=""):
    """Asserts equality, except for the last digits of recomputed numbers."""
    if isinstance(expected, dict):
        assert list(got) == list(expected), where
        for key in expected:
            assert_same(got[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, float) and not isinstance(got, bool):
        assert got == pytest.approx(expected, rel=1e-3), where
    else:
        assert got == expected, where


@every_experiment
def test_every_record_is_used(name):
    result, requested = result_of(name), []
    known = runner.lookup(result["runs"])

    def measure(requests):
        requested.extend(runner.described(task) for task in requests)
        return known(requests)

    program.EXPERIMENTS[name].study(measure)
    assert all(run["settings"] in requested for run in result["runs"])
    assert len(result["runs"]) == len({json.dumps(run["settings"]) for run in result["runs"]})


@every_experiment
def test_plot_is_drawn_from_the_result(name):
    figure = program.EXPERIMENTS[name].draw(result_of(name))
    assert isinstance(figure, Figure)
    assert all(axes.has_data() for axes in figure.axes)


def test_page_is_generated_from_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "PAGE", tmp_path / "evidence.md")
    program.main(["page"])
    update = "run python -m benchmarks.evidence page"
    assert (tmp_path / "evidence.md").read_text() == PAGE.read_text(), update


def test_choosing_shows_the_figures_of_the_results():
    advice = pages.numbers("docs/choosing.md")
    you = result_of("orthogonalization-accuracy")["ours"]["you"]["minus_reference"]
    assert advice["you_behind_jordan"] == summaries.mean_sd(you)
    share = result_of("low-threshold")["ours"]["12"]["ever_clipped"]["mean"]
    assert advice["ever_clipped_at_12"] == f"{100 * share:.0f}"


# The runner


@dataclasses.dataclass(frozen=True)
class Square:
    """A task that takes no time, and appends its number to a file."""

    x: int
    log: str
    alone: bool = True  # in this process

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


def test_runner_runs_each_task_once_and_keeps_their_order(squares):
    tasks_of, log, memory = squares
    measure = runner.Runner(memory, workers=1)
    assert [r["square"] for r in measure(tasks_of(3, 1, 2, 1))] == [9, 1, 4, 1]
    assert [r["square"] for r in measure(tasks_of(1, 4))] == [1, 16]
    assert sorted(log.read_text().split()) == ["1", "2", "3", "4"]
    assert [r["square"] for r in measure.records] == [9, 1, 4, 16]


@pytest.mark.nightly
def test_runner_runs_tasks_in_other_processes(squares):
    tasks_of, log, memory = squares
    tasks = [dataclasses.replace(task, alone=False) for task in tasks_of(3, 1, 2, 5)]
    measure = runner.Runner(memory, workers=2)
    assert [r["square"] for r in measure(tasks)] == [9, 1, 4, 25]
    assert sorted(log.read_text().split()) == ["1", "2", "3", "5"]


def test_runner_continues_after_an_interruption(squares):
    tasks_of, log, memory = squares
    runner.Runner(memory, workers=1)(tasks_of(1, 2))
    memory.write_text(memory.read_text() + '\n{"settings": {"ta')  # killed while writing
    again = runner.Runner(memory, workers=1)
    assert [r["square"] for r in again(tasks_of(1, 2, 3))] == [1, 4, 9]
    assert sorted(log.read_text().split()) == ["1", "2", "3"]
    assert [r["square"] for r in runner.Runner(memory, workers=1)(tasks_of(3))] == [9]
    assert sorted(log.read_text().split()) == ["1", "2", "3"]


def test_runner_repeats_tasks_of_other_versions(squares, monkeypatch):
    tasks_of, log, memory = squares
    runner.Runner(memory, workers=1)(tasks_of(1))
    monkeypatch.setattr(runner, "versions", lambda: {"jax": "another"})
    runner.Runner(memory, workers=1)(tasks_of(1))
    assert log.read_text().split() == ["1", "1"]


def test_program_writes_the_committed_result_from_its_records(tmp_path, monkeypatch, capsys):
    result = result_of("low-threshold")
    memory = tmp_path / "done"
    lines = [json.dumps(run | {"versions": runner.versions()}) for run in result["runs"]]
    memory.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(program, "MEMORY", memory)
    program.main(["low-threshold", "--out", str(tmp_path), "--workers", "1"])
    written = json.loads((tmp_path / "low-threshold.json").read_text())
    assert written == result | {"versions": runner.versions()}
    assert (tmp_path / "low-threshold.png").exists()
    assert capsys.readouterr().out == f"low-threshold: {result['verdict']}\n"


def test_unknown_experiment_exits_with_the_list(capsys):
    with pytest.raises(SystemExit) as leave:
        program.main(["no-such"])
    assert leave.value.code == 2
    assert "exploding-logits" in capsys.readouterr().err


# The trainings


@pytest.fixture(scope="module")
def record():
    return training.Run(0.01, 0, threshold=1.0, steps=3).measure()


@pytest.mark.nightly
def test_training_records_its_curves(record):
    assert record["logged"] == [1, 2, 3]
    assert np.shape(record["max_logits"]) == (3, training.LAYERS, training.HEADS)
    assert len(record["losses"]) == len(record["clipped"]) == 3
    assert 4 < record["validation_loss"] < math.log(256) + 0.1
    assert record["losses"][0] == pytest.approx(math.log(256), rel=0.05)
    assert 0 < record["ever_clipped"] <= 1
    assert sum(record["clipped"]) > 0


@pytest.mark.nightly
def test_equal_trainings_have_equal_records(record):
    assert training.Run(0.01, 0, threshold=1.0, steps=3).measure() == record


@pytest.mark.nightly
def test_seed_rate_and_threshold_are_arguments_of_one_program():
    runs = [training.Run(rate, seed, steps=3) for rate, seed in ((0.01, 1), (0.02, 0), (0.01, 0))]
    assert len({run.program for run in runs}) == 1
    seed, rate, plain = (run.measure() for run in runs)
    assert seed["max_logits"][0] != plain["max_logits"][0]  # other weights and text
    assert rate["max_logits"][0] == plain["max_logits"][0]
    assert rate["losses"][2] != plain["losses"][2]
    assert plain["clipped"] == [0, 0, 0]


def test_diverged_loss_is_recorded_as_none():
    curves = training.curves(
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
    assert summaries.over_seeds([1.0, None]) == {"mean": None, "sd": None, "n": 2}


def test_over_seeds_returns_the_sample_deviation():
    assert summaries.over_seeds([1.0, 2.0, 3.0]) == {"mean": 2.0, "sd": 1.0, "n": 3}


def test_tune_returns_the_best_rate_and_ranks_divergence_last():
    losses = {0.1: 3.0, 0.2: 1.0, 0.4: None}

    def measure(runs):
        return [{"validation_loss": losses[run.learning_rate]} for run in runs]

    tuned = summaries.tune(measure, training.Run(0.0, 0), (0.1, 0.2, 0.4))
    assert (tuned["learning_rate"], tuned["inside"]) == (0.2, True)
    losses[0.4] = 0.5
    tuned = summaries.tune(measure, training.Run(0.0, 0), (0.1, 0.2, 0.4))
    assert (tuned["learning_rate"], tuned["inside"]) == (0.4, False)


@pytest.mark.parametrize(
    ("losses", "steps"),
    [([3.0, 2.0, 1.0], 200 * 2**0.5), ([3.0, 2.0, 1.6], None), ([1.0, 0.9, 0.8], None)],
)
def test_crossing_interpolates_in_the_logarithm_of_steps(losses, steps):
    found = token_efficiency.crossing([100, 200, 400], losses, 1.5)
    assert math.isnan(found) if steps is None else found == pytest.approx(steps)


def test_last_clip_counts_from_step_one():
    assert summaries.last_clip({"clipped": [0, 3, 0]}) == 2
    assert summaries.last_clip({"clipped": [0, 0]}) == 0


@pytest.mark.parametrize(("attention", "split"), [("gqa", 3), ("mla", 2)])
def test_per_head_splits_queries_keys_and_values(attention, split):
    model = training.MODELS[attention]("exact")
    text = jnp.zeros((1, 2), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), text))["params"]
    rows = mc.routing_table(shapes, per_head=model.layout).rows
    assert sum("per head" in row.reason for row in rows) == split


@pytest.mark.parametrize("name", ["mc.muon", "optax.muon"])
def test_both_muons_have_the_defaults_of_optax(name):
    params = {"dense": {"kernel": jnp.float32(np.random.default_rng(0).normal(size=(8, 16)))}}
    tx = training.optimizer(training.Run(0.1, 0, optimizer=name), params, 0.1)
    other = optax.contrib.muon(0.1)
    updates, expected = (jax.jit(t.update)(params, t.init(params), params)[0] for t in (tx, other))
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)

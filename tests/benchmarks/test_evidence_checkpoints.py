"""A long training of the evidence continues from its checkpoint, bitwise equal."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.evidence import checkpoint, runner, ten_million, training


def test_checkpoint_returns_what_was_saved(tmp_path):
    params = {"w": jnp.arange(6.0).reshape(2, 3), "count": jnp.int32(3)}
    state = (params, optax.adam(0.1).init(params))
    metrics = [{"loss": np.float32(1 / (i + 3)), "heads": np.full(2, i)} for i in range(3)]
    path = tmp_path / "folder" / "one.npz"
    checkpoint.save(path, state, metrics)
    got = checkpoint.load(path, jax.eval_shape(lambda: (state, metrics[0])))
    assert jax.tree.structure(got) == jax.tree.structure((state, metrics))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves((state, metrics)), strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


def test_checkpoints_of_other_settings_and_versions_have_other_files(tmp_path):
    settings = {"seed": 0, "jax": "1"}
    paths = [checkpoint.path_of(tmp_path, settings | x) for x in ({}, {"seed": 1}, {"jax": "2"})]
    assert len(set(paths)) == 3
    assert checkpoint.path_of(tmp_path, dict(reversed(settings.items()))) == paths[0]


@dataclasses.dataclass(frozen=True)
class Interrupted:
    """A task that is interrupted once, after it has saved its checkpoint."""

    alone: bool = True
    resumable: bool = True
    program: int = 0

    def measure(self, saved):
        if saved.exists():
            return {"text": saved.read_text()}
        saved.parent.mkdir()
        saved.write_text("half")
        raise KeyboardInterrupt


def test_runner_keeps_a_checkpoint_until_the_record_is_stored(tmp_path):
    memory = tmp_path / "done"
    with pytest.raises(KeyboardInterrupt):
        runner.Runner(memory, 1)([Interrupted()])
    (saved,) = (tmp_path / "unfinished").iterdir()
    (record,) = runner.Runner(memory, 1)([Interrupted()])
    assert record["text"] == "half"
    assert not saved.exists()
    assert json.loads(memory.read_text())["text"] == "half"


@pytest.mark.nightly
def test_interrupted_training_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    run = training.Run(0.05, 0, threshold=1.0, steps=5)
    monkeypatch.setattr(training, "SAVED", 2)
    whole = run.measure()
    assert sum(whole["clipped"]) > 0
    path, save = tmp_path / "one.npz", checkpoint.save

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    for steps in (2, 4, 5):
        with pytest.raises(KeyboardInterrupt):
            run.measure(path)
        with np.load(path) as file:
            assert len(file[file.files[-1]]) == steps
    assert run.measure(path) == whole  # nothing is left to do but the validation


# The experiment


def curves(clipped, largest=50.0, loss=1.0):
    """A record of ten steps of a model with one layer of two heads."""
    return {
        "logged": [5, 10],
        "losses": [2.0, loss],
        "max_logits": [[[largest / 2, 1.0]], [[largest, 2.0]]],
        "clipped": clipped,
        "ever_clipped": 0.5 if sum(clipped) else 0.0,
        "validation_loss": loss,
    }


def ours_of(largest, clipped, loss):
    plain, none = [curves([0] * 10, largest)] * 2, [curves([0] * 10)] * 2
    line = ten_million.compare(plain, [curves(clipped, 105.0, loss)] * 2, none)
    return {"adamw": {"rate": 0.1, "trials": [1.0]}, "models": {"gqa": line}}


@pytest.mark.parametrize(
    ("largest", "clipped", "loss", "verdict"),
    [
        (1001.0, [0, 9, 0, 1, 0, 0, 0, 0, 0, 0], 1.0, "reproduced"),
        (999.0, [0, 9, 0, 1, 0, 0, 0, 0, 0, 0], 1.0, "partly"),
        (1001.0, [0, 9, 0, 2, 0, 0, 0, 0, 0, 0], 1.0, "partly"),
        (1001.0, [0, 9, 0, 1, 0, 0, 0, 0, 0, 0], 1.1, "partly"),
    ],
)
def test_ten_million_is_reproduced_if_all_of_its_conditions_hold(largest, clipped, loss, verdict):
    assert ten_million.verdict(ours_of(largest, clipped, loss)) == verdict


def test_ten_million_takes_the_median_while_a_head_is_clipped():
    heads = [[90.0, 1.0], [101.0, 1.0], [95.0, 1.0], [103.0, 1.0], [20.0, 1.0]]
    record = {"logged": [1, 2, 3, 4, 5], "max_logits": [[head] for head in heads]}
    assert ten_million.median_while_clipped(record) == 101
    record["max_logits"] = [[[1.0, 1.0]]] * 5
    assert ten_million.median_while_clipped(record) is None


def test_ten_million_counts_late_clips():
    (line,) = ours_of(1001.0, [0, 6, 0, 1, 0, 0, 0, 0, 0, 1], 1.0)["models"].values()
    assert line["late_clips"]["mean"] == 0.25
    assert line["last_clip"]["mean"] == 10
    assert line["clips_by_tenth"] == [0, 6, 0, 1, 0, 0, 0, 0, 0, 1]


def test_ten_million_shows_both_models_with_all_seeds():
    records = []

    def measure(runs):
        def largest(run):
            return 50.0 if run.optimizer == "adamw" else 105.0 if run.threshold else 1001.0

        new = [
            curves([0, 9, 0, 1] + [0] * 6 if r.threshold else [0] * 10, largest(r)) for r in runs
        ]
        new = [r | {"settings": runner.described(run)} for r, run in zip(new, runs, strict=True)]
        records.extend(new)
        return new

    ours = ten_million.study(measure)
    assert ten_million.verdict(ours) == "reproduced"
    assert ten_million.one_line(ours).startswith("gqa: 1,001 without QK-clip")
    text = ten_million.section(ours)
    first, *_ = text.split("\n\n")
    assert "reaches 1,001 (gqa) and 1,001 (mla)." in first
    rows = [line for line in text.splitlines() if line.startswith(("| gqa", "| mla"))]
    assert [row.count("1001 ± 0") for row in rows] == [1, 1]
    assert ten_million.study(runner.lookup(records)) == ours
    assert len(ten_million.draw({"runs": records, "ours": ours}).axes) == 6

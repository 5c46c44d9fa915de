"""A run of the training program: its files, its clip, and that a pause changes no bit of it."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

from lm import data, rundir, training
from lm.checkpoint import Checkpoints
from lm.config import BadInput
from lm_cases import CONFIG, CORPUS, TEXT, TINY, compiled_once, trainer

LOW_THRESHOLD = 2.0  # of the largest attention logit


class Killed(BaseException):
    """Ends a run as a kill would: nothing after it is done."""


def after(calls, then):
    """A `should_stop` that calls `then` from its n-th call on."""
    count = iter(range(1, 1_000))
    return lambda: next(count) >= calls and then()


def final_state(path):
    made = training.Trainer(CONFIG, CORPUS, path, TINY)
    with Checkpoints(path / "checkpoints") as checkpoints:
        return checkpoints.restore(CONFIG.steps, jax.eval_shape(made.initial_state))


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    yield from compiled_once(tmp_path_factory.mktemp("cache"))


def completed(tmp_path_factory, **changes):
    path = tmp_path_factory.mktemp("completed") / "run"
    assert trainer(path, **changes).train() == CONFIG.steps
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 20 steps without a pause."""
    return completed(tmp_path_factory)


@pytest.fixture(scope="module")
def muon_run(tmp_path_factory):
    """The same under muon, with a threshold that would hold every head."""
    return completed(tmp_path_factory, optimizer="muon", threshold=1e-3)


@pytest.fixture(scope="module")
def clipped_run(tmp_path_factory):
    """The same under muonclip, with a threshold in reach."""
    return completed(tmp_path_factory, threshold=LOW_THRESHOLD)


# Files


def test_run_writes_all_files(whole):
    files = {"run.json", "metrics.jsonl", "summary.json", "loss.png", "max_logits.png"}
    assert {path.name for path in whole.iterdir()} == files | {"checkpoints"}


def test_metrics_have_each_step_once_with_the_pinned_keys(whole):
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    for line in lines:
        assert line.keys() >= {"step", "loss", "max_logit", "heads_clipped"}
        assert np.shape(line["max_logits"]) == (TINY.layers, TINY.heads)
        assert line["max_logit"] == np.max(line["max_logits"])


def test_summary_has_the_pinned_keys(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary.keys() == {"train_loss", "validation_loss", "steps", "seconds", "tokens"}
    assert summary["steps"] == 20
    assert summary["tokens"] == 20 * 4 * 16
    losses = [line["loss"] for line in rundir.read_metrics(whole)]
    np.testing.assert_allclose(summary["train_loss"], np.mean(losses), rtol=1e-12)


def test_loss_falls_below_that_of_a_uniform_guess(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["validation_loss"] < 0.75 * np.log(256)


def test_first_loss_is_that_of_a_uniform_guess(whole):
    np.testing.assert_allclose(rundir.read_metrics(whole)[0]["loss"], np.log(256), rtol=1e-5)


def test_plots_are_images(whole):
    for name in ("loss.png", "max_logits.png"):
        assert (whole / name).read_bytes().startswith(b"\x89PNG")
        assert (whole / name).stat().st_size > 10_000


def test_newest_three_checkpoints_are_kept(whole):
    assert sorted(int(path.name) for path in (whole / "checkpoints").iterdir()) == [7, 14, 20]


def test_a_fourth_checkpoint_drops_the_oldest(tmp_path):
    trainer(tmp_path, checkpoint_every=5, steps=20).train()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [10, 15, 20]


def test_which_steps_are_logged_depends_on_the_step_alone():
    logged = [n for n in range(1, 1_041) if rundir.is_logged(n)]
    assert logged == [*range(1, 1_001), 1_010, 1_020, 1_030, 1_040]


def test_folder_that_another_program_takes_is_refused_and_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/gqa-muonclip").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr("os.path.lexists", lambda path: path.name == "runs")
        with pytest.raises(BadInput, match="cannot be made"):
            rundir.open_run(CONFIG, CORPUS)
    assert list((tmp_path / "runs").rglob("*")) == [tmp_path / "runs/gqa-muonclip"]


def test_full_disk_leaves_no_folder(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(BadInput, match=r"cannot be made \(No space left on device\)"):
        trainer(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


# The clip


def test_muon_records_but_does_not_clip(muon_run):
    lines = rundir.read_metrics(muon_run)
    assert all(line["max_logit"] > 1e-3 for line in lines)
    assert {line["heads_clipped"] for line in lines} == {0}


def test_muonclip_that_never_clips_is_muon(muon_run, whole):
    assert {line["heads_clipped"] for line in rundir.read_metrics(whole)} == {0}
    assert (muon_run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_muonclip_clips_every_head_above_the_threshold(clipped_run):
    lines = rundir.read_metrics(clipped_run)
    for line in lines:
        assert line["heads_clipped"] == np.sum(np.array(line["max_logits"]) > LOW_THRESHOLD)
    assert sum(line["heads_clipped"] for line in lines) > 20
    passed = np.array([line["max_logits"] for line in lines]) > LOW_THRESHOLD
    ever = np.logical_or.accumulate(passed).sum(axis=(1, 2))
    assert [line["heads_ever_clipped"] for line in lines] == ever.tolist()
    assert min(line["heads_clipped"] for line in lines) < ever[-1]  # some head recovered


def test_muonclip_holds_the_logits_where_muon_lets_them_grow(clipped_run, muon_run):
    held, free = (
        np.mean([line["max_logit"] for line in rundir.read_metrics(run)[10:]])
        for run in (clipped_run, muon_run)
    )
    assert held < 1.2 * LOW_THRESHOLD < free  # measured HELD against FREE


def test_adamw_records_but_does_not_clip(tmp_path):
    trainer(tmp_path, optimizer="adamw", steps=3, threshold=1e-3).train()
    lines = rundir.read_metrics(tmp_path)
    assert all(line["max_logit"] > 1e-3 for line in lines)
    assert [line["heads_clipped"] for line in lines] == [0, 0, 0]


# Pauses


def test_stopped_run_resumes_bit_for_bit(whole, tmp_path):
    stopped = trainer(tmp_path, should_stop=after(9, lambda: True))
    assert stopped.train() == 9
    assert not (tmp_path / "summary.json").exists()
    assert (tmp_path / "checkpoints" / "9").exists()
    trainer(tmp_path, resume=True).train()
    assert_equal_runs(tmp_path, whole)


@pytest.mark.parametrize("torn", [b"", b'{"step": 11, "lo'], ids=["clean", "torn"])
def test_killed_run_resumes_bit_for_bit(whole, tmp_path, torn):
    def kill():
        raise Killed

    with pytest.raises(Killed):
        trainer(tmp_path, should_stop=after(11, kill)).train()
    with (tmp_path / "metrics.jsonl").open("ab") as log:
        log.write(torn)
    trainer(tmp_path, resume=True).train()
    assert_equal_runs(tmp_path, whole)


def test_run_killed_before_its_first_checkpoint_starts_again(whole, tmp_path, capsys):
    def kill():
        raise Killed

    with pytest.raises(Killed):
        trainer(tmp_path, should_stop=after(3, kill)).train()
    trainer(tmp_path, resume=True).train()
    assert "no checkpoint yet: starting at step 0" in capsys.readouterr().out
    assert_equal_runs(tmp_path, whole)


def test_run_killed_before_its_summary_gets_it(whole, tmp_path, monkeypatch):
    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("lm.plots.draw", kill)
        with pytest.raises(Killed):
            trainer(tmp_path).train()
    trainer(tmp_path, resume=True).train()
    assert_equal_runs(tmp_path, whole)


def assert_equal_runs(path, reference):
    assert (path / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    chex.assert_trees_all_equal(final_state(path), final_state(reference))
    summaries = [json.loads((run / "summary.json").read_text()) for run in (path, reference)]
    first, second = ({k: v for k, v in s.items() if k != "seconds"} for s in summaries)
    assert first == second


CHANGES = {
    "optimizer": "adamw",
    "steps": 21,
    "batch_size": 8,
    "seq_len": 8,
    "learning_rate": 0.5,
    "threshold": 7.0,
    "seed": 1,
    "accumulate": 2,
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_setting_is_refused_with_both_values(whole, name):
    config = dataclasses.replace(CONFIG, out=whole, resume=True, **{name: CHANGES[name]})
    before = CONFIG.peak if name == "learning_rate" else getattr(CONFIG, name)
    flag = "--" + name.replace("_", "-")
    with pytest.raises(BadInput) as error:
        rundir.open_run(config, CORPUS)
    assert f"{flag} was {before}, now {CHANGES[name]}" in str(error.value)
    assert "another --out" in str(error.value)


def test_changed_settings_are_listed_together(whole):
    config = dataclasses.replace(CONFIG, out=whole, resume=True, seed=1, threshold=7.0)
    with pytest.raises(BadInput) as error:
        rundir.open_run(config, CORPUS)
    assert str(error.value) == (
        f"--resume {whole}: --threshold was {CONFIG.threshold}, now 7.0; --seed was 0, now 1;"
        " give the old values, or another --out"
    )


def test_changed_text_is_refused(whole):
    config = dataclasses.replace(CONFIG, out=whole, resume=True)
    other = data.split("tiny", TEXT[:-1] + b"!", 0, CONFIG.seq_len)
    with pytest.raises(BadInput, match=rf"--data was .*{CORPUS.sha256}, now .*{other.sha256}"):
        rundir.open_run(config, other)


def test_default_learning_rate_may_be_named_on_resume(whole):
    config = dataclasses.replace(CONFIG, out=whole, resume=True, learning_rate=CONFIG.peak)
    assert rundir.open_run(config, CORPUS).done

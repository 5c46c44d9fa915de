"""A run of the training program: its files, its clip, its events and plots."""

import json

import matplotlib
import numpy as np
import pytest

from examples.language_model.config import BadInput
from examples.language_model.run_folder import files, journal, opening, plots, progress
from examples.language_model.run_folder.plots import PLOTS
from tests.support.tiny_run import CONFIG, CORPUS, TINY, scalars, trainer

LOW_THRESHOLD = 2.0  # of the largest attention logit


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
    (events,) = whole.glob("events.out.tfevents.*")
    files = {"run.json", "metrics.jsonl", "summary.json", events.name, *PLOTS}
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
    losses = [line["loss"] for line in files.read_metrics(whole)]
    np.testing.assert_allclose(summary["train_loss"], np.mean(losses), rtol=1e-12)


def test_loss_falls_below_that_of_a_uniform_guess(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["validation_loss"] < 0.75 * np.log(256)


def test_first_loss_is_that_of_a_uniform_guess(whole):
    np.testing.assert_allclose(files.read_metrics(whole)[0]["loss"], np.log(256), rtol=1e-5)


def test_plots_are_images(whole):
    assert set(PLOTS) == {"loss.png", "max_logits.png", "heads.png"}
    for name in PLOTS:
        assert (whole / name).read_bytes().startswith(b"\x89PNG")
        assert (whole / name).stat().st_size > 10_000


def test_newest_three_checkpoints_are_kept(whole):
    assert sorted(int(path.name) for path in (whole / "checkpoints").iterdir()) == [7, 14, 20]


@pytest.mark.nightly
def test_a_fourth_checkpoint_drops_the_oldest(tmp_path):
    trainer(tmp_path, checkpoint_every=5, steps=20).train()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [10, 15, 20]


def test_logged_steps_depend_on_the_step_alone():
    logged = [n for n in range(1, 1_041) if files.is_logged(n)]
    assert logged == [*range(1, 1_001), 1_010, 1_020, 1_030, 1_040]


def test_folder_that_another_program_creates_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/gqa-muonclip").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr("os.path.lexists", lambda path: path.name == "runs")
        with pytest.raises(BadInput, match="cannot be created"):
            opening.open_run(CONFIG, CORPUS)
    assert list((tmp_path / "runs").rglob("*")) == [tmp_path / "runs/gqa-muonclip"]


def test_full_disk_leaves_no_folder(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(BadInput, match=r"cannot be created \(No space left on device\)"):
        trainer(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


# The clip


def test_muon_records_but_does_not_clip(muon_run):
    lines = files.read_metrics(muon_run)
    assert all(line["max_logit"] > 1e-3 for line in lines)
    assert {line["heads_clipped"] for line in lines} == {0}


def test_muonclip_that_never_clips_is_muon(muon_run, whole):
    assert {line["heads_clipped"] for line in files.read_metrics(whole)} == {0}
    assert (muon_run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_muonclip_clips_every_head_above_the_threshold(clipped_run):
    lines = files.read_metrics(clipped_run)
    for line in lines:
        assert line["heads_clipped"] == np.sum(np.array(line["max_logits"]) > LOW_THRESHOLD)
    assert sum(line["heads_clipped"] for line in lines) > 20
    passed = np.array([line["max_logits"] for line in lines]) > LOW_THRESHOLD
    ever = np.logical_or.accumulate(passed).sum(axis=(1, 2))
    assert [line["heads_ever_clipped"] for line in lines] == ever.tolist()
    assert min(line["heads_clipped"] for line in lines) < ever[-1]  # some head recovered


def test_muonclip_limits_logits_that_grow_with_muon(clipped_run, muon_run):
    held, free = (
        np.mean([line["max_logit"] for line in files.read_metrics(run)[10:]])
        for run in (clipped_run, muon_run)
    )
    assert held < 1.2 * LOW_THRESHOLD < free


@pytest.mark.nightly
def test_adamw_records_but_does_not_clip(tmp_path):
    trainer(tmp_path, optimizer="adamw", steps=3, threshold=1e-3).train()
    lines = files.read_metrics(tmp_path)
    assert all(line["max_logit"] > 1e-3 for line in lines)
    assert [line["heads_clipped"] for line in lines] == [0, 0, 0]


# TensorBoard events


def test_events_are_the_scalars_of_the_metrics(whole):
    lines, found = files.read_metrics(whole), scalars(whole)
    for tag in ("loss", "learning_rate", "max_logit", "heads_clipped", "heads_ever_clipped"):
        steps, values = zip(*found.pop(tag), strict=True)
        assert list(steps) == [line["step"] for line in lines]
        np.testing.assert_array_equal(values, np.array([line[tag] for line in lines], np.float32))
    loss = json.loads((whole / "summary.json").read_text())["validation_loss"]
    assert found.pop("validation_loss") == [(20, np.float32(loss))]
    assert [step for step, _ in found["tokens_per_second"]] == list(range(2, 21))
    assert all(value > 0 for _, value in found["tokens_per_second"])
    assert found.keys() == {"tokens_per_second"}


@pytest.mark.nightly
def test_resumed_run_has_each_step_once_in_the_events(tmp_path):
    def kill():
        raise KeyboardInterrupt

    calls = iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, should_stop=lambda: next(calls) == 10 and kill()).train()
    trainer(tmp_path, resume=True).train()
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2
    steps, losses = zip(*scalars(tmp_path)["loss"], strict=True)
    assert list(steps) == list(range(1, 21))
    lines = files.read_metrics(tmp_path)
    np.testing.assert_array_equal(losses, np.array([line["loss"] for line in lines], np.float32))


@pytest.mark.nightly
def test_events_before_a_checkpoint_survive_a_kill(tmp_path):
    """Nothing is closed here, as nothing is at a kill."""
    log = journal.Journal(CONFIG, tmp_path, 0, progress.Speed())
    log.log({"step": 1, "loss": 1.0, "max_logit": 1.0, "heads_clipped": 0})
    assert scalars(tmp_path) == {}
    log.sync(1)
    assert scalars(tmp_path)["loss"] == [(1, 1.0)]
    log.__exit__()


@pytest.mark.nightly
@pytest.mark.parametrize("steps", [2, 100], ids=["short", "longer_than_the_run"])
def test_profile_is_written_into_the_run(tmp_path, steps):
    trainer(tmp_path, profile=steps, steps=20).train()
    (trace,) = (tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 0


def test_throughput_excludes_the_first_step(monkeypatch):
    times = iter([10.0, 12.0, 14.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    speed = progress.Speed()
    speed.update(100)
    assert speed.tokens_per_second is None
    speed.update(120)
    assert speed.tokens_per_second == 10.0
    speed.update(200)
    assert speed.tokens_per_second == 25.0


def test_heat_map_keeps_the_largest_logit_of_steps_that_share_a_column():
    metrics = [{"step": n + 1, "max_logits": [[0.0, n == 1_234]]} for n in range(5_000)]
    steps, logits = plots._columns(metrics)
    assert len(steps) == 800
    assert logits.shape == (800, 1, 2)
    (column,) = np.flatnonzero(logits[:, 0, 1])
    assert steps[column] <= 1_235 < steps[column + 1]


def test_smoothed_loss_does_not_lag():
    steps = [*range(1, 101), *range(110, 500, 10)]  # logged with gaps, as in a long run
    straight = [5.0 - 0.01 * step for step in steps]
    np.testing.assert_allclose(plots._smooth(steps, straight), straight, rtol=1e-12)


def test_smoothed_loss_is_less_noisy():
    noise = np.random.default_rng(0).normal(size=500)
    smooth = plots._smooth(range(1, 501), noise)
    assert np.std(smooth[50:-50]) < 0.2  # 1 / sqrt(41) is 0.16
    assert max(abs(x) for x in smooth[-5:]) < 1.0


def test_smoothed_loss_of_a_short_run_is_the_loss():
    assert plots._smooth([1], [5.5]) == [5.5]


def test_color_bar_names_its_quantity():
    lines = [{"step": n + 1, "max_logits": [[0.0, 20.0 + n]]} for n in range(3)]
    _, bar = plots._heads(CONFIG, lines).axes
    assert bar.get_ylabel() == "largest attention logit (white: threshold 15)"


def test_heat_map_is_white_at_the_threshold_and_red_above():
    style = plots._colors(15.0, np.array([-2.0, 14.0, 18.0]))
    white, red = (matplotlib.colormaps[style["cmap"]](style["norm"](x)) for x in (15.0, 18.0))
    assert min(white) > 0.95
    assert red[0] > 2 * max(red[1:3])


def test_heat_map_below_the_threshold_has_no_red():
    style = plots._colors(1e30, np.array([-2.0, 14.0, 18.0]))
    red, _, blue, _ = matplotlib.colormaps[style["cmap"]](style["norm"](np.linspace(-2, 18, 9))).T
    assert (blue >= red).all()

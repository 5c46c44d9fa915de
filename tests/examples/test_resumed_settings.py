"""`--resume` keeps the settings of the run, and raises where a flag or the text differs."""

import dataclasses
import json
import pathlib

import jax
import pytest

from examples.language_model import data
from examples.language_model.config import BadInput, Config
from examples.language_model.run_folder import files, opening
from examples.language_model.training import loop
from tests.support.interruption_cases import after
from tests.support.tiny_run import CONFIG, CORPUS, TEXT, TINY, trainer

CHANGES = {
    "model": "mla",
    "preset": "small",
    "dtype": "bfloat16",
    "optimizer": "adamw",
    "per_head": True,
    "schedule": "cosine",
    "steps": 21,
    "batch_size": 8,
    "seq_len": 8,
    "learning_rate": 0.5,
    "seed": 1,
    "accumulate": 2,
}


@pytest.fixture(scope="module")
def ended_run(tmp_path_factory):
    """The folder of a run that has ended, as far as its settings show."""
    path = tmp_path_factory.mktemp("ended") / "run"
    opening.open_run(dataclasses.replace(CONFIG, out=path), CORPUS)
    (path / "summary.json").write_text("{}")
    return path


def resumed(path, **typed):
    """The settings of `--resume --out path` with other flags."""
    return opening.resumed(Config(out=path, resume=True, **typed, given=frozenset(typed)))


@pytest.mark.parametrize("name", CHANGES)
def test_changed_settings(ended_run, name):
    before = CONFIG.peak if name == "learning_rate" else getattr(CONFIG, name)
    flag = "--" + name.replace("_", "-")
    with pytest.raises(BadInput) as error:
        resumed(ended_run, **{name: CHANGES[name]})
    assert f"{flag} was {before}, now {CHANGES[name]}" in str(error.value)
    assert "another --out" in str(error.value)


def test_changed_settings_are_listed_together(ended_run):
    with pytest.raises(BadInput) as error:
        resumed(ended_run, seed=1, steps=7)
    assert str(error.value) == (
        f"--resume {ended_run}: --steps was 20, now 7; --seed was 0, now 1;"
        " pass the old values, or another --out"
    )


def test_settings_that_were_not_passed_are_those_of_the_run(ended_run):
    config = resumed(ended_run)
    assert config == dataclasses.replace(
        CONFIG, out=ended_run, resume=True, learning_rate=CONFIG.peak, no_progress=False
    )


def test_a_run_from_before_these_settings_has_their_defaults(tmp_path):
    opening.open_run(dataclasses.replace(CONFIG, out=tmp_path), CORPUS)
    settings = json.loads((tmp_path / "run.json").read_bytes())
    identity = opening.identity(tmp_path)
    older = {name: value for name, value in settings.items() if name not in opening.ADDED}
    (tmp_path / "run.json").write_text(json.dumps(older))
    assert opening.identity(tmp_path) == identity
    assert (resumed(tmp_path).per_head, resumed(tmp_path).schedule) == (False, "linear")


def test_mesh_and_text_that_were_not_passed_are_those_of_the_run(tmp_path):
    config = dataclasses.replace(
        CONFIG, out=tmp_path, mesh={"fsdp": -1}, simulate_devices=8, data=pathlib.Path("text")
    )
    opening.open_run(config, CORPUS)
    again = resumed(tmp_path)
    assert (again.mesh, again.simulate_devices) == (config.mesh, 8)
    assert again.data == pathlib.Path("text").absolute()
    assert resumed(tmp_path, mesh={"data": -1}).mesh == {"data": -1}


def test_settings_that_differ_from_the_run_raise(ended_run):
    config = dataclasses.replace(CONFIG, out=ended_run, resume=True, seed=1)
    with pytest.raises(BadInput, match="--seed was 0, now 1"):
        opening.open_run(config, CORPUS)


@pytest.mark.nightly
@pytest.mark.usefixtures("no_plots")
def test_threshold_may_change_and_is_kept(tmp_path):
    trainer(tmp_path, threshold=1e30, should_stop=after(9, lambda: True)).train()
    for typed, steps in ({"threshold": 2.0}, 12), ({}, 20):
        config = resumed(tmp_path, **typed)
        assert config.threshold == 2.0
        opening.open_run(config, CORPUS)
        stop = after(steps - 9 if typed else 100, lambda: True)
        made = loop.Trainer(config, CORPUS, tmp_path, TINY, stop, jax.devices()[:1])
        assert made.train() == steps
    lines = files.read_metrics(tmp_path)
    over = [sum(x > 2.0 for layer in line["max_logits"] for x in layer) for line in lines]
    assert [line["heads_clipped"] for line in lines] == [0] * 9 + over[9:]
    assert sum(over[9:12]) > 0
    assert sum(over[12:]) > 0


def test_changed_text_raises(ended_run):
    other = data.split("tiny", TEXT[:-1] + b"!", 0, CONFIG.seq_len)
    with pytest.raises(BadInput, match=rf"--data was .*{CORPUS.sha256}, now .*{other.sha256}"):
        opening.open_run(resumed(ended_run), other)


def test_default_learning_rate_may_be_passed_on_resume(ended_run):
    assert opening.open_run(resumed(ended_run, learning_rate=CONFIG.peak), CORPUS).complete

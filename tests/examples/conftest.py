"""Fixtures of the tests of the training program."""

import pytest


@pytest.fixture
def no_plots(monkeypatch):
    """The plots take half the time of a run; `test_run_folder` checks them."""
    monkeypatch.setattr("examples.language_model.run_folder.plots.draw", lambda *_: None)

"""The runner of the evidence runs each task once, and goes on after an interruption."""

import dataclasses
import pathlib

import pytest

from benchmarks.evidence import runner


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

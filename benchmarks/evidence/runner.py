"""Does what an experiment asks for, several trainings side by side, and remembers what is done."""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from tqdm import tqdm


class Task(Protocol):
    """A frozen data class: its fields say all that its result depends on."""

    @property
    def program(self) -> Any:
        """Tasks with equal programs follow one another in a process, which compiles once."""

    def measure(self) -> dict[str, Any]:
        """Does it, and gives what is written down."""


Ask = Callable[[Sequence[Any]], list[dict[str, Any]]]


def versions() -> dict[str, str]:
    """Gives the versions that a result depends on."""
    names = ("jax", "jaxlib", "optax", "flax", "muonclip-jax")
    return {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names}


def described(task: Any) -> dict[str, Any]:
    """Gives the fields of a task, as JSON has them."""
    return {"task": type(task).__name__} | dataclasses.asdict(task)


def lookup(records: Iterable[dict[str, Any]]) -> Ask:
    """Answers out of what has been recorded; a task that is not there is a `KeyError`."""
    known = {_key(record["settings"]): record for record in records}
    return lambda tasks: [known[_key(described(task))] for task in tasks]


class Runner:
    """Answers out of what has been done, and does the rest.

    Attributes:
      records: Of all tasks that were asked for, in that order, each once: `settings`, which are the
        fields of the task, the `date` on which it was done, and what it measured.
    """

    def __init__(self, memory: pathlib.Path, workers: int) -> None:
        self.records: list[dict[str, Any]] = []
        self._memory, self._workers, self._known = memory, workers, {}
        for line in memory.read_text().splitlines() if memory.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # torn by a kill
                record = json.loads(line)
                if record.pop("versions") == versions():
                    self._known[_key(record["settings"])] = record

    def __call__(self, tasks: Sequence[Any]) -> list[dict[str, Any]]:
        """Gives the records of tasks, in their order."""
        new = {_key(described(task)): task for task in tasks}
        new = [task for key, task in new.items() if key not in self._known]
        for record in tqdm(self._done(new), total=len(new), disable=not new):
            self._known[_key(record["settings"])] = record
            with self._memory.open("a") as file:
                file.write("\n" + json.dumps(record | {"versions": versions()}))
        answer = [self._known[_key(described(task))] for task in tasks]
        for record in answer:
            if record not in self.records:
                self.records.append(record)
        return answer

    def _done(self, tasks: list[Any]) -> Iterator[dict[str, Any]]:
        """Gives the records as they come; a timing has the machine for itself."""
        if not tasks:
            return
        alone = [task for task in tasks if getattr(task, "alone", False)]
        for task in alone:
            yield _measure([task])[0]
        programs = sorted((task for task in tasks if task not in alone), key=_by_program)
        parts = [list(part) for _, part in itertools.groupby(programs, key=_by_program)]
        # Each worker has one core and one thread: a training this small gains little from a second.
        context = multiprocessing.get_context("spawn")
        cores = context.Queue()
        for core in sorted(os.sched_getaffinity(0))[: self._workers]:
            cores.put(core)
        with concurrent.futures.ProcessPoolExecutor(
            self._workers, context, initializer=_pin, initargs=(cores,)
        ) as pool:
            halves = [piece for part in parts for piece in _divide(part, self._workers)]
            for done in concurrent.futures.as_completed(
                [pool.submit(_measure, piece) for piece in halves]
            ):
                yield from done.result()


def _key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _by_program(task: Any) -> str:
    return repr(task.program)


def _divide(tasks: list[Any], workers: int) -> list[list[Any]]:
    size = min(4, max(1, -(-len(tasks) // workers)))  # what is lost at an interruption is small
    return [tasks[i : i + size] for i in range(0, len(tasks), size)]


def _pin(cores: Any) -> None:
    os.sched_setaffinity(0, {cores.get()})


def _measure(tasks: list[Any]) -> list[dict[str, Any]]:
    today = datetime.date.today().isoformat()
    return [{"settings": described(task), "date": today, **task.measure()} for task in tasks]

"""Runs the tasks of an experiment in parallel, and stores their records to use them again."""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import itertools
import json
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from tqdm import tqdm

from benchmarks import report
from benchmarks.evidence import checkpoint


class Task(Protocol):
    """A frozen data class, whose fields determine its result."""

    @property
    def program(self) -> Any:
        """Tasks with equal programs run in one process after another, which compiles once."""

    def measure(self) -> dict[str, Any]:
        """Runs the task and returns its record.

        A task with the attribute `resumable` gets a file for its checkpoint, `measure(saved)`. The
        runner deletes it once the record is stored.
        """
        ...


Measure = Callable[[Sequence[Any]], list[dict[str, Any]]]


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    return report.versions("jax", "jaxlib", "optax", "flax", "muonclip-jax")


def described(task: Any) -> dict[str, Any]:
    """Returns the fields of a task, for JSON."""
    return {"task": type(task).__name__} | dataclasses.asdict(task)


def lookup(records: Iterable[dict[str, Any]]) -> Measure:
    """Returns recorded tasks only; any other task raises `KeyError`."""
    known = {_key(record["settings"]): record for record in records}
    return lambda tasks: [known[_key(described(task))] for task in tasks]


class Runner:
    """Returns stored records, and runs the tasks that have none.

    Args:
      memory: File of the stored records. Checkpoints are in the folder `unfinished` beside it.
      workers: Number of processes.

    Attributes:
      records: Records of all requested tasks in their order, each once: `settings`, the fields of
        the task; `date`, when it ran; and its results.
    """

    def __init__(self, memory: pathlib.Path, workers: int) -> None:
        self.records: list[dict[str, Any]] = []
        self._memory, self._workers, self._known = memory, workers, {}
        self._folder = memory.parent / "unfinished"
        for line in memory.read_text().splitlines() if memory.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # truncated when a run was killed
                record = json.loads(line)
                if record.pop("versions") == versions():
                    self._known[_key(record["settings"])] = record

    def __call__(self, tasks: Sequence[Any]) -> list[dict[str, Any]]:
        """Returns the records of tasks, in their order."""
        new = {_key(described(task)): task for task in tasks}
        new = [task for key, task in new.items() if key not in self._known]
        for record in tqdm(self._done(new), total=len(new), disable=not new):
            self._known[_key(record["settings"])] = record
            with self._memory.open("a") as file:
                file.write("\n" + json.dumps(record | {"versions": versions()}))
            _checkpoint(self._folder, record["settings"]).unlink(missing_ok=True)
        answer = [self._known[_key(described(task))] for task in tasks]
        for record in answer:
            if record not in self.records:
                self.records.append(record)
        return answer

    def _done(self, tasks: list[Any]) -> Iterator[dict[str, Any]]:
        """Runs tasks and yields their records; a timing runs alone on the machine."""
        if not tasks:
            return
        alone = [task for task in tasks if getattr(task, "alone", False)]
        for task in alone:
            yield _measure([task], self._folder)[0]
        programs = sorted((task for task in tasks if task not in alone), key=_program_key)
        parts = [list(part) for _, part in itertools.groupby(programs, key=_program_key)]
        # One core and one thread per worker: so small a training gains little from a second.
        context = multiprocessing.get_context("spawn")
        cores = context.Queue()
        for core in sorted(os.sched_getaffinity(0))[: self._workers]:
            cores.put(core)
        with concurrent.futures.ProcessPoolExecutor(
            self._workers, context, initializer=_pin, initargs=(cores,)
        ) as pool:
            chunks = [chunk for part in parts for chunk in _chunks(part, self._workers)]
            for done in concurrent.futures.as_completed(
                [pool.submit(_measure, chunk, self._folder) for chunk in chunks]
            ):
                yield from done.result()


def _key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _program_key(task: Any) -> str:
    return repr(task.program)


def _chunks(tasks: list[Any], workers: int) -> list[list[Any]]:
    size = min(4, max(1, -(-len(tasks) // workers)))  # an interruption loses few tasks
    size = 1 if any(_is_resumable(task) for task in tasks) else size
    return [tasks[i : i + size] for i in range(0, len(tasks), size)]


def _pin(cores: Any) -> None:
    os.sched_setaffinity(0, {cores.get()})


def _measure(tasks: list[Any], folder: pathlib.Path) -> list[dict[str, Any]]:
    return [_record(task, folder) for task in tasks]


def _record(task: Any, folder: pathlib.Path) -> dict[str, Any]:
    settings, today = described(task), datetime.date.today().isoformat()
    saved = [_checkpoint(folder, settings)] if _is_resumable(task) else []
    return {"settings": settings, "date": today, **task.measure(*saved)}


def _is_resumable(task: Any) -> bool:
    return getattr(task, "resumable", False)


def _checkpoint(folder: pathlib.Path, settings: dict[str, Any]) -> pathlib.Path:
    return checkpoint.path_of(folder, settings | {"versions": versions()})

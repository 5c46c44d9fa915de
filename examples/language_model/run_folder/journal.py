"""The logged steps of a run: metrics.jsonl, TensorBoard events and progress."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from examples.language_model.config import Config, Failed
from examples.language_model.run_folder import files
from examples.language_model.run_folder.events import Events
from examples.language_model.run_folder.progress import Speed, make_progress

EVENTS = "the TensorBoard events"


@contextlib.contextmanager
def writing(name: str, step: int) -> Iterator[None]:
    """Raises `Failed` for a file that cannot be written.

    Args:
      name: The file.
      step: Finished steps.

    Raises:
      Failed: if the body of the `with` statement raises `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise Failed(
            f"step {step}: {name} could not be written ({error.strerror}); free disk space, then"
            " continue with --resume"
        ) from error


class Journal:
    """Writes the logged steps of one process, and shows its progress.

    Used as a context manager. A file that cannot be written raises `Failed`.
    """

    def __init__(self, config: Config, path: pathlib.Path, done: int, speed: Speed) -> None:
        """Truncates the metrics to the finished steps.

        Args:
          config: Settings.
          path: Run folder.
          done: Finished steps of earlier processes.
          speed: Updated with every logged step.
        """
        self._config, self._speed = config, speed
        with writing(files.METRICS, done):
            files.truncate_metrics(path, done)
            self._metrics = (path / files.METRICS).open("ab")
        with writing(EVENTS, done):
            self._events = Events(path, done + 1)
        self._progress = make_progress(config, done)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        for file in (self._metrics, self._events):
            with contextlib.suppress(OSError):  # raised before, when the step was written
                file.close()

    def log(self, line: dict[str, Any]) -> None:
        """Writes the metrics of a step, which are in the file when this returns."""
        step = line["step"]
        self._speed.update(step * self._config.batch_size * self._config.seq_len)
        with writing(files.METRICS, step):
            self._metrics.write(files.metrics_line(line))
            self._metrics.flush()
        values = {k: v for k, v in line.items() if k != "step" and isinstance(v, int | float)}
        if self._speed.tokens_per_second is not None:
            values["tokens_per_second"] = self._speed.tokens_per_second
        with writing(EVENTS, step):
            self._events.scalars(step, values)
        self._progress.show(line, self._speed)

    def sync(self, step: int) -> None:
        """Puts the events on disk: a resume from a checkpoint does not write earlier ones again."""
        with writing(EVENTS, step):
            self._events.sync()

    def finish(self, step: int, validation_loss: float) -> None:
        """Adds the validation loss after the last step to the events."""
        with writing(EVENTS, step):
            self._events.scalars(step, {"validation_loss": validation_loss})

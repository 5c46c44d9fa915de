"""What can be watched of a run: metrics.jsonl, TensorBoard events, the progress, a profile."""

import contextlib
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import tqdm
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import RecordWriter

from lm import rundir
from lm.config import Config, Failed

# pyright: reportAttributeAccessIssue=false
# Protobuf makes the classes of its modules when they are imported.

LINE_EVERY = 50  # steps, where there is no terminal to draw a bar on
PROFILE = "profile"  # folder of the traces, which TensorBoard finds by itself
RISE = 0.01  # of the validation loss, relative to its lowest value, that is worth a warning
PROFILED_AFTER = 3  # steps of this start: the first compile, and are not typical


@contextlib.contextmanager
def written(what: str, step: int) -> Iterator[None]:
    """Turns a file that cannot be written into the end of the run.

    Args:
      what: The file.
      step: Finished steps.

    Raises:
      Failed: if what is inside raises `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise Failed(
            f"step {step}: {what} could not be written ({error.strerror}); make room, then"
            " --resume goes on"
        ) from error


def validation_rise(losses: Sequence[tuple[int, float]]) -> str | None:
    """Describes a validation loss that has risen by the end of a run.

    Args:
      losses: Step and validation loss in nats per byte, in order of the steps.

    Returns:
      One line with both losses and what to change; None if the last loss is at most 1 % above the
      lowest one before it.
    """
    *earlier, (last_step, last) = losses
    if not earlier:
        return None
    step, lowest = min(earlier, key=lambda pair: pair[1])
    if last <= lowest * (1 + RISE):
        return None
    return (
        f"validation loss rose from {lowest:.3f} at step {step} to {last:.3f} at step {last_step};"
        " use more text, fewer --steps, or a lower --learning-rate"
    )


class Speed:
    """Tokens a second between the first and the last logged step of this start.

    A logged step has waited for the device. The time to compile is before the first.

    Attributes:
      tokens_per_second: None before the second logged step.
    """

    def __init__(self) -> None:
        self.tokens_per_second: float | None = None
        self._first: tuple[float, int] | None = None

    def update(self, tokens: int) -> None:
        """Takes the tokens of all steps so far."""
        now = time.monotonic()
        if self._first is None:
            self._first = now, tokens
        elif now > self._first[0]:
            self.tokens_per_second = (tokens - self._first[1]) / (now - self._first[0])

    def __str__(self) -> str:
        return f"{self.tokens_per_second or 0:,.0f} tokens/s"


class Journal:
    """Writes down the logged steps of one start, and shows how far it is.

    Used as a context manager. A file that cannot be written raises `Failed`.
    """

    def __init__(self, config: Config, path: pathlib.Path, done: int, speed: Speed) -> None:
        """Cuts the metrics back to the finished steps.

        Args:
          config: Settings.
          path: Run folder.
          done: Finished steps, on which this start builds.
          speed: Kept up to date.
        """
        self._config, self._speed = config, speed
        with written(rundir.METRICS, done):
            rundir.cut_metrics(path, done)
            self._metrics = (path / rundir.METRICS).open("ab")
        with written("the TensorBoard events", done):
            self._events = Events(path, done + 1)
        self._progress = _progress(config, done)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        for file in (self._metrics, self._events):
            with contextlib.suppress(OSError):  # it was raised when the step was written
                file.close()

    def log(self, line: dict[str, Any]) -> None:
        """Writes the metrics of a step, which are on disk when this returns."""
        step = line["step"]
        self._speed.update(step * self._config.batch_size * self._config.seq_len)
        with written(rundir.METRICS, step):
            self._metrics.write(rundir.metrics_line(line))
            self._metrics.flush()
        values = {k: v for k, v in line.items() if k != "step" and isinstance(v, int | float)}
        if self._speed.tokens_per_second is not None:
            values["tokens_per_second"] = self._speed.tokens_per_second
        with written("the TensorBoard events", step):
            self._events.scalars(step, values)
        self._progress.show(line, self._speed)

    def sync(self, step: int) -> None:
        """Puts the events on disk, as a checkpoint does not bring back those before it."""
        with written("the TensorBoard events", step):
            self._events.sync()

    def end(self, step: int, validation_loss: float) -> None:
        """Adds the loss after the last step to the events."""
        with written("the TensorBoard events", step):
            self._events.scalars(step, {"validation_loss": validation_loss})


class Events:
    """The TensorBoard event file of one start.

    Not by tensorboardX's own writer: its thread dies on a full disk and leaves the caller waiting.
    """

    def __init__(self, folder: pathlib.Path, first: int) -> None:
        """Opens a file for the steps from `first` on."""
        name = f"events.out.tfevents.{int(time.time()):010d}.{first:010d}"
        self._records = RecordWriter(str(folder / name))
        self._write(file_version="brain.Event:2")
        # Makes TensorBoard forget what an earlier start wrote of these steps.
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=first, session_log=started)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the values of one step by tag; they reach the disk when they fill a buffer."""
        each = [summary_pb2.Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        self._write(step=step, summary=summary_pb2.Summary(value=each))

    def sync(self) -> None:
        """Writes what is left in the buffer, and waits until it is on disk."""
        self._records.flush()

    def close(self) -> None:
        """Writes what is left in the buffer."""
        self._records.close()

    def _write(self, **content: Any) -> None:
        event = event_pb2.Event(wall_time=time.time(), **content)
        self._records.write(event.SerializeToString())


class Tracer:
    """Writes a trace of a few steps for TensorBoard's profiler, after those that compile.

    Used as a context manager, which ends a trace that is still running.
    """

    def __init__(self, folder: pathlib.Path, done: int, steps: int) -> None:
        self._folder = folder
        self._first = done + 1 + PROFILED_AFTER
        self._last = self._first + steps - 1
        self._running = False

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            jax.profiler.stop_trace()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Traces what is inside, if it is one of the steps."""
        if number == self._first <= self._last:
            jax.profiler.start_trace(self._folder)
            self._running = True
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield

    def ended(self, number: int, state: Any) -> None:
        """Ends the trace after its last step, which has then reached the end on the device."""
        if self._running and number == self._last:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._running = False


class _Bar:
    """A bar with the time left, on a terminal."""

    def __init__(self, total: int, done: int, hidden: bool) -> None:
        self._bar = tqdm.tqdm(total=total, initial=done, disable=hidden)

    def show(self, line: Mapping[str, Any], speed: Speed) -> None:
        self._bar.set_postfix_str(_summary(line, speed), refresh=False)
        self._bar.update(line["step"] - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """A line every so many steps, in a log."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._first: tuple[float, int] | None = None  # time and step after those that compile

    def show(self, line: Mapping[str, Any], speed: Speed) -> None:
        step, now = line["step"], time.monotonic()
        started, first = self._first = self._first or (now, step)
        if step % LINE_EVERY and step != self._total:
            return
        left = (now - started) / max(1, step - first) * (self._total - step)
        text = f"step {step}/{self._total}, {_summary(line, speed)}"
        print(f"{text}, {tqdm.tqdm.format_interval(left)} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def _progress(config: Config, done: int) -> _Bar | _Lines:
    hidden = config.no_progress or config.quiet
    if hidden or sys.stderr.isatty():
        return _Bar(config.steps, done, hidden)
    return _Lines(config.steps)


def _summary(line: Mapping[str, Any], speed: Speed) -> str:
    return (
        f"loss {line['loss']:.3f}, {speed}"
        f", largest logit {line['max_logit']:.1f}, heads clipped {line['heads_clipped']}"
    )

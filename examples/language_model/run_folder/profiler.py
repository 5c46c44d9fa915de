"""Traces of a few steps for TensorBoard's profiler."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

PROFILE = "profile"  # folder of the traces, which TensorBoard finds by itself
SKIPPED = 3  # steps of this process: the first ones compile, and are not typical


class Tracer:
    """Writes a trace of a few steps, after those that compile.

    Used as a context manager, which stops a trace that is still running.
    """

    def __init__(self, folder: pathlib.Path, done: int, steps: int) -> None:
        self._folder = folder
        self._first = done + 1 + SKIPPED
        self._last = self._first + steps - 1
        self._running = False

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            jax.profiler.stop_trace()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Traces the body of the `with` statement if the step is one of those to trace."""
        if number == self._first <= self._last:
            jax.profiler.start_trace(self._folder)
            self._running = True
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield

    def stop_after(self, number: int, state: Any) -> None:
        """Stops the trace after its last step, once the device has finished it."""
        if self._running and number == self._last:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._running = False

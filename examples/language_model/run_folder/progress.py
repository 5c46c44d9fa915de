"""Progress on the terminal: a bar, or lines in a log; and the throughput that they show."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import tqdm

from examples.language_model.config import Config

LINE_EVERY = 50  # steps, without a terminal


class Speed:
    """Tokens per second between the first and the last logged step of this process.

    A logged step has waited for the device. Compilation happens before the first.

    Attributes:
      tokens_per_second: None before the second logged step.
    """

    def __init__(self) -> None:
        self.tokens_per_second: float | None = None
        self._first: tuple[float, int] | None = None

    def update(self, tokens: int) -> None:
        """Records the number of tokens of all steps so far."""
        now = time.monotonic()
        if self._first is None:
            self._first = now, tokens
        elif now > self._first[0]:
            self.tokens_per_second = (tokens - self._first[1]) / (now - self._first[0])

    def __str__(self) -> str:
        return f"{self.tokens_per_second or 0:,.0f} tokens/s"


class Bar:
    """A progress bar with the remaining time, on a terminal."""

    def __init__(self, total: int, done: int, hidden: bool) -> None:
        self._bar = tqdm.tqdm(total=total, initial=done, disable=hidden)

    def show(self, line: Mapping[str, Any], speed: Speed) -> None:
        """Moves the bar to a logged step."""
        self._bar.set_postfix_str(_summary(line, speed), refresh=False)
        self._bar.update(line["step"] - self._bar.n)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


class Lines:
    """One line per `LINE_EVERY` steps, in a log."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._first: tuple[float, int] | None = None  # time and step of the first logged step

    def show(self, line: Mapping[str, Any], speed: Speed) -> None:
        """Prints a line if the step is due."""
        step, now = line["step"], time.monotonic()
        started, first = self._first = self._first or (now, step)
        if step % LINE_EVERY and step != self._total:
            return
        left = (now - started) / max(1, step - first) * (self._total - step)
        text = f"step {step}/{self._total}, {_summary(line, speed)}"
        print(f"{text}, {tqdm.tqdm.format_interval(left)} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Does nothing."""


def make_progress(config: Config, done: int) -> Bar | Lines:
    """Chooses a bar for a terminal, lines otherwise.

    Args:
      config: Settings.
      done: Finished steps.

    Returns:
      An object with `show(line, speed)` and `close()`.
    """
    hidden = config.no_progress or config.quiet
    if hidden or sys.stderr.isatty():
        return Bar(config.steps, done, hidden)
    return Lines(config.steps)


def _summary(line: Mapping[str, Any], speed: Speed) -> str:
    return (
        f"loss {line['loss']:.3f}, {speed}"
        f", max logit {line['max_logit']:.1f}, heads clipped {line['heads_clipped']}"
    )

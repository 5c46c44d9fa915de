"""Stopping on request: the first signal sets a flag, the second ends the process."""

import os
import signal
import types


class StopFlag:
    """True after SIGTERM or SIGINT, so that the running step can end and be saved.

    Attributes:
      number: The first signal received; None before it.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def __bool__(self) -> bool:
        return self.number is not None

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        if self:
            os._exit(128 + number)  # at once: a save that hangs must not keep the process alive
        self.number = number

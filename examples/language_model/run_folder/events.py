"""The TensorBoard event file of a run."""

import pathlib
import time
from collections.abc import Mapping
from typing import Any

from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import RecordWriter

# pyright: reportAttributeAccessIssue=false
# Protobuf creates the classes of its modules when they are imported.


class Events:
    """The event file of one process.

    Not tensorboardX's own writer: on a full disk its thread dies and the caller waits forever.
    """

    def __init__(self, folder: pathlib.Path, first: int) -> None:
        """Opens a file for the steps from `first` on."""
        name = f"events.out.tfevents.{int(time.time()):010d}.{first:010d}"
        self._records = RecordWriter(str(folder / name))
        self._write(file_version="brain.Event:2")
        # TensorBoard then drops these steps from the files of earlier processes.
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=first, session_log=started)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the values of one step by tag; they reach the disk when the buffer is full."""
        each = [summary_pb2.Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        self._write(step=step, summary=summary_pb2.Summary(value=each))

    def sync(self) -> None:
        """Writes the rest of the buffer and waits until it is on disk."""
        self._records.flush()

    def close(self) -> None:
        """Writes the rest of the buffer."""
        self._records.close()

    def _write(self, **content: Any) -> None:
        event = event_pb2.Event(wall_time=time.time(), **content)
        self._records.write(event.SerializeToString())

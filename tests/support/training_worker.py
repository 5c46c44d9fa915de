"""One of the processes of `test_training_processes.py`: the program, with a fault.

training_worker.py FAULT RANK STEP FLAG...: at the end of that step, it happens in that process;
`unreadable` happens when the checkpoint of that step is read.
"""

import os
import signal
import sys

import jax

from examples.language_model import program
from examples.language_model.config import Failed
from examples.language_model.run_folder import checkpoint
from examples.language_model.training import loop, processes


def raise_an_error():
    raise RuntimeError("injected")


def fail():
    raise Failed("step 2: metrics.jsonl could not be written (injected)")


FAULTS = {
    "none": lambda: None,
    "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "sigint": lambda: os.kill(os.getpid(), signal.SIGINT),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "error": raise_an_error,
    "failed": fail,
    "unreadable": lambda: None,
}


def main(fault: str, rank: int, at: int, *flags: str) -> int:
    """Runs the program; its exit code."""
    line = loop.Trainer._line

    def line_and_fault(self, step, state, metrics):
        result = line(self, step, state, metrics)
        if step == at and jax.process_index() == rank:
            FAULTS[fault]()
        return result

    read = checkpoint.Checkpoints._read_digests

    def read_and_fault(self, step):
        if fault == "unreadable" and step == at and jax.process_index() == rank:
            raise checkpoint.Damaged("injected")
        return read(self, step)

    loop.Trainer._line = line_and_fault
    checkpoint.Checkpoints._read_digests = read_and_fault
    processes.HEARTBEAT = 10
    return program.main(flags)


if __name__ == "__main__":
    own_fault, own_rank, own_step, *own_flags = sys.argv[1:]
    sys.exit(main(own_fault, int(own_rank), int(own_step), *own_flags))

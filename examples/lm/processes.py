"""One of several processes: how they start, agree, speak with one voice, and end together."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from lm.config import BadInput, Config
from lm.data import Corpus
from lm.rundir import Run

HEARTBEAT = 100  # seconds without a sign of life after which the others end
# Settings that may differ between processes; that the text is the same, its digest tells.
OWN = ("distributed", "no_progress", "quiet", "data", "out", "given")


def start(config: Config) -> None:
    """Makes the devices of `--simulate-devices` and the connections of `--distributed`.

    Args:
      config: Settings. Nothing may have touched a device before.

    Raises:
      BadInput: if the processes cannot be connected.
    """
    if config.simulate_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.simulate_devices)
    if config.distributed is None or jax.distributed.is_initialized():
        return
    # JAX's own service takes SIGTERM away from Python, and does not know SIGINT.
    jax.config.update("jax_enable_preemption_service", False)
    address, count, rank = config.distributed
    try:
        jax.distributed.initialize(address, count, rank, heartbeat_timeout_seconds=HEARTBEAT)
    except (ValueError, RuntimeError) as error:
        raise BadInput(
            f"argument --distributed: {str(error).splitlines()[0]}; where no cluster tells the"
            " processes of each other, give HOST:PORT,PROCESSES,RANK"
        ) from error


def check_agreement(config: Config, corpus: Corpus) -> None:
    """Refuses, on all processes, settings or texts that are not the same everywhere.

    Args:
      config: Settings of this process.
      corpus: Its text.

    Raises:
      BadInput: if two processes differ.
    """
    if jax.process_count() == 1:
        return
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in OWN}
    text = json.dumps([settings, corpus.sha256], default=str).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    digests: Any = multihost_utils.process_allgather(digest)
    others = [rank for rank, other in enumerate(digests) if (other != digests[0]).any()]
    if others:
        raise BadInput(
            f"argument --distributed: the flags or the text of processes {others} are not those of"
            " process 0; give all the same"
        )


def from_first(make: Callable[[], Run]) -> Run:
    """Opens the run folder in process 0, and tells the others.

    Args:
      make: Opens it; called in process 0 alone, as the folder is one that all processes see.

    Returns:
      What `make` returned, in every process.

    Raises:
      BadInput: in every process, if `make` does.
    """
    if jax.process_count() == 1:
        return make()
    told = {}
    if is_first():
        try:
            run = make()
            told = {"path": str(run.path), "done": run.done}
        except BadInput as error:
            told = {"refused": str(error)}
    told = json.loads(_broadcast(json.dumps(told).encode()))
    if "refused" in told:
        raise BadInput(told["refused"])
    return Run(pathlib.Path(told["path"]), told["done"])


def _broadcast(message: bytes) -> bytes:
    """Gives what process 0 says to all; the others' argument is not looked at."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    content = np.frombuffer(message, np.uint8) if is_first() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(content)).astype(np.uint8).tobytes()


class AnyWantsToStop:
    """Says in all processes at the same step whether one of them has been asked to stop.

    A maximum over all devices: it is started at each call, and read at the next, so that no step
    waits for it.
    """

    def __init__(self, wish: Callable[[], Any], mesh: Mesh) -> None:
        self._wish = wish
        flat = Mesh(mesh.devices.reshape(-1), ("all",))
        self._each = NamedSharding(flat, P("all"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(flat, P()))
        self._before: Any = False

    def __call__(self) -> bool:
        """Says what the wishes were when it was called before."""
        local = np.full(len(self._each.addressable_devices), bool(self._wish()))
        wishes = jax.make_array_from_process_local_data(self._each, local)
        before, self._before = self._before, self._largest(wishes)
        return bool(before)


def is_first() -> bool:
    """Says whether this is process 0, which alone speaks to stdout."""
    return jax.process_index() == 0


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Says in one line what was raised, and leaves at once, if other processes depend on this."""
    try:
        yield
    except BadInput:  # in all processes
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        rank, count = jax.process_index(), jax.process_count()
        print(
            f"train_lm.py: process {rank} of {count} has to end, and so will all: {text};"
            " start all again with --resume",
            file=sys.stderr,
        )
        leave(1)


def leave(code: int) -> int:
    """Returns the exit code of success; leaves at once with another, if there are others.

    Python's own end would wait until all processes come to theirs, and they wait for this one.
    """
    if code and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code

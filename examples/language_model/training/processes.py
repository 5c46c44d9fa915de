"""Training on several processes: how they connect, check their settings, share results and exit."""

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

from examples.language_model.config import NAME, BadInput, Config
from examples.language_model.data import Corpus
from examples.language_model.run_folder.opening import Run

HEARTBEAT = 100  # seconds without a heartbeat of one process after which the others exit
# Settings that may differ between processes; of the text, the digest is compared.
OWN = ("distributed", "no_progress", "quiet", "data", "out", "given")


def start(config: Config) -> None:
    """Creates the devices of `--simulate-devices` and connects the processes of `--distributed`.

    Args:
      config: Settings. No JAX backend may be initialized yet.

    Raises:
      BadInput: if the processes cannot be connected.
    """
    if config.simulate_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.simulate_devices)
    if config.distributed is None or jax.distributed.is_initialized():
        return
    # JAX's own service takes SIGTERM away from Python, and ignores SIGINT.
    jax.config.update("jax_enable_preemption_service", False)
    address, count, rank = config.distributed
    try:
        jax.distributed.initialize(address, count, rank, heartbeat_timeout_seconds=HEARTBEAT)
    except (ValueError, RuntimeError) as error:
        raise BadInput(
            f"argument --distributed: {str(error).splitlines()[0]}; outside of a cluster that JAX"
            " detects, pass HOST:PORT,PROCESSES,RANK"
        ) from error


def check_agreement(config: Config, corpus: Corpus) -> None:
    """Checks that all processes have the same settings and text.

    Args:
      config: Settings of this process.
      corpus: Its text.

    Raises:
      BadInput: on every process, if two processes differ.
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
            f"argument --distributed: processes {others} have other flags or another text than"
            " process 0; pass the same to all"
        )


def open_on_first(open_run: Callable[[], Run]) -> Run:
    """Opens the run folder on process 0 and sends the result to the others.

    Args:
      open_run: Opens it; called on process 0 only, as all processes share the folder.

    Returns:
      The result of `open_run`, on every process.

    Raises:
      BadInput: on every process, if `open_run` raises it.
    """
    if jax.process_count() == 1:
        return open_run()
    message = {}
    if is_first():
        try:
            run = open_run()
            message = {"path": str(run.path), "complete": run.complete}
        except BadInput as error:
            message = {"error": str(error)}
    message = json.loads(_broadcast(json.dumps(message).encode()))
    if "error" in message:
        raise BadInput(message["error"])
    return Run(pathlib.Path(message["path"]), message["complete"])


def _broadcast(message: bytes) -> bytes:
    """Returns the message of process 0 on every process."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    content = np.frombuffer(message, np.uint8) if is_first() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(content)).astype(np.uint8).tobytes()


class AnyShouldStop:
    """Returns true on all processes at the same step, once one of them should stop.

    A maximum over all devices: each call starts one and reads the result of the call before, so no
    step waits for it.
    """

    def __init__(self, should_stop: Callable[[], Any], mesh: Mesh) -> None:
        self._should_stop = should_stop
        flat = Mesh(mesh.devices.reshape(-1), ("all",))
        self._sharding = NamedSharding(flat, P("all"))
        self._maximum = jax.jit(jnp.max, out_shardings=NamedSharding(flat, P()))
        self._pending: Any = False

    def __call__(self) -> bool:
        """Returns whether a process should stop as of the call before."""
        local = np.full(len(self._sharding.addressable_devices), bool(self._should_stop()))
        flags = jax.make_array_from_process_local_data(self._sharding, local)
        result, self._pending = self._pending, self._maximum(flags)
        return bool(result)


def is_first() -> bool:
    """Returns whether this is process 0, the only one that prints to stdout."""
    return jax.process_index() == 0


@contextlib.contextmanager
def exit_together() -> Iterator[None]:
    """With several processes, prints an error as one line and exits; the others follow."""
    try:
        yield
    except BadInput:  # raised on all processes
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        rank, count = jax.process_index(), jax.process_count()
        print(
            f"{NAME}: process {rank} of {count} failed, and all will exit: {text};"
            " start all of them again with --resume",
            file=sys.stderr,
        )
        exit_code(1)


def exit_code(code: int) -> int:
    """Returns an exit code; with several processes, a code other than 0 exits immediately.

    Python's own exit would wait until all processes reach theirs, and they wait for this one.
    """
    if code and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code

"""Processes that run at the same time, on one machine."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]


def run_together(commands, folder, limit):
    """Runs commands at the same time; fails with what they printed if one fails or takes long."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    logs = [folder / f"{rank}.log" for rank in range(len(commands))]
    processes = []
    try:
        for command, log in zip(commands, logs, strict=True):
            # To a file: a full pipe would stop the process. Its own session: its children too end.
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, *command],
                    stdout=output,
                    stderr=output,
                    env=environment,
                    start_new_session=True,
                )
            processes.append(process)
        codes = wait(processes, time.monotonic() + limit)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    printed = "\n".join(f"-- {log.name}\n{log.read_text(errors='replace')}" for log in logs)
    assert codes == [0] * len(codes), f"exit codes {codes} after at most {limit} s\n{printed}"


def wait(processes, end):
    """Gives the exit codes when all have ended, one has failed, or the time is over."""
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            break
        time.sleep(0.05)
    return [process.poll() for process in processes]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

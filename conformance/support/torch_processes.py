"""Processes that torchrun's variables join, on this machine's CPU."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from places import SUPPORT
from ports import free_port


def run_processes(size: int, worker: str, arguments: Sequence[str], out: Path) -> None:
    """Starts `size` processes of a script of conformance/support and waits; their output goes into `out`.

    Raises: AssertionError: one that fails or hangs, with the end of what each printed.
    """
    path = os.pathsep.join([str(SUPPORT), *(p for p in sys.path if p)])
    shared = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if size > 1:
        shared |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(SUPPORT / worker), *arguments]
    logs = [open(out / f"rank{rank}.log", "w+") for rank in range(size)]  # noqa: SIM115 - closed below
    workers = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(size)
    ]
    try:
        statuses = [process.wait(timeout=240) for process in workers]
    except subprocess.TimeoutExpired:
        statuses = [process.poll() for process in workers]
    finally:
        for process in workers:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    texts = "\n".join((out / f"rank{rank}.log").read_text()[-3000:] for rank in range(size))
    assert statuses == [0] * size, f"workers ended with {statuses}:\n{texts}"

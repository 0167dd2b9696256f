"""The guard of a worker: a small process that ends everything that the worker started, when the worker must end.

The worker stays a child of the run. Its guard is a child of neither, and waits for the worker's death, and for the
run's. On Linux it then finds what the worker started by a mark in the environment, in separate sessions too;
elsewhere it ends the worker's process group.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import time

MARK = "GVPO_REWARD_WORKER"  # environment variable, unique to a worker, inherited by what it starts
_PATIENCE = 5.0  # seconds for killed processes to be gone; one in the kernel's hands may never be
_EXECUTING = 0.25  # seconds for a process without an environment to have one: it may be within exec
_KERNEL = 0x200000  # flag of a kernel thread, in /proc/PID/stat


def start_guard(closed: tuple[int, ...], folder: str = "") -> None:
    """Starts the guard of this process. It acts when this process is gone, and when the run says so or is gone.

    Standard input is the run's channel to the guard: data, or its end. The guard keeps the standard error open while
    it works: who reads that sees its end when everything is gone.

    Args:
      closed: descriptors that the guard does not keep.
      folder: removed at the end.
    """
    worker = os.getpid()
    between = os.fork()
    if between:
        os.waitpid(between, 0)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.close(nothing)
        return
    if os.fork():
        os._exit(0)
    try:
        os.setsid()
        for descriptor in (1, *closed):
            os.close(descriptor)
        _wait(worker)
        _end_all(worker)
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os._exit(0)


def _wait(worker: int) -> None:
    watched = [0]
    with contextlib.suppress(AttributeError, OSError):  # not on every system
        watched.append(os.pidfd_open(worker))
    while not select.select(watched, [], [], 60.0 if len(watched) > 1 else 0.1)[0]:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return


def _end_all(worker: int) -> None:
    deadline = time.monotonic() + _PATIENCE
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker, signal.SIGKILL)
    if sys.platform != "linux":
        return
    mark = f"{MARK}={os.environ[MARK]}".encode()
    seen = time.monotonic()  # the last time that one was found
    while (now := time.monotonic()) < deadline:
        living, unknown = _marked(mark)
        for process in living:
            seen = now
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        if not living and (not unknown or now - seen > _EXECUTING):
            return
        time.sleep(0.002)


def _marked(mark: bytes) -> tuple[list[int], bool]:
    """Other processes with this mark, and whether one has no environment to tell by: within exec it has none yet."""
    pids, unknown, this_pid = [], False, os.getpid()
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != this_pid:
            with contextlib.suppress(OSError), open(f"/proc/{entry}/environ", "rb") as file:
                environment = file.read()
                if mark in environment.split(b"\0"):
                    pids.append(int(entry))
                unknown |= not environment and _runs_a_program(entry)
    return pids, unknown


def _runs_a_program(entry: str) -> bool:
    """Neither a zombie nor a kernel thread."""
    with open(f"/proc/{entry}/stat", "rb") as file:
        state, *_, flags = file.read().rpartition(b")")[2].split()[:7]
    return state not in (b"Z", b"X") and not int(flags) & _KERNEL

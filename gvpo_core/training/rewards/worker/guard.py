"""The guard of a worker: a small process that kills everything the worker started when the worker must end.

The worker is a child of the run. The guard is a child of neither, and waits until the worker or the run has ended. On
Linux it then finds the worker's descendants by a mark in their environment, also in other sessions; elsewhere it kills
the worker's process group.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import time

MARK = "GVPO_REWARD_WORKER"  # environment variable with a value unique to a worker; its descendants inherit it
_PATIENCE = 5.0  # seconds to wait until killed processes are gone; one blocked in the kernel may never be
_EXECUTING = 0.25  # seconds to wait for a process without an environment: it may be within exec
_KERNEL = 0x200000  # flag of a kernel thread, in /proc/PID/stat


def start_guard(closed: tuple[int, ...], folder: str = "") -> None:
    """Starts the guard of this process. It acts when this process ends, or when the run ends or asks for it.

    Standard input is the run's channel to the guard: data or end of file. The guard keeps standard error open while it
    works, so a reader of standard error gets end of file when everything is gone.

    Args:
      closed: descriptors that the guard closes.
      folder: a folder to remove at the end.
    """
    worker = os.getpid()
    intermediate = os.fork()
    if intermediate:
        os.waitpid(intermediate, 0)
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
    seen = time.monotonic()  # time at which a marked process was last found
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
    """Other processes with this mark, and whether any process has no environment yet because it is within exec."""
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
    """Whether a process is neither a zombie nor a kernel thread."""
    with open(f"/proc/{entry}/stat", "rb") as file:
        state, *_, flags = file.read().rpartition(b")")[2].split()[:7]
    return state not in (b"Z", b"X") and not int(flags) & _KERNEL

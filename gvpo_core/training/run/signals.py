"""Signals of a run: on a request to stop, it finishes its step, saves and exits.

SIGINT (Ctrl-C), SIGTERM, SIGQUIT                  finish the step, save, exit; a second Ctrl-C or SIGQUIT: exit at once
all others that would end the process              the same, also if repeated: warnings before the end of a job (SLURM),
(SIGUSR1, SIGXCPU, SIGALRM, SIGPWR, real-time)     from a watchdog, or from a container or machine that shuts down
SIGHUP                                             ignored: the run continues without its terminal
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from gvpo_core.training.rewards.worker.job_signals import TERMINATING
from gvpo_core.training.terminal.output import show_progress

_ASKS = ("SIGINT", "SIGTERM", "SIGQUIT")  # from a person or a scheduler: the run replaces existing handlers
_AT_ONCE = ("SIGINT", "SIGQUIT")  # not SIGTERM: a launcher forwards its SIGTERM, and the scheduler may send another


def _numbers(names: tuple[str, ...]) -> set[int]:
    return {int(getattr(signal, name)) for name in names if hasattr(signal, name)}


def in_main_thread() -> bool:
    """Whether this is the main thread, in which alone Python sets signal handlers."""
    return threading.current_thread() is threading.main_thread()


class StopRequest:
    """Inside `with`, `signal` is the number of the first signal that asks the run to stop; 0 until then.

    For signals other than SIGINT, SIGTERM and SIGQUIT, handlers that the program has set (also SIG_IGN) stay.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if in_main_thread():
            for number in _numbers(_ASKS):
                self._before[number] = signal.signal(number, self._handle)
            for number in sorted(TERMINATING - _numbers(_ASKS)):  # SIGXCPU comes every second until the hard limit
                if signal.getsignal(number) is signal.SIG_DFL:
                    handler = _hung_up if number == getattr(signal, "SIGHUP", None) else self._handle
                    self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            if number in _numbers(_ASKS) or signal.getsignal(number) in (self._handle, _hung_up):
                signal.signal(number, handler)  # else another handler was set meanwhile, for example by a profiler

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number in _numbers(_AT_ONCE):
            raise KeyboardInterrupt
        if self.signal:
            return
        self.signal = number
        again = "Ctrl-C again" if number == signal.SIGINT else "Ctrl-C"
        show_progress(f"\nStopping after this step and saving. Press {again} to quit now.")


def _hung_up(number: int, frame: FrameType | None) -> None:
    """Handles SIGHUP: the terminal is gone. The run continues, and its prints are dropped."""


@contextlib.contextmanager
def without_hang_up() -> Iterator[None]:
    """Inside `with`, SIGHUP does not end the process. Keeps a handler that the program has set."""
    if not hasattr(signal, "SIGHUP") or not in_main_thread() or signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGHUP, _hung_up)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@contextlib.contextmanager
def ended_by_exit() -> Iterator[None]:
    """Inside `with`, the first signal that would end the process raises SystemExit, so that partial files can be
    removed. Later signals do nothing: a scheduler's SIGTERM follows its SIGUSR1.
    """
    ending = False

    def end(number: int, frame: object) -> None:
        nonlocal ending
        if not ending:
            ending = True
            raise SystemExit(128 + number)

    handled = [n for n in sorted(TERMINATING) if signal.getsignal(n) is signal.SIG_DFL] if in_main_thread() else []
    for number in handled:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)

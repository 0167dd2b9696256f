"""Signals of a run: asked to stop, it finishes its step, saves and leaves.

SIGINT (Ctrl-C), SIGTERM, SIGQUIT                  finish the step, save, leave; Ctrl-C or SIGQUIT once more: at once
every other one that would end the process        the same, however often: warnings of a job's end, as SLURM sends, a
(SIGUSR1, SIGXCPU, SIGALRM, SIGPWR, real-time)     watchdog's, and of a container or machine that shuts down
SIGHUP                                             ignored: the run survives its terminal
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from gvpo_core.training.rewards.worker.job_signals import TERMINATING
from gvpo_core.training.terminal.output import show_progress

_ASKS = ("SIGINT", "SIGTERM", "SIGQUIT")  # by a person or a scheduler: the run handles them even if others do
_AT_ONCE = ("SIGINT", "SIGQUIT")  # not SIGTERM: a launcher forwards its SIGTERM, and the scheduler may send another


def _numbers(names: tuple[str, ...]) -> set[int]:
    return {int(getattr(signal, name)) for name in names if hasattr(signal, name)}


def in_main_thread() -> bool:
    """Whether signals can be handled from here."""
    return threading.current_thread() is threading.main_thread()


class StopRequest:
    """Inside `with`, `signal` is the number of the first signal that asks the run to stop, 0 until then.

    A handler that the program has set for a warning or SIGHUP, or that it ignores them, stays.
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
                signal.signal(number, handler)  # else somebody set one meanwhile, as a profiler does

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number in _numbers(_AT_ONCE):
            raise KeyboardInterrupt
        if self.signal:
            return
        self.signal = number
        again = "Ctrl-C again" if number == signal.SIGINT else "Ctrl-C"
        show_progress(f"\nStopping after this step and saving. Press {again} to quit now.")


def _hung_up(number: int, frame: FrameType | None) -> None:
    """The terminal is gone: what is still printed goes nowhere, and the run continues."""


@contextlib.contextmanager
def without_hang_up() -> Iterator[None]:
    """Inside `with`, a terminal that is gone ends nothing, unless the program handles SIGHUP itself."""
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
    """Inside `with`, the first signal that would end the process raises SystemExit, so that what is half done can be
    removed. Those after it do nothing: a scheduler's SIGTERM follows its SIGUSR1.
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

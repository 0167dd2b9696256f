"""Ctrl-C and SIGTERM: asked once, a run finishes its step, saves and leaves; asked twice, it leaves at once."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from gvpo_core.training.watch.output import Forgiving


class StopRequest:
    """Inside `with`, `signal` is the number of the first SIGINT or SIGTERM, 0 until then."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    @property
    def exit_status(self) -> int:
        """The shell's convention: 130 for Ctrl-C, 143 for SIGTERM, 0 without a request."""
        return 128 + self.signal if self.signal else 0

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        said = "\nstopping after this step, then saving; once more to leave at once"
        print(said, file=Forgiving(sys.stdout), flush=True)

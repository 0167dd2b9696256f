"""Checks of speed and memory. Two equal runs may differ in them."""

import math
from collections import deque
from collections.abc import Iterator

from gvpo_core.training.watch.checks.recent import START, Recent, number
from gvpo_core.training.watch.usual import USUAL, WINDOW, median
from gvpo_core.training.watch.verdict import WATCH, Alert


class MachineChecks:
    """Alerts `throughput` and `memory`."""

    def __init__(self) -> None:
        self._machine: deque[tuple[float, float]] = deque(maxlen=USUAL + WINDOW)  # tokens/s, seconds
        self._memory: deque[tuple[float, float, int]] = deque(maxlen=50)  # highest so far, tokens, 1 if it rose

    def alerts(self, recent: Recent) -> Iterator[Alert]:
        """The alerts after the last step of `recent`."""
        for check in (self._throughput, self._memory_growth):
            if alert := check(recent):
                yield alert

    def _throughput(self, recent: Recent) -> Alert | None:
        record = recent.last[-1]
        speed, seconds = number(record, "tokens_per_second"), number(record, "seconds/step")
        if math.isfinite(speed) and math.isfinite(seconds):
            self._machine.append((speed, seconds))
        if len(self._machine) < START + WINDOW:
            return None
        rows = list(self._machine)
        (speed, step_seconds), (usual_speed, usual_seconds) = (
            (median([s for s, _ in part]), median([t for _, t in part])) for part in (rows[-WINDOW:], rows[:-WINDOW])
        )
        # 0.5 s: the time of very short steps varies.
        if speed >= 0.5 * usual_speed or step_seconds < 1.5 * usual_seconds + 0.5:
            return None
        seen = (
            f"{speed:.3g} tokens/s, usually {usual_speed:.3g}; {step_seconds:.3g} s a step, usually {usual_seconds:.3g}"
        )
        advice = "compare the seconds of each phase: another job on this machine, a slow reward, swapping?"
        return Alert("throughput", WATCH, seen, advice)

    def _memory_growth(self, recent: Recent) -> Alert | None:
        record, size = recent.last[-1], recent.now("memory/peak")
        if not math.isfinite(size):
            return None
        highest = self._memory[-1][0] if self._memory else size
        length = number(record, "length/mean")
        self._memory.append((max(highest, size), length, int(size > highest)))
        (first, short, _), (last, long, _), rises = self._memory[0], self._memory[-1], sum(m[2] for m in self._memory)
        # In a healthy run the peak rises ever more rarely. Longer responses need more memory.
        if len(self._memory) < 50 or rises < 20 or last < 1.05 * first or long > 1.1 * short:
            return None
        seen = f"peak memory grew from {first / 2**30:.3g} to {last / 2**30:.3g} GiB, in {rises} of the last 50 steps"
        return Alert("memory", WATCH, seen, "look for a memory leak (a reward, a cache) before memory runs out")

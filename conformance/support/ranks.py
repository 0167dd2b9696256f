"""Several ranks of the table policy in one process: a thread each, with a gather that meets at a barrier."""

import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gvpo_core.training.config import OptimizerConfig
from gvpo_core.training.policy import Batch, Coefficients, Update
from gvpo_core.training.policy.table import TablePolicy


class RankedTable(TablePolicy):
    """A table whose gradient is summed over ranks."""

    def __init__(self, rank: int, meeting: "Meeting", table: Mapping[str, Any], optimizer: OptimizerConfig) -> None:
        super().__init__(table, optimizer)
        self.rank, self.world_size, self.meeting = rank, meeting.size, meeting

    def gather(self, values: np.ndarray) -> np.ndarray:
        return np.concatenate(self.meeting.exchange(self.rank, values))

    def update(self, batch: Batch, coefficients: Coefficients, *, scored: np.ndarray | None = None) -> Update:
        """Every rank steps along all rows, which it learns from the others: the sum of the ranks' gradients."""
        logprobs = self.logprobs(batch) if scored is None else scored
        c = self.gather(coefficients(logprobs, np.arange(len(batch))))
        rows = self.meeting.exchange(self.rank, batch)
        whole = Batch(
            *([x for b in rows for x in getattr(b, n)] for n in ("prompts", "responses", "groups")),
            later=[segments for b in rows for segments in (b.later or [()] * len(b))],
        )
        update = super().update(whole, lambda s, r: c)
        return Update(logprobs, update.gradient_norm, update.learning_rate, len(batch), update.peak_memory)


class Meeting:
    """Where `size` threads hand in a value each and all get the list."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=60)
        self._values: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def abandon(self) -> None:
        self._barrier.abort()


class Stops:
    """In place of `StopRequest`, for ranks that are threads and get no signals: SIGTERM once `heard` is set."""

    def __init__(self, heard: threading.Event) -> None:
        self._heard = heard

    @property
    def signal(self) -> int:
        return signal.SIGTERM if self._heard.is_set() else 0

    def __enter__(self) -> "Stops":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def run_ranks(
    size: int, work: Callable[[RankedTable], Any], table: Mapping[str, Any], optimizer: OptimizerConfig
) -> list[RankedTable]:
    """Runs `work` on every rank and returns their policies; the first rank's error is raised."""
    meeting = Meeting(size)
    policies = [RankedTable(rank, meeting, table, optimizer) for rank in range(size)]
    errors: list[BaseException] = []

    def one(policy: RankedTable) -> None:
        try:
            work(policy)
        except BaseException as e:
            errors.append(e)
            meeting.abandon()

    threads = [threading.Thread(target=one, args=(p,)) for p in policies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return policies

"""Recorded groups of a stream, such as an IterableDataset. Only a buffer of rows is held in memory.

The order depends only on the seed and the epoch, so a resumed run sees the same groups. It reads the stream again up to
its place.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from gvpo_core.training.config import Config
from gvpo_core.training.data import NothingLeft, column_names
from gvpo_core.training.policy import Policy
from gvpo_core.training.recorded.groups import Groups, encode_groups, joined
from gvpo_core.training.recorded.rows import Recorded, recorded_rows
from gvpo_core.training.rows import DataError, Row


class Stream:
    """Rows that are read again in each epoch; `head` holds the first ones."""

    def __init__(self, rows: Iterable[Row], head: list[Row], name: str) -> None:
        self.rows, self.head, self.name = rows, head, name

    def epoch(self, epoch: int, seed: int, shuffle: bool) -> Iterator[tuple[int, Row]]:
        """Yields the rows of an epoch with their numbers: in order, or drawn from a buffer refilled by the next row."""
        rows = enumerate(self.rows)
        if not shuffle:
            yield from rows
            return
        rng = np.random.default_rng(np.random.SeedSequence((seed, epoch)))
        buffer = list(islice(rows, len(self.head)))
        for row in rows:
            i = int(rng.integers(len(buffer)))
            chosen, buffer[i] = buffer[i], row
            yield chosen
        for i in rng.permutation(len(buffer)):
            yield buffer[i]


def stream_of(source: object, name: str, size: int) -> Stream | None:
    """Returns a stream if the source has no length, can be read repeatedly and has more than `size` rows; else None."""
    if not isinstance(source, Iterable) or hasattr(source, "__len__") or iter(source) is source:
        return None
    rows = source.with_format(None) if hasattr(source, "with_format") else source
    head = list(islice(iter(rows), size + 1))
    return Stream(rows, head[:size], name) if len(head) > size else None


class StreamedGroups:
    """The usable groups of a stream, in order, over all epochs."""

    def __init__(self, stream: Stream, recorded: Recorded, config: Config, smallest: int) -> None:
        """
        Args:
          recorded: the rows of the stream's head. All rows must have their shape.
        """
        self._stream, self._recorded, self._config, self._smallest = stream, recorded, config, smallest
        self._columns = column_names(stream.head)
        self._place = 0  # number of the next group
        self._groups: Iterator[Groups] = iter(())  # groups from that place on
        self._policy: Policy | None = None

    def at(self, policy: Policy, place: int, size: int) -> Groups:
        """Returns `size` groups, starting at number `place`."""
        if place < self._place or policy is not self._policy:
            self._place, self._policy, self._groups = 0, policy, self._all(policy)
        for _ in islice(self._groups, place - self._place):
            pass
        self._place = place + size
        return joined([*islice(self._groups, size)], self._recorded)

    def _all(self, policy: Policy) -> Iterator[Groups]:
        """Yields groups of one row each, endlessly. Raises: DataError: a bad row, or an epoch without a usable row."""
        data, seed = self._config.data, self._config.run.seed
        epoch = 0
        while True:
            usable = 0
            for number, row in self._stream.epoch(epoch, seed, data.shuffle):
                recorded = recorded_rows(
                    [row],
                    self._recorded.shape,
                    self._stream.name,
                    prompt=data.prompt,
                    first=number,
                    columns=self._columns,
                )
                try:
                    groups = encode_groups(policy, recorded, self._config, self._stream.name, smallest=self._smallest)
                except NothingLeft:
                    continue
                usable += 1
                yield groups
            if not usable:
                raise DataError(f"{self._stream.name}: no group of the stream has {self._smallest} scored responses")
            epoch += 1

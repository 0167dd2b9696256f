"""Rows of few shapes. A row of the device holds the rows of several prompts, one after another, none of which sees
another: all rows of a batch have one length, whatever the lengths of its responses are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jax.sharding import Mesh

from gvpo_core.training.policy import Batch, layout
from gvpo_jax import mesh as meshes
from gvpo_jax import ranks

SMALLEST = 32  # tokens of a row at least
SPREAD = 8  # predicted tokens of a row are padded to a multiple of this part of it
Unit = list[layout.Row]  # what is kept in one micro-batch
Shape = tuple[int, int, int]  # rows, their tokens, and those predicted
Place = tuple[int, int]  # a row of the device, and where in it one starts


@dataclass(frozen=True)
class ShardSplitting(layout.Splitting):
    """A batch as units: rows, or whole groups. `plan` fills micro-batches with them. Budgets are those of a shard."""

    shards: int = 1  # of the rows of a process

    def rows(self, batch: Batch, chosen: Sequence[int] | None = None) -> list[Unit]:
        """Each row of the chosen responses (default all) by itself."""
        return [[row] for row in self._rows(batch, self.responses, chosen)]

    def groups(self, batch: Batch) -> tuple[list[Unit], list[int]]:
        """Each group that one micro-batch holds, and the responses of all others."""
        members: dict[int, list[int]] = {}
        for i, label in enumerate(batch.groups):
            members.setdefault(label, []).append(i)
        fitting: list[Unit] = []
        rest: list[int] = []
        for group in members.values():
            unit = self._rows(batch, 0, group)
            few = not self.responses or len(group) <= self.responses * self.shards
            if few and fits(unit, _length(self.tokens, 0), self.shards):
                fitting.append(unit)
            else:
                rest.extend(group)
        return fitting, rest

    def _rows(self, batch: Batch, responses: int, chosen: Sequence[int] | None) -> Unit:
        return layout.plan_rows(
            batch,
            packed=self.packed,
            tokens=self.tokens,
            responses=responses,
            hidden_size=self.hidden_size,
            rows=chosen,
        )


@dataclass(frozen=True)
class Rows:
    """One micro-batch as padded arrays: few different shapes, so that a run compiles few programs."""

    arrays: dict[str, np.ndarray]  # ids, positions, segments, last (B, T), predict, targets (B, P), int32
    source: layout.Arrays | None  # None: rows that only keep step with other processes
    places: tuple[np.ndarray, np.ndarray] = field(default=(np.zeros(0, np.int64),) * 2)  # (n,) row and slot of targets

    @property
    def shape(self) -> Shape:
        """(B, T, P): rows, tokens and predicted tokens of a row."""
        return (*self.arrays["ids"].shape, self.arrays["targets"].shape[1])

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(r,) float64: the log-prob of each response, from the (B, P) values."""
        assert self.source is not None
        return self.source.sums(values[self.places])

    def spread(self, factors: np.ndarray) -> np.ndarray:
        """(B, P) float32: at each target the sum of the factors of its responses, 0 elsewhere."""
        spread = np.zeros(self.arrays["targets"].shape, np.float32)
        if self.source is not None:
            spread[self.places] = self.source.spread(factors)
        return spread


@dataclass
class Filling:
    """A micro-batch while it is filled."""

    free: list[int]  # tokens of each of its rows
    rows: Unit
    places: list[Place]
    responses: int = 0

    @property
    def used(self) -> int:
        """Rows that hold anything."""
        return max((row for row, _ in self.places), default=-1) + 1

    def take(self, unit: Unit, length: int) -> bool:
        """Adds the unit if there is room for all of it."""
        free, places = list(self.free), []
        for row in unit:
            at = next((b for b, room in enumerate(free) if room >= row.length), None)
            if at is None:
                return False
            places.append((at, length - free[at]))
            free[at] -= row.length
        self.free = free
        self.rows = self.rows + unit
        self.places = self.places + places
        self.responses += sum(len(row.responses) for row in unit)
        return True


def bucket(n: int) -> int:
    """The next of 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, ...: past 128 at most a fifth is padding."""
    step = max(SMALLEST, (1 << max(0, n - 1).bit_length()) // 8)
    return max(SMALLEST, -(-n // step) * step)


def rows_bucket(n: int, shards: int) -> int:
    """The next power of two of rows for each of the shards."""
    return shards * (1 << max(0, math.ceil(math.log2(max(1, -(-n // shards))))))


def fits(unit: Unit, length: int, rows: int) -> bool:
    """Whether a micro-batch of so many rows of `length` tokens holds the unit."""
    return Filling([length] * rows, [], []).take(unit, length)


def fill(units: Sequence[Unit], length: int, rows: int, responses: int) -> list[Filling]:
    """Micro-batches of at most `rows` rows of `length` tokens that hold the units, the largest first; each unit `fits`.

    Args:
      responses: of a micro-batch at most, unless a single unit has more; 0: no limit.
    """
    made: list[Filling] = []
    for unit in sorted(units, key=lambda unit: sum(row.length for row in unit), reverse=True):
        longest, added = unit[0].length, sum(len(row.responses) for row in unit)
        for filling in made:
            few = not responses or filling.responses + added <= responses
            if few and max(filling.free) >= longest and filling.take(unit, length):
                break
        else:
            made.append(Filling([length] * rows, [], []))
            made[-1].take(unit, length)
    return made


def plan(batch: Batch, units: Sequence[Unit], splitting: layout.Splitting, mesh: Mesh) -> list[Rows]:
    """Micro-batches that hold the units, of the same shapes in the same order on every process.

    Rows have the length of the budget, halved as often as that costs the least; a shard has as many as the budget
    holds. A row that is longer than the budget is alone in its shard.
    """
    shards = meshes.batch_shards(mesh)
    long = sorted((u for u in units if u[0].length > _length(splitting.tokens, 0)), key=_longest, reverse=True)
    short = [u for u in units if u[0].length <= _length(splitting.tokens, 0)]
    halvings = -ranks.most(-_halvings(short, splitting, shards))[0]
    length = _length(splitting.tokens, halvings)
    micro = [(length, filling) for filling in _filled(short, splitting, shards, halvings)]
    alone = [long[start : start + shards] for start in range(0, len(long), shards)]
    apart = [
        Filling([], [row for u in us for row in u], [(at, 0) for at, u in enumerate(us) for _ in u]) for us in alone
    ]
    counts = ranks.most(len(micro), len(apart))
    padded = [*apart, *[None] * (counts[1] - len(apart)), *(f for _, f in micro), *[None] * (counts[0] - len(micro))]
    laid_out = [layout.arrays(batch, filling.rows) if filling else None for filling in padded]
    lengths = [
        *[max(bucket(_longest(f.rows)) if f else 0, length) for f in padded[: counts[1]]],
        *[length] * counts[0],
    ]
    wanted = []
    for filling, arrays, tokens in zip(padded, laid_out, lengths, strict=True):
        predicted = 1 if filling is None or arrays is None else _most_predicted(filling, arrays)
        wanted += [1 if filling is None else -(-filling.used // shards), tokens, predicted]
    if not wanted:
        return []  # on any process
    agreed = ranks.most(*wanted)
    predicted = max(agreed[2 + 3 * counts[1] :: 3], default=1)
    planned = []
    for number, (filling, arrays) in enumerate(zip(padded, laid_out, strict=True)):
        rows, tokens, needed = agreed[3 * number : 3 * number + 3]
        needed = needed if number < counts[1] else predicted
        part = max(SMALLEST, -(-tokens // SPREAD))
        shape = (rows_bucket(rows * shards, shards), tokens, -(-needed // part) * part)
        planned.append(lay(arrays, filling.rows if filling else [], filling.places if filling else [], shape))
    return planned


def _longest(unit: Unit) -> int:
    return max(row.length for row in unit)


def _length(tokens: int, halvings: int) -> int:
    return max(SMALLEST, -(-tokens // (SMALLEST << halvings)) * SMALLEST)


def _filled(units: Sequence[Unit], splitting: layout.Splitting, shards: int, halvings: int) -> list[Filling]:
    return fill(units, _length(splitting.tokens, halvings), shards << halvings, splitting.responses * shards)


def _halvings(units: Sequence[Unit], splitting: layout.Splitting, shards: int) -> int:
    """How often the budget is halved for the length of a row: tokens times their cost is the least."""
    longest = max(map(_longest, units), default=SMALLEST)
    most = 0
    while _length(splitting.tokens, most + 1) >= longest and _length(splitting.tokens, most) > SMALLEST:
        most += 1
    costs = {}
    for halvings in range(most, max(-1, most - 3), -1):
        length, rows = _length(splitting.tokens, halvings), shards << halvings
        if not all(fits(unit, length, rows) for unit in units):
            continue
        made = _filled(units, splitting, shards, halvings)
        tokens = sum(rows_bucket(filling.used, shards) for filling in made) * length
        attention = length / (6 * splitting.hidden_size) if splitting.hidden_size else 0.0
        costs[halvings] = tokens * (1 + attention)
    best = min(costs.values(), default=0.0)
    return next((h for h, cost in costs.items() if cost <= 1.1 * best), 0)  # the first: few lengths in a run


def _most_predicted(filling: Filling, arrays: layout.Arrays) -> int:
    owner = np.asarray([row for row, _ in filling.places])[arrays.predict // arrays.ids.shape[1]]
    return int(np.bincount(owner).max()) if len(owner) else 1


def lay(arrays: layout.Arrays | None, rows: Sequence[layout.Row], places: Sequence[Place], shape: Shape) -> Rows:
    """The rows at their places in arrays of a shape; what pads them predicts nothing and is seen by itself alone."""
    b, t, p = shape
    laid = {name: np.zeros((b, t), np.int32) for name in ("ids", "positions")}
    laid |= {name: np.full((b, t), -1, np.int32) for name in ("segments", "last")}
    laid |= {name: np.zeros((b, p), np.int32) for name in ("predict", "targets")}
    laid["positions"][:] = np.arange(t)
    if arrays is None:
        return Rows(laid, None)
    before = np.zeros(b, np.int64)  # segments in each of the device's rows so far
    for number, (row, (at, start)) in enumerate(zip(rows, places, strict=True)):
        here = (at, slice(start, start + row.length))
        laid["ids"][here] = arrays.ids[number, : row.length]
        laid["positions"][here] = arrays.positions[number, : row.length]
        laid["segments"][here] = arrays.segments[number, : row.length] + before[at]
        laid["last"][here] = arrays.last[number, : row.length] + before[at]
        before[at] += arrays.last[number, 0] + 1
    width = arrays.ids.shape[1]
    owner, starts = (np.asarray(column, np.int64)[arrays.predict // width] for column in zip(*places, strict=True))
    order = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=b)
    slot = np.zeros(len(owner), np.int64)
    slot[order] = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    laid["predict"][owner, slot] = starts + arrays.predict % width
    laid["targets"][owner, slot] = arrays.targets
    return Rows(laid, arrays, (owner, slot))

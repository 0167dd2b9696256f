"""Plans rows of few shapes. A row on the device holds the rows of several prompts, one after another; they do not see
each other. So all rows of a batch have one length, whatever the lengths of its responses."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jax.sharding import Mesh

from gvpo_core.training.policy import Batch, layout
from gvpo_jax import mesh as meshes
from gvpo_jax import ranks

SMALLEST = 32  # shortest row, tokens
SPREAD = 8  # predicted tokens of a row are padded to a multiple of 1/8 of its tokens
CALL = 1 / 8  # fixed cost of a micro-batch, as this share of the budget's tokens
SPARED = 1.25  # a shape of an earlier plan is used again if it costs at most 1.25 times as much as the best one
ALIKE = 1.1  # costs within this factor count as equal
FEW = 4  # micro-batches
IMPOSSIBLE = 1 << 30  # micro-batches
Unit = list[layout.Row]  # rows that must be in one micro-batch
Shape = tuple[int, int, int]  # rows, tokens of a row, predicted tokens of a row
Place = tuple[int, int]  # a row on the device, and the start of a planned row in it


@dataclass(frozen=True)
class ShardSplitting(layout.Splitting):
    """Splits a batch into units, rows or whole groups; `plan` fills micro-batches with them. Budgets are per shard."""

    head: float = 0.0  # operations of the head per token, as a share of those of the layers without attention
    # Shapes per shard, in the order in which plans chose them. A resumed run thus pads, and so rounds, as before.
    shapes: list[Shape] = field(default_factory=list)

    def cost(self, shape: Shape) -> float:
        """Cost of a micro-batch, in tokens of a short row."""
        rows, tokens, predicted = shape
        attention = tokens / (6 * self.hidden_size) if self.hidden_size else 0.0
        return rows * (tokens * (1 + attention) + predicted * self.head) + CALL * self.tokens

    def settled(self, best: Shape, counts: Mapping[Shape, int]) -> Shape:
        """Returns the first earlier shape that costs little more than the best one, else records and returns the best.

        Args:
          counts: candidate shapes, and how many micro-batches each needs.
        """
        limit = SPARED * counts[best] * self.cost(best)
        for shape in self.shapes:
            if shape in counts and counts[shape] * self.cost(shape) <= limit:
                return shape
        self.shapes.append(best)
        return best

    def padded(self, tokens: int, predicted: int) -> int:
        """Pads a row's number of predicted tokens: up to the number of its tokens if that costs little more."""
        part = max(SMALLEST, -(-tokens // SPREAD))
        least = -(-predicted // part) * part
        alike = self.cost((1, tokens, tokens)) <= ALIKE * self.cost((1, tokens, least))
        return max(least, tokens) if alike else least

    def sizes(self, longest: int, tokens: int) -> Iterator[tuple[int, int]]:
        """Yields (rows, length) to try for `tokens` of a shard: the shortest lengths that hold the longest row.

        The last one holds every unit that fits into a micro-batch.
        """
        most = 0
        while _length(self.tokens, most + 1) >= longest and _length(self.tokens, most) > SMALLEST:
            most += 1
        for halvings in range(most, max(-1, most - 3), -1):
            length = _length(self.tokens, halvings)
            enough = rows_bucket(-(-tokens // length), 1)
            if self.responses:
                enough = min(enough, rows_bucket(self.responses, 1))
            enough = min(enough, 1 << halvings)
            yield from (
                (rows, length) for rows in (2 * enough, enough, enough // 2, enough // 4) if 1 <= rows <= 1 << halvings
            )
        yield 1, _length(self.tokens, 0)

    def rows(self, batch: Batch, chosen: Sequence[int] | None = None) -> list[Unit]:
        """Returns each row of the chosen responses as a unit. Default: all responses."""
        return [[row] for row in self._rows(batch, self.responses, chosen)]

    def groups(self, batch: Batch) -> tuple[list[Unit], list[int]]:
        """Returns the groups that fit into one micro-batch as units, and the responses of all other groups."""
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
    """One micro-batch as padded arrays. Shapes are few, so a run compiles few programs."""

    arrays: dict[str, np.ndarray]  # ids, positions, segments, last (B, T), predict, targets (B, P), int32
    source: layout.Arrays | None  # None: empty rows that only keep this process in step with the others
    places: tuple[np.ndarray, np.ndarray] = field(default=(np.zeros(0, np.int64),) * 2)  # (n,) row, slot of targets

    @property
    def shape(self) -> Shape:
        """(B, T, P): rows, tokens and predicted tokens of a row."""
        return (*self.arrays["ids"].shape, self.arrays["targets"].shape[1])

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(r,) float64: the log-prob of each response, from the (B, P) values."""
        assert self.source is not None
        return self.source.sums(values[self.places])

    def spread(self, factors: np.ndarray) -> np.ndarray:
        """(B, P) float32: for each target the sum of its responses' factors, 0 elsewhere."""
        spread = np.zeros(self.arrays["targets"].shape, np.float32)
        if self.source is not None:
            spread[self.places] = self.source.spread(factors)
        return spread


@dataclass
class Filling:
    """A micro-batch that is being filled."""

    free: list[int]  # free tokens in each row
    rows: Unit
    places: list[Place]
    responses: int = 0

    def predicted(self, counts: Mapping[tuple[int, ...], int]) -> int:
        """Returns the most tokens that a row predicts, at least 1. `counts`: of a planned row, by its responses."""
        totals = Counter[int]()
        for row, (at, _) in zip(self.rows, self.places, strict=True):
            totals[at] += counts[row.responses]
        return max(1, *totals.values()) if totals else 1

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
    """Rounds up to 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, ...; above 128 at most a fifth is padding."""
    step = max(SMALLEST, (1 << max(0, n - 1).bit_length()) // 8)
    return max(SMALLEST, -(-n // step) * step)


def rows_bucket(n: int, shards: int) -> int:
    """Rounds up to the next power of two of rows per shard; returns the rows of all shards."""
    return shards * (1 << max(0, math.ceil(math.log2(max(1, -(-n // shards))))))


def fits(unit: Unit, length: int, rows: int) -> bool:
    """Whether the unit fits into a micro-batch of `rows` rows of `length` tokens."""
    return Filling([length] * rows, [], []).take(unit, length)


def fill(units: Sequence[Unit], length: int, rows: int, responses: int) -> list[Filling]:
    """Fills micro-batches of `rows` rows of `length` tokens with the units, largest units first. Each unit must fit.

    Args:
      responses: limit per micro-batch, unless a single unit has more; 0: no limit.
    """
    fillings: list[Filling] = []
    for unit in sorted(units, key=lambda unit: sum(row.length for row in unit), reverse=True):
        longest, added = unit[0].length, sum(len(row.responses) for row in unit)
        for filling in fillings:
            few = not responses or filling.responses + added <= responses
            if few and max(filling.free) >= longest and filling.take(unit, length):
                break
        else:
            fillings.append(Filling([length] * rows, [], []))
            fillings[-1].take(unit, length)
    return fillings


def plan(batch: Batch, units: Sequence[Unit], splitting: ShardSplitting, mesh: Mesh) -> list[Rows]:
    """Plans micro-batches that hold the units, with the same shapes in the same order on every process.

    All have one shape. It comes from an earlier plan if that costs little more than the best shape, see
    `ShardSplitting.settled`. A row longer than the budget is alone in its shard.
    """
    shards = meshes.batch_shards(mesh)
    budget = _length(splitting.tokens, 0)
    predicted = {row.responses: len(layout.arrays(batch, [row]).targets) for unit in units for row in unit}
    long = sorted((u for u in units if u[0].length > budget), key=_longest, reverse=True)
    short = [u for u in units if u[0].length <= budget]
    tokens = -(-sum(row.length for unit in short for row in unit) // shards)
    count, longest, tokens = ranks.most(-(-len(long) // shards), max(map(_longest, short), default=0), tokens)
    parts = [long[start : start + shards] for start in range(0, count * shards, shards)]
    micro = [*_apart(parts, predicted, splitting), *_together(short, longest, tokens, predicted, splitting, shards)]
    planned = []
    for filling, (rows, length, predicts) in micro:
        laid_out = layout.arrays(batch, filling.rows) if filling.rows else None
        planned.append(lay(laid_out, filling.rows, filling.places, (rows * shards, length, predicts)))
    return planned


def _apart(
    parts: Sequence[Sequence[Unit]], predicted: Mapping[tuple[int, ...], int], splitting: ShardSplitting
) -> list[tuple[Filling, Shape]]:
    """Returns micro-batches of rows longer than the budget, one row per shard, and their shapes."""
    fillings = [
        Filling([], [row for unit in part for row in unit], [(at, 0) for at, unit in enumerate(part) for _ in unit])
        for part in parts
    ]
    facts = [n for f in fillings for n in (max((row.length for row in f.rows), default=1), f.predicted(predicted))]
    agreed = ranks.most(*facts) if facts else ()
    shapes = []
    for longest, predicts in zip(agreed[::2], agreed[1::2], strict=True):
        best = (1, bucket(longest), splitting.padded(bucket(longest), predicts))
        fitting = [s for s in splitting.shapes if s[0] == 1 and s[1] >= longest and s[2] >= predicts]
        shapes.append(splitting.settled(best, dict.fromkeys([best, *fitting], 1)))
    return list(zip(fillings, shapes, strict=True))


def _together(
    units: Sequence[Unit],
    longest: int,
    tokens: int,
    predicted: Mapping[tuple[int, ...], int],
    splitting: ShardSplitting,
    shards: int,
) -> list[tuple[Filling, Shape]]:
    """Returns micro-batches of all other units, in one shape. `longest`, `tokens`: largest of all processes."""
    if not longest:
        return []
    budget = _length(splitting.tokens, 0)
    earlier = [shape for shape in splitting.shapes if shape[0] * shape[1] <= budget]
    filled: dict[tuple[int, int], list[Filling] | None] = {}
    for rows, length in [*splitting.sizes(longest, tokens), *(shape[:2] for shape in earlier)]:
        all_fit = length >= longest and all(fits(unit, length, rows * shards) for unit in units)
        filled[rows, length] = fill(units, length, rows * shards, splitting.responses * shards) if all_fit else None
    facts: list[int] = []
    for fillings in filled.values():
        most = max((filling.predicted(predicted) for filling in fillings or ()), default=1)
        facts += (IMPOSSIBLE if fillings is None else len(fillings), most)
    agreed = ranks.most(*facts)
    needed = {
        size: facts for size, *facts in zip(filled, agreed[::2], agreed[1::2], strict=True) if facts[0] < IMPOSSIBLE
    }
    counts = {(*size, splitting.padded(size[1], predicts)): count for size, (count, predicts) in needed.items()}
    costs = {shape: count * splitting.cost(shape) for shape, count in counts.items()}
    best = min(costs, key=lambda shape: costs[shape])
    if counts[best] < FEW:  # prefer more micro-batches of a smaller shape: later batches fill it better
        best = min((s for s in costs if costs[s] <= ALIKE * costs[best]), key=lambda shape: shape[0] * shape[1])
    for shape in earlier:
        count, predicts = needed.get(shape[:2], (0, 0))
        if count and shape[2] >= predicts:
            counts[shape] = count
    shape = splitting.settled(best, counts)
    fillings = filled[shape[:2]]
    assert fillings is not None
    return [(filling, shape) for filling in [*fillings, *(Filling([], [], []),) * (counts[shape] - len(fillings))]]


def _longest(unit: Unit) -> int:
    return max(row.length for row in unit)


def _length(tokens: int, halvings: int) -> int:
    return max(SMALLEST, -(-tokens // (SMALLEST << halvings)) * SMALLEST)


def lay(arrays: layout.Arrays | None, rows: Sequence[layout.Row], places: Sequence[Place], shape: Shape) -> Rows:
    """Lays the rows at their places in padded arrays of a shape. Padding predicts nothing and sees only itself."""
    b, t, p = shape
    laid = {name: np.zeros((b, t), np.int32) for name in ("ids", "positions")}
    laid |= {name: np.full((b, t), -1, np.int32) for name in ("segments", "last")}
    laid |= {name: np.zeros((b, p), np.int32) for name in ("predict", "targets")}
    laid["positions"][:] = np.arange(t)
    if arrays is None:
        return Rows(laid, None)
    before = np.zeros(b, np.int64)  # segments already laid into each row
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

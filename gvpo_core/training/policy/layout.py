"""Layout of responses in rows, and of rows in micro-batches: plain data, no framework.

A packed row holds a prompt once, followed by its responses as a tree. Common beginnings of responses are computed once.
A token attends only to the tokens before it in its own responses; its position is counted along the same path. A plain
row is a packed row of one response. The last token of a response is an input only if another response continues it.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import Batch, Tokens
from gvpo_core.training.policy.tree import depth_first

PACKABLE = frozenset(
    ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "phi3", "olmo2", "smollm3", "granite")
)  # conformance/backends/test_torch_layout.py shows that packing is exact for each


@dataclass(frozen=True)
class Row:
    """One prompt and one or more of its responses."""

    prompt: Tokens
    responses: tuple[int, ...]  # rows of the batch
    length: int  # tokens
    shared: tuple[int, ...] = ()  # for each response: inputs shared with the response before it; default: none


@dataclass(frozen=True)
class Splitting:
    """Settings for laying out a batch in rows and splitting it into micro-batches."""

    packed: bool
    tokens: int  # budget of a micro-batch, including padding
    responses: int  # most responses in a micro-batch; 0: no limit
    hidden_size: int  # of the model; see `plan_rows`
    rope: "RopeByLength | None" = None  # None: results of a row do not depend on the length of other rows
    shards: int = 1  # parts into which a process splits its rows; each has the budget

    def rows(self, batch: Batch, chosen: Sequence[int] | None = None) -> list[list[Row]]:
        """Micro-batches of the chosen responses (default: all)."""
        rows = plan_rows(
            batch,
            packed=self.packed,
            tokens=self.tokens,
            responses=self.responses,
            hidden_size=self.hidden_size,
            rows=chosen,
        )
        return self.micro_batches(rows)

    def micro_batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Packs these rows into micro-batches."""
        return micro_batches(rows, tokens=self.tokens, responses=self.responses, rope=self.rope)

    def groups(self, batch: Batch) -> tuple[list[list[Row]], list[int]]:
        """Micro-batches of whole groups, and the responses of groups that do not fit in a micro-batch."""
        return whole_groups(
            batch,
            packed=self.packed,
            tokens=self.tokens,
            responses=self.responses,
            hidden_size=self.hidden_size,
            rope=self.rope,
        )


@dataclass(frozen=True)
class Arrays:
    """A micro-batch of B rows, right-padded to T tokens, that predicts n response tokens, the policy's own.

    A token that several responses of a row share, after the same tokens, is predicted once for all of them.
    """

    ids: np.ndarray  # (B, T) int64; padding has id 0, but only `segments` marks it
    positions: np.ndarray  # (B, T) int64
    segments: np.ndarray  # (B, T) int64, ascending: 0 prompt, 1.. branches of its responses, -1 padding
    last: np.ndarray  # (B, T) int64: later tokens attend to this one in segments up to this value; -1 padding
    predict: np.ndarray  # (n,) int64: index into B * T of the token whose hidden state makes the prediction
    targets: np.ndarray  # (n,) int64: the predicted response token; own tokens only (`Batch.masks`)
    own: np.ndarray  # (m,) int64: index into `targets` of each own token, response by response
    responses: np.ndarray  # (r,) int64: rows of the batch, in the order of their tokens in `own`
    lengths: np.ndarray  # (r,) int64: own tokens of each response, at least 1

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(r,) float64: sum of `values` (n,) over the own tokens of each response."""
        starts = np.cumsum(self.lengths) - self.lengths
        sums: np.ndarray = np.add.reduceat(np.asarray(values, dtype=np.float64)[self.own], starts)
        return sums

    def spread(self, factors: np.ndarray) -> np.ndarray:
        """(n,) float64: for each target, the sum of `factors` (r,) over the responses that have it as an own token."""
        weights = np.repeat(np.asarray(factors, dtype=np.float64), self.lengths)
        return np.bincount(self.own, weights=weights, minlength=len(self.targets))

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """Splits `values` (n,) into the own tokens of each response, in the order of the batch."""
        parts = np.split(values[self.own], np.cumsum(self.lengths)[:-1])
        return [parts[i] for i in np.argsort(self.responses)]


@dataclass(frozen=True)
class RopeByLength:
    """RoPE with frequencies that depend on the longest sequence of a forward pass, beyond `original` tokens."""

    kind: str  # dynamic: new frequencies at every length; longrope: one second set
    original: int  # tokens

    def frequencies(self, tokens: int) -> int:
        """Id of the frequencies that a sequence of `tokens` tokens uses; 0 up to the original length."""
        if tokens <= self.original:
            return 0
        return 1 if self.kind == "longrope" else tokens

    def of_row(self, row: "Row") -> int:
        """Id of the frequencies of a row with one response. Its last token is not an input, but counts."""
        return self.frequencies(row.length + 1)


def rope_by_length(config: Mapping[str, Any]) -> RopeByLength | None:
    """Returns the RoPE of a config.json if it depends on the length of a row, else None."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    by_length = []
    for settings in (
        rope,
        *(v for v in rope.values() if isinstance(v, Mapping)),
    ):  # for all layers, or by kind of layer
        kind = str(settings.get("rope_type", settings.get("type", "default")))
        if kind == "longrope":
            names = (settings.get("original_max_position_embeddings"), config.get("original_max_position_embeddings"))
            by_length.append(RopeByLength(kind, int(next((n for n in names if n), 0))))
        elif "dynamic" in kind:
            by_length.append(RopeByLength("dynamic", int(config.get("max_position_embeddings") or 0)))
    if len(set(by_length)) > 1:  # frequencies change at several lengths: beyond the first, rows share none
        return RopeByLength("dynamic", min(rope.original for rope in by_length))
    return by_length[0] if by_length else None


def packing(config: Mapping[str, Any]) -> tuple[bool, str]:
    """Decides from config.json whether packed rows are exact for a model. Returns the answer and the reason."""
    kind = config.get("model_type")
    if kind not in PACKABLE:
        return False, f"packing is not verified for model type {kind}"
    window = config.get("sliding_window")
    if window is not None and config.get("use_sliding_window", True):
        return False, f"sliding_window = {window}: the window would count other responses' tokens"
    others = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if others:
        return False, f"layers of type {', '.join(others)}"
    rope = rope_by_length(config)
    if rope is not None:
        return False, f"rope_type {rope.kind} depends on the length of the row"
    return True, f"every layer of {kind} is full attention"


class NotPackable(Exception):
    """The model does not support packed rows; the message says why."""


def choose(
    config: Mapping[str, Any], wanted: str, name: str, difference: Callable[[], float | None], log: logging.Logger
) -> tuple[bool, str]:
    """Decides whether rows are packed. They must be exact by config.json and in a comparison at load.

    Args:
      config: config.json of the language model.
      wanted: model.layout.
      name: name of the model, for messages.
      difference: compares packed with plain rows; see `largest_difference`. May raise NotPackable.
    Returns: whether rows are packed; the reason.
    Raises: ConfigError: the settings ask for packed rows, which are not exact.
    """
    exact, reason = packing(config)
    if wanted == "plain":
        exact, reason = False, "model.layout = plain"
    elif exact:
        try:
            packed_difference = difference()
        except NotPackable as error:
            exact, reason = False, str(error)
        else:
            if packed_difference is not None:
                exact, reason = False, f"packed log-probs differ by up to {packed_difference:.3g} nat at load"
    if wanted == "packed" and not exact:
        raise ConfigError(f"model.layout is packed, which is not exact for {name}: {reason}. Use auto or plain")
    log.info("%s: %s rows (%s)", name, "packed" if exact else "plain", reason)
    return exact, reason


def largest_difference(
    values: Sequence[np.ndarray], others: Sequence[np.ndarray], tolerance: tuple[float, float]
) -> float | None:
    """Largest difference of two computations of the same log-probs, nats per token; None if it is only rounding.

    Args:
      values, others: one array per response, (tokens,) each.
      tolerance: the largest and the mean difference that rounding explains, for a token of at most 8 nats. Rounding
        grows with logits: a token of 32 nats may differ by four times as much. In 16 bits the mean decides, since a
        router may send a token to another expert.
    """
    a, b = np.concatenate(values), np.concatenate(others)
    difference = np.abs(a - b)
    scaled = difference / np.maximum(1.0, np.maximum(np.abs(a), np.abs(b)) / 8)
    worst, typical = tolerance
    return None if scaled.max() <= worst and scaled.mean() <= typical else float(difference.max())


def plan_rows(
    batch: Batch,
    *,
    packed: bool,
    tokens: int,
    responses: int = 0,
    hidden_size: int = 0,
    rows: Sequence[int] | None = None,
) -> list[Row]:
    """Plans rows for the given responses (default: all) of a batch, longest row first.

    Responses share a row if their prompt tokens and group label are equal. In it, they share their common beginnings.

    Args:
      packed: False: one response per row.
      tokens: token budget of a row. Only a row of a single response may exceed it.
      responses: most responses in a row. 0: no limit.
      hidden_size: of the model, to weigh attention (quadratic in the row) against sharing. 0: always share.
    """
    together: dict[tuple[int, Tokens], list[int]] = {}
    for i in range(len(batch)) if rows is None else rows:
        together.setdefault((batch.groups[i], batch.prompts[i]), []).append(i)
    planned = []
    for (_, prompt), members in together.items():
        members.sort(key=lambda i: len(batch.responses[i]), reverse=True)
        shared = [0] * len(members)
        if packed:
            order = depth_first([batch.responses[i] for i in members])
            members, shared = [members[n] for n, _ in order], [inputs for _, inputs in order]
        extra = [len(batch.responses[i]) - 1 for i in members]
        limit = _responses_a_row(len(prompt), extra, shared, hidden_size) if packed else 1
        limit = min(limit, responses) if responses else limit
        row: list[tuple[int, int]] = []
        length = len(prompt)

        def close(row: list[tuple[int, int]], length: int, prompt: Tokens = prompt) -> None:
            row_responses, row_shared = zip(*row, strict=True)
            planned.append(Row(prompt, row_responses, length, row_shared))

        for i, inputs, common in zip(members, extra, shared, strict=True):
            if row and (len(row) == limit or length + inputs - common > tokens):
                close(row, length)
                row, length = [], len(prompt)
            common = common if row else 0
            row.append((i, common))
            length += inputs - common
        close(row, length)
    return sorted(planned, key=lambda row: row.length, reverse=True)


def _responses_a_row(prompt: int, extra: Sequence[int], shared: Sequence[int], hidden_size: int) -> int:
    # Per layer, a token costs about 24 H^2 operations outside attention, and 4 H for every token of its row in it.
    n = len(extra)
    if not hidden_size:
        return n
    tokens = sum(extra) - sum(shared)

    def cost(size: int) -> float:
        length = prompt + size * (tokens + sum(shared[::size])) / n  # the first response of a row shares nothing
        return math.ceil(n / size) * (length + length**2 / (6 * hidden_size))

    return min(range(n, 0, -1), key=cost)


def micro_batches(
    rows: Sequence[Row], *, tokens: int, responses: int = 0, rope: RopeByLength | None = None
) -> list[list[Row]]:
    """Fills micro-batches with rows, longest first. Number of rows times longest row stays within the token budget.

    Args:
      rope: rows with different frequencies go into different micro-batches.
    """
    return _fill([[row] for row in rows], tokens, responses, rope)


def whole_groups(
    batch: Batch,
    *,
    packed: bool,
    tokens: int,
    responses: int = 0,
    hidden_size: int = 0,
    rope: RopeByLength | None = None,
) -> tuple[list[list[Row]], list[int]]:
    """Micro-batches of whole groups, and the responses of groups that do not fit in a micro-batch."""
    members: dict[int, list[int]] = {}
    for i, label in enumerate(batch.groups):
        members.setdefault(label, []).append(i)
    fitting, rest = [], []
    for group in members.values():
        rows = plan_rows(batch, packed=packed, tokens=tokens, hidden_size=hidden_size, rows=group)
        fits = len(rows) * rows[0].length <= tokens and (not responses or len(group) <= responses)
        if rope is not None:
            fits = fits and len({rope.of_row(row) for row in rows}) == 1
        if fits:
            fitting.append(rows)
        else:
            rest.extend(group)
    return _fill(fitting, tokens, responses, rope), rest


def _fill(units: list[list[Row]], tokens: int, responses: int, rope: RopeByLength | None) -> list[list[Row]]:
    filled: list[list[Row]] = []
    width = count = 0
    for unit in sorted(units, key=lambda unit: unit[0].length, reverse=True):
        added = sum(len(row.responses) for row in unit)
        fits = filled and (len(filled[-1]) + len(unit)) * width <= tokens
        if filled and rope is not None:
            fits = fits and rope.of_row(filled[-1][0]) == rope.of_row(unit[0])
        if fits and (not responses or count + added <= responses):
            filled[-1].extend(unit)
            count += added
        else:
            filled.append(list(unit))
            width, count = unit[0].length, added
    return filled


def arrays(batch: Batch, rows: Sequence[Row]) -> Arrays:
    """Converts a micro-batch to arrays."""
    width = max(row.length for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    segments = np.full((len(rows), width), -1, dtype=np.int64)
    last = np.full((len(rows), width), -1, dtype=np.int64)
    predict: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    members: list[int] = []
    for b, row in enumerate(rows):
        start = len(row.prompt)
        ids[b, :start] = row.prompt
        positions[b, :start] = np.arange(start)
        segments[b, :start] = 0
        end, number = start, 0
        path = np.zeros(0, np.int64)  # places of the response's inputs in the row
        for i, shared in zip(row.responses, row.shared or (0,) * len(row.responses), strict=True):
            response = np.asarray(batch.responses[i], np.int64)
            inputs = slice(end, end + len(response) - 1 - shared)
            continues = shared > 0 and path[shared - 1] == end - 1  # the branch written last
            path = np.concatenate([path[:shared], np.arange(inputs.start, inputs.stop)])
            if inputs.start < inputs.stop:
                number += not continues
                ids[b, inputs] = response[shared:-1]
                positions[b, inputs] = np.arange(start + shared, start + len(path))
                segments[b, inputs] = number
                last[b, path] = number
            before = b * width + np.concatenate([[start - 1], path])
            chosen = slice(None) if batch.masks is None or batch.masks[i] is None else np.asarray(batch.masks[i], bool)
            predict.append(before[chosen])
            targets.append(response[chosen])
            members.append(i)
            end = inputs.stop
        last[b, :start] = number
        # Padding continues the positions, so that it does not look like the start of another sequence.
        positions[b, end:] = np.arange(width - end) + (positions[b, end - 1] + 1)
    lengths = np.asarray([len(response_targets) for response_targets in targets], dtype=np.int64)
    places, tokens = np.concatenate(predict), np.concatenate(targets)
    first, own = _without_repeats(places * (tokens.max() + 1) + tokens)
    return Arrays(
        ids, positions, segments, last, places[first], tokens[first], own, np.asarray(members, np.int64), lengths
    )


def _without_repeats(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first place of each distinct value, in order of appearance, and for each value its index in them."""
    _, first, which = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[which]


def check_batch(vocabulary: int) -> Batch:
    """Returns a short synthetic batch to check a model with: 2 prompts and 5 responses of different lengths.

    The third response begins like the first. The fifth begins with all of the fourth.
    """
    draw = np.random.default_rng(0)
    prompts = [tuple(draw.integers(0, vocabulary, n).tolist()) for n in (5, 8)]
    responses = [tuple(draw.integers(0, vocabulary, n).tolist()) for n in (4, 1, 6, 3, 5)]
    responses[2] = responses[0][:2] + responses[2][2:]
    responses[4] = responses[3] + responses[4][3:]
    return Batch([prompts[0]] * 3 + [prompts[1]] * 2, responses, [0, 0, 0, 1, 1])

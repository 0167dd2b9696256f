"""Batches whose responses begin alike, and what their rows should hold, by plain loops."""

import numpy as np

from gvpo_core.training.policy import Batch
from gvpo_core.training.policy.layout import Arrays, Row


def alike(sizes: tuple[int, ...] = (5, 3), *, seed: int = 1, longest: int = 9, vocabulary: int = 96) -> Batch:
    """Groups whose responses continue one another at random tokens; some are equal, or the beginning of another."""
    draw = np.random.default_rng(seed)
    ids = lambda low, high: tuple(draw.integers(0, vocabulary, int(draw.integers(low, high))).tolist())
    prompts: list[tuple[int, ...]] = []
    responses: list[tuple[int, ...]] = []
    groups: list[int] = []
    for label, size in enumerate(sizes):
        prompt, members = ids(3, 12), [ids(1, longest + 1)]
        members += [members[0], (*members[0], *ids(1, 4)), members[0][:1]][: size - 1]
        while len(members) < size:
            begun = members[int(draw.integers(len(members)))]
            members.append((*begun[: int(draw.integers(len(begun) + 1))], *ids(1, longest)))
        prompts += [prompt] * size
        responses += members
        groups += [label] * size
    return Batch(prompts, responses, groups)


def inputs_of(batch: Batch, responses: tuple[int, ...]) -> int:
    """Tokens that a row of these responses computes after its prompt: their different beginnings."""
    return len({batch.responses[i][:n] for i in responses for n in range(1, len(batch.responses[i]))})


def visible(segments: np.ndarray, last: np.ndarray) -> np.ndarray:
    """(T, T) bool of queries and keys of a row, pair by pair; padding sees itself alone."""
    seen = np.zeros((len(segments),) * 2, bool)
    for q in range(len(segments)):
        for k in range(q + 1):
            seen[q, k] = (segments[q] < 0) == (segments[k] < 0) and segments[q] <= last[k]
    return seen


def branches(prompt: int, sizes: list[tuple[int, int]], padding: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(T,) segments and last of a row of `layout.Arrays`.

    Args:
      sizes: of each branch after the prompt: tokens that it shares with the branch before, and tokens of its own.
    """
    segments, last, path = [0] * prompt, [len(sizes)] * prompt, list[int]()
    for number, (shared, own) in enumerate(sizes, 1):
        path = [*path[:shared], *range(len(segments), len(segments) + own)]
        segments += [number] * own
        last += [number] * own
        for place in path:
            last[place] = number
    return np.asarray([*segments, *[-1] * padding]), np.asarray([*last, *[-1] * padding])


def without_sharing(batch: Batch, rows: list[Row]) -> Arrays:
    """Arrays of rows in which responses share the prompt alone, one token after the other."""
    width = max(len(row.prompt) + sum(len(batch.responses[i]) - 1 for i in row.responses) for row in rows)
    ids, positions, segments, last = (np.full((len(rows), width), fill) for fill in (0, 0, -1, -1))
    predict, targets, responses, lengths = [], [], [], []  # each own token is a target of its own
    for b, row in enumerate(rows):
        at = 0
        with_inputs = sum(len(batch.responses[i]) > 1 for i in row.responses)
        for place, token in enumerate(row.prompt):
            ids[b, at], positions[b, at], segments[b, at], last[b, at] = token, place, 0, with_inputs
            at += 1
        for number, i in enumerate(row.responses, 1):
            own = batch.masks[i] if batch.masks and batch.masks[i] else [True] * len(batch.responses[i])
            before = b * width + len(row.prompt) - 1
            for place, token in enumerate(batch.responses[i]):
                if own[place]:
                    predict.append(before)
                    targets.append(token)
                if place < len(batch.responses[i]) - 1:
                    before = b * width + at
                    ids[b, at], positions[b, at] = token, len(row.prompt) + place
                    segments[b, at] = last[b, at] = number
                    at += 1
            responses.append(i)
            lengths.append(sum(own))
        for place in range(at, width):
            positions[b, place] = positions[b, place - 1] + 1
    own = range(len(targets))
    return Arrays(ids, positions, segments, last, *map(np.asarray, (predict, targets, own, responses, lengths)))

"""Encodes recorded rows for a policy: prompts and responses as tokens, within the limits of the settings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from gvpo_core.training.config import Config, ConfigError
from gvpo_core.training.data import NothingLeft, Prompts, encodable, encode_prompts
from gvpo_core.training.policy import Policy, Prompt, Response, ResponseError, Tokens
from gvpo_core.training.recorded.rows import Recorded, RecordedRow
from gvpo_core.training.rows import DataError


@dataclass(frozen=True)
class Group:
    """A prompt and its k responses."""

    prompt: Tokens
    responses: tuple[Response, ...]
    rewards: np.ndarray  # (k,) float64; NaN: unscored
    parts: Sequence[Mapping[str, float]] = ()  # k, or none

    @property
    def scored(self) -> list[int]:
        """Indices of the scored responses."""
        return [i for i, reward in enumerate(self.rewards) if not math.isnan(reward)]


@dataclass(frozen=True)
class Groups:
    """The encoded groups of recorded data, and their prompts in the same order."""

    prompts: Prompts
    groups: Sequence[Group]
    recorded: Recorded
    skipped: int = 0  # groups without enough scored responses
    dropped_responses: int = 0  # responses that were too long

    def __len__(self) -> int:
        return len(self.groups)

    @cached_property
    def sizes(self) -> list[int]:
        """Number of responses in each group."""
        return [len(group.responses) for group in self.groups]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return max((len(response.tokens) for group in self.groups for response in group.responses), default=0)

    def batch(self, step: int, size: int, *, seed: int, shuffle: bool) -> list[int]:
        """Groups of a step (from 0), see `Prompts.batch`. Data written by a run keeps its order in the first epoch."""
        if not self.recorded.in_order or not shuffle:
            return self.prompts.batch(step, size, seed=seed, shuffle=shuffle)
        first = range(step * size, min((step + 1) * size, len(self)))
        later = self.prompts.batch(step, size, seed=seed, shuffle=True)
        return [*first, *later[len(first) :]]

    def describe(self) -> str:
        """Describes the data in one line."""
        sizes, count = self.sizes, sum(self.sizes)
        each = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
        unscored = count - sum(len(group.scored) for group in self.groups)
        parts = [
            f"{self.recorded.shape.description}; rewards: {self.recorded.scores}",
            f"{len(self):,} groups of {each} responses",
            f"{unscored:,} responses unscored" if unscored else "",
            f"{self.skipped:,} groups skipped: too few scored responses" if self.skipped else "",
            f"{self.dropped_responses:,} responses dropped as too long" if self.dropped_responses else "",
        ]
        return ", ".join(part for part in parts if part)


def encode_groups(
    policy: Policy, recorded: Recorded, config: Config, name: str = "data.train", *, smallest: int = 2
) -> Groups:
    """Encodes every prompt and response.

    A prompt or response over its limit is an error, or is dropped with data.too_long = "drop"; nothing is cut. A
    group with fewer than `smallest` scored responses is skipped. In rows written by a run, such a group keeps its place
    in its step instead, and the objective leaves it out.

    Args:
      smallest: fewest scored responses of a group. 0: skip none.
    Raises: DataError: see `encode_prompts`; a response that cannot be one of this policy, with its row; no group left.
    """
    if not hasattr(policy, "encode_responses"):
        raise ConfigError(f"{type(policy).__name__} has no encode_responses, which recorded responses need")
    column = config.data.prompt
    rows = [{column: row.prompt, **{k: v for k, v in row.columns.items() if k != column}} for row in recorded.rows]
    wheres = [row.where for row in recorded.rows]

    def encode(i: int, prompt: Prompt) -> Tokens:
        known = recorded.rows[i].prompt_ids
        return tuple(policy.encode(prompt) if known is None else known)

    room = config.rollout.max_tokens if config.rollout.source == "mixed" else 0
    prompts = encode_prompts(policy, rows, config.data, name, wheres=wheres, max_tokens=room, encode=encode)
    facts = policy.describe()
    for row in recorded.rows:
        _check_ids(row.prompt_ids or (), facts.vocabulary or math.inf, f"{row.where}, column 'prompt_ids'")
    limits = facts.vocabulary or math.inf, facts.context or math.inf
    groups: list[Group] = []
    kept: list[int] = []
    dropped = 0
    for place in range(len(prompts)):
        row = recorded.rows[prompts.row(place)]
        group, too_long = _group(policy, prompts, place, row, config, *limits, recorded.in_order)
        dropped += too_long
        if len(group.scored) >= smallest or (recorded.in_order and group.responses):
            groups.append(group)
            kept.append(place)
    if not any(len(group.scored) >= smallest for group in groups):
        needed = "a scored response" if smallest == 1 else f"{smallest} scored responses"
        raise NothingLeft(
            f"{name}: none of its {len(recorded)} groups has {needed}, which objective.name ="
            f" {config.objective.name!r} needs" + (f"; {dropped} responses were dropped as too long" if dropped else "")
        )
    chosen = replace(
        prompts,
        prompts=[prompts.prompts[i] for i in kept],
        tokens=[prompts.tokens[i] for i in kept],
        columns=[prompts.columns[i] for i in kept],
        rows=[recorded.rows[prompts.row(i)].row for i in kept],
    )
    return Groups(chosen, groups, recorded, len(prompts) - len(kept), dropped)


def joined(parts: Sequence[Groups], recorded: Recorded) -> Groups:
    """Concatenates the groups of several parts."""
    prompts = Prompts(
        [prompt for part in parts for prompt in part.prompts.prompts],
        [tokens for part in parts for tokens in part.prompts.tokens],
        [columns for part in parts for columns in part.prompts.columns],
        rows=[part.prompts.row(i) for part in parts for i in range(len(part))],
    )
    return Groups(prompts, [group for part in parts for group in part.groups], recorded)


def _group(
    policy: Policy,
    prompts: Prompts,
    place: int,
    row: RecordedRow,
    config: Config,
    vocabulary: float,
    context: float,
    of_run: bool,
) -> tuple[Group, int]:
    """Returns the group of one row, and the number of its responses that were dropped as too long."""
    prompt = prompts.tokens[place]
    for j, response in enumerate(row.responses):
        if isinstance(response, str):
            encodable(response, f"{row.where}, response {j}")
        else:
            _check_ids(response, vocabulary, f"{row.where}, response {j}")
    responses = _encoded(policy, prompts.prompts[place], row, vocabulary, of_run)
    if any(row.stopped):
        ends = zip(responses, row.stopped, strict=True)
        responses = [replace(r, finished=True, stopped=True) if by_text else r for r, by_text in ends]
    kept = []
    for j, response in enumerate(responses):
        contexts = (len(segment.prompt) + len(segment.response) - len(prompt) for segment in response.later)
        count, limit = max(len(response.tokens), *contexts, 0), min(config.rollout.max_tokens, context - len(prompt))
        if count <= limit:
            kept.append(j)
        elif config.data.too_long == "error":
            of = f"rollout.max_tokens = {config.rollout.max_tokens}"
            if limit < config.rollout.max_tokens:
                of = f"the {limit} that the prompt leaves of the model's {context:.0f} positions"
            raise DataError(
                f"{row.where}, response {j} has {count} tokens, more than {of}; raise rollout.max_tokens if the"
                " model has room, or leave such responses out with data.too_long = 'drop'"
            )
    rewards = np.asarray([row.rewards[j] for j in kept], np.float64)
    parts = [row.parts[j] for j in kept] if row.parts else ()
    return Group(prompt, tuple(responses[j] for j in kept), rewards, parts), len(responses) - len(kept)


def _encoded(policy: Policy, prompt: Prompt, row: RecordedRow, vocabulary: float, of_run: bool) -> list[Response]:
    """Encodes the row's responses with their later segments.

    Args:
      of_run: the data was written by a run.
    Raises: DataError: the policy cannot score a response.
    """
    later = row.later or [()] * len(row.responses)
    # An episode may be cut between two turns, each with its end token. Other unfinished responses have none at the end.
    cut = [ended is False and (of_run or bool(s)) for s, ended in zip(later, row.finished, strict=True)]
    cut = [c and not isinstance(response, str) for c, response in zip(cut, row.responses, strict=True)]
    ends = [None if c else ended for c, ended in zip(cut, row.finished, strict=True)]
    firsts = [None if segments else ended for segments, ended in zip(later, ends, strict=True)]
    masks = {"masks": row.masks} if row.masks else {}
    try:
        responses = policy.encode_responses(prompt, row.responses, firsts, **masks)
    except ResponseError as e:
        raise DataError(f"{row.where}, response {e.number} cannot be used: {e}") from e
    for j, segments in enumerate(later):
        where = f"{row.where}, response {j}"
        if segments and isinstance(row.responses[j], str):
            raise DataError(f"{where} is a text with later segments of token ids; give its token ids (response_ids)")
        for segment in segments:
            _check_ids((*segment.prompt, *segment.response), vocabulary, where)
        if segments:
            ended = [*[None] * (len(segments) - 1), ends[j]]
            ids, segment_masks = [s.response for s in segments], [s.mask for s in segments]
            try:
                checked = policy.encode_responses(prompt, ids, ended, segment_masks)
            except ResponseError as e:
                raise DataError(f"{where} cannot be used: its segment {e.number + 1}: {e}") from e
            responses[j] = replace(responses[j], finished=checked[-1].finished, later=tuple(segments))
    return [replace(r, finished=False) if c else r for c, r in zip(cut, responses, strict=True)]


def _check_ids(tokens: Sequence[object], vocabulary: float, where: str) -> None:
    wrong = next((i for i in tokens if _no_id(i, vocabulary)), None)
    if wrong is not None:
        raise DataError(f"{where} holds {wrong!r}, which is not a token id of the model (0 to {vocabulary - 1})")


def _no_id(i: object, vocabulary: float) -> bool:
    return isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocabulary

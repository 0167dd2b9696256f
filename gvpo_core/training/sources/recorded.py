"""Recorded groups: no sampling, and no calls of rewards (Cor. 3.2 and 3.4)."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gvpo_core.training.config import Config
from gvpo_core.training.data import Prompts
from gvpo_core.training.policy import Batch, Policy, later_of, masks_of
from gvpo_core.training.recorded import Group, Groups, ReferenceScores, StreamedGroups
from gvpo_core.training.rewards import Reward
from gvpo_core.training.rollout import Rollout, exact_tokens, odd_ids, plain_prompt, score_everywhere
from gvpo_core.training.sources.join import leave_out


@dataclass(frozen=True)
class Recorded:
    """Takes the next groups of recorded data."""

    config: Config
    recorded: Groups
    reference: ReferenceScores | None  # None: objective.reference is the policy at the start of the step

    @property
    def prompts(self) -> Prompts:
        """The prompts of all groups."""
        return self.recorded.prompts

    @property
    def largest(self) -> tuple[int, int]:
        """Responses in the largest group, and tokens of the longest response."""
        return max(self.recorded.sizes), self.recorded.longest

    on_policy = False  # other policies drew the responses

    def describe(self) -> dict[str, str]:
        """Lines of the header: a description of the groups, and how many a step uses."""
        each = f"{self.config.rollout.prompts} recorded groups, nothing is sampled"
        return {"source": self.recorded.describe(), "step": each}

    def groups(self, policy: Policy, step: int, *, size: int | None = None) -> Rollout:
        """`rollout.prompts` groups with all their responses."""
        size, seed = size or self.config.rollout.prompts, self.config.run.seed
        rows = self.recorded.batch(step - 1, size, seed=seed, shuffle=self.config.data.shuffle)
        return leave_out(recorded_rollout(policy, self.recorded, rows, self.reference), self.config.rollout)

    def state(self) -> dict[str, Any]:
        """Returns nothing: the groups of a step depend only on the settings."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `state`."""


@dataclass(frozen=True)
class Streamed(Recorded):
    """Takes the next groups of a stream. The header describes its first groups, `recorded`."""

    stream: StreamedGroups

    def describe(self) -> dict[str, str]:
        """Lines of the header; see `Recorded`."""
        buffer = self.config.data.buffer
        lines = super().describe()
        return lines | {"source": f"a stream, at most {buffer:,} rows held; at its beginning {lines['source']}"}

    def groups(self, policy: Policy, step: int, *, size: int | None = None) -> Rollout:
        """`rollout.prompts` groups with all their responses."""
        size = size or self.config.rollout.prompts
        groups = self.stream.at(policy, (step - 1) * size, size)
        return leave_out(recorded_rollout(policy, groups, range(size), self.reference), self.config.rollout)


def recorded_rollout(
    policy: Policy, recorded: Groups, rows: Sequence[int], reference: ReferenceScores | None, *, keep: bool = True
) -> Rollout:
    """Returns groups as a rollout. Their N responses are split evenly over the ranks, so a group may be on two ranks.

    Args:
      keep: whether the main rank makes the rows of completions.jsonl.
    """
    clock = time.perf_counter()
    groups = [recorded.groups[row] for row in rows]
    places = [(g, i) for g, group in enumerate(groups) for i in range(len(group.responses))]
    start, stop = (len(places) * r // policy.world_size for r in (policy.rank, policy.rank + 1))
    local_places = places[start:stop]
    local = [groups[g].responses[i] for g, i in local_places]
    prompts = [groups[g].prompt for g, _ in local_places]
    batch = Batch(
        prompts,
        [response.tokens for response in local],
        [g for g, _ in local_places],
        masks_of(local),
        later=later_of(local),
    )
    details: dict[str, float] = {}
    ref = None
    if reference is not None:
        hits, misses = reference.hits, reference.misses
        ref = _reference(reference, groups, every=not recorded.recorded.scored)
        details = {
            "machine/reference_cached": reference.hits - hits,
            "machine/reference_scored": reference.misses - misses,
        }
    if recorded.skipped:
        details["groups/skipped"] = recorded.skipped
    names = dict.fromkeys(name for group in groups for part in group.parts for name in part)
    return Rollout(
        batch=batch,
        start=start,
        group_ids=np.asarray([g for g, _ in places], np.int64),
        num_groups=len(groups),
        rewards=np.concatenate([group.rewards for group in groups]),
        parts={name: np.asarray([_part(groups[g], i, name) for g, i in places]) for name in names},
        errors={},
        lengths=np.asarray([groups[g].responses[i].length for g, i in places], np.int64),
        finished=np.asarray([groups[g].responses[i].finished for g, i in places], bool),
        completions=_completions(policy, recorded, rows) if keep and policy.rank == 0 else [],
        seconds={"score": time.perf_counter() - clock},
        reward_seconds={},
        ref_logprobs=ref,
        recorded=np.ones(len(places), bool),
        stopped=np.asarray([groups[g].responses[i].stopped for g, i in places], bool),
        details=details,
        columns=[recorded.prompts.columns[row] for row in rows],
        prompts=[recorded.prompts.prompts[row] for row in rows],
    )


def scored_again(
    policy: Policy, rollout: Rollout, prompts: Prompts, rows: Sequence[int], rewards: Sequence[Reward]
) -> Rollout:
    """Scores recorded responses with the run's rewards.

    Args:
      rows: for each group, the number of its prompt.
    Raises: RewardError: see `score_everywhere`.
    """
    texts = [policy.decode(response) for response in rollout.batch.responses]
    prompt_rows = [rows[group] for group in rollout.batch.groups]
    scores = score_everywhere(policy, rewards, prompts, prompt_rows, texts, rollout.batch, [])
    completions = [
        completion
        | {"reward": float(scores.total[i]), "rewards": {n: float(values[i]) for n, values in scores.parts.items()}}
        for i, completion in enumerate(rollout.completions)
    ]
    return replace(rollout, rewards=scores.total, parts=scores.parts, errors=scores.errors, completions=completions)


def _reference(reference: ReferenceScores, groups: Sequence[Group], *, every: bool) -> np.ndarray:
    """(N,) reference scores of the responses with a reward; NaN for the others, which leave their group.

    Args:
      every: score all responses; they get their rewards later.
    """
    scored = [list(range(len(group.responses))) if every else group.scored for group in groups]
    scores_of = reference.of(
        [
            (group.prompt, tuple(group.responses[i] for i in places))
            for group, places in zip(groups, scored, strict=True)
            if places
        ]
    )
    scores, result = iter(scores_of), []
    for group, places in zip(groups, scored, strict=True):
        row = np.full(len(group.responses), np.nan)
        if places:
            row[places] = next(scores)
        result.append(row)
    return np.concatenate(result)


def _part(group: Group, i: int, name: str) -> float:
    return float(group.parts[i].get(name, np.nan)) if group.parts else float("nan")


def _completions(policy: Policy, recorded: Groups, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Returns rows of completions.jsonl; see `rollout.collect`."""
    completions: list[dict[str, Any]] = []
    for g, row in enumerate(rows):
        group, prompt = recorded.groups[row], recorded.prompts.prompts[row]
        texts = [policy.decode(response.tokens) for response in group.responses]
        ids = odd_ids(policy, prompt, group.responses, texts)
        for i, response in enumerate(group.responses):
            completion = {
                "prompt": plain_prompt(prompt),
                "group": g,
                "row": recorded.prompts.row(row),
                "response": texts[i],
                "tokens": response.length,
                "finished": response.finished,
                "reward": float(group.rewards[i]),
                "rewards": dict(group.parts[i]) if group.parts else {},
            }
            completion |= {"messages": None if isinstance(prompt, str) else prompt} if i == 0 else {}
            completion |= {"stopped": True} if response.stopped else {}
            completions.append(completion | exact_tokens(response, ids[i]))
    return completions

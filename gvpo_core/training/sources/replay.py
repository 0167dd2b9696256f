"""Keeps past groups of a run to train on them again. GVPO needs no ratio to the policy that drew them (Cor. 3.2)."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from gvpo_core.training.config import ReplayConfig
from gvpo_core.training.data import Prompts
from gvpo_core.training.policy import Mask, Policy, Response, Segment
from gvpo_core.training.policy.ranks import gather_objects
from gvpo_core.training.recorded import Group
from gvpo_core.training.rollout import Rollout
from gvpo_core.training.sampling import REPLAY


@dataclass(frozen=True)
class Past:
    """A group drawn in an earlier step."""

    step: int
    prompt: int  # index of its prompt in the run's prompts
    group: Group


class Buffer:
    """The newest groups, the same on every rank."""

    def __init__(self, config: ReplayConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.past: list[Past] = []

    def drawn(self, step: int, count: int) -> list[Past]:
        """Draws up to `count` different groups for step `step` from those that are young enough; oldest first."""
        oldest = step - self.config.age if self.config.age else 0
        eligible = [past for past in self.past if past.step >= oldest]
        random = np.random.default_rng(np.random.SeedSequence((self.seed, REPLAY, step)))
        chosen = random.permutation(len(eligible))[:count]
        return [eligible[i] for i in sorted(chosen)]

    def add(self, policy: Policy, step: int, rollout: Rollout, numbers: Sequence[int], prompts: Prompts) -> None:
        """Keeps the groups of a rollout that have a reward. Every rank calls this.

        Args:
          numbers: for each group, the index of its prompt.
          prompts: all prompts.
        """
        batch = rollout.batch
        masks, later = batch.masks or [None] * len(batch), batch.later or [()] * len(batch)
        local_rows = [
            {"tokens": tokens, "mask": mask, "later": [astuple(segment) for segment in segments]}
            for tokens, mask, segments in zip(batch.responses, masks, later, strict=True)
        ]
        rows = gather_objects(policy, local_rows)
        rewards = rollout.trained_rewards
        stopped = np.zeros(len(rewards), bool) if rollout.stopped is None else rollout.stopped
        for g, number in enumerate(numbers):
            members = [int(i) for i in np.flatnonzero((rollout.group_ids == g) & ~np.isnan(rewards))]
            if not members:
                continue
            group = Group(
                prompts.tokens[number],
                tuple(
                    _response(
                        rows[i]["tokens"],
                        bool(rollout.finished[i]),
                        bool(stopped[i]),
                        rows[i]["mask"],
                        rows[i]["later"],
                    )
                    for i in members
                ),
                rewards[members],
                [{name: float(values[i]) for name, values in rollout.parts.items()} for i in members],
            )
            self.past.append(Past(step, number, group))
        del self.past[: -self.config.groups]

    def state(self) -> list[dict[str, Any]]:
        """State for the checkpoint, as JSON values."""
        return [
            {
                "step": past.step,
                "prompt": past.prompt,
                "prompt_tokens": list(past.group.prompt),
                "responses": [
                    [list(r.tokens), r.finished, r.stopped, r.mask, *([[*map(astuple, r.later)]] if r.later else [])]
                    for r in past.group.responses
                ],
                "rewards": [float(reward) for reward in past.group.rewards],
                "parts": [{k: None if math.isnan(v) else v for k, v in part.items()} for part in past.group.parts],
            }
            for past in self.past
        ]

    def restore(self, state: Sequence[dict[str, Any]], prompts: Prompts) -> None:
        """Restores the groups that `state` returned. Drops groups with changed prompts (run.allow_changes)."""
        self.past = []
        for past in state:
            number, prompt = int(past["prompt"]), tuple(past["prompt_tokens"])
            if number >= len(prompts) or tuple(prompts.tokens[number]) != prompt:
                continue
            responses = tuple(_response(*response) for response in past["responses"])
            rewards = np.asarray(past["rewards"], np.float64)
            parts = [{name: math.nan if v is None else v for name, v in part.items()} for part in past["parts"]]
            self.past.append(Past(int(past["step"]), number, Group(prompt, responses, rewards, parts)))


def _response(
    tokens: Sequence[int], finished: bool, stopped: bool, mask: Sequence[bool] | None, later: Sequence[Any] = ()
) -> Response:
    segments = tuple(Segment(tuple(prompt), tuple(response), _mask(mask)) for prompt, response, mask in later)
    return Response(tuple(tokens), finished, stopped=stopped, mask=_mask(mask), later=segments)


def _mask(mask: Sequence[bool] | None) -> Mask | None:
    return None if mask is None else tuple(mask)

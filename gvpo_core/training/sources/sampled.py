"""Groups sampled for a step, from prompts, a sampler and rewards. They may also contain recorded responses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from gvpo_core.training.config import Config
from gvpo_core.training.data import Prompts
from gvpo_core.training.policy import Policy
from gvpo_core.training.recorded import Groups, ReferenceScores
from gvpo_core.training.rewards import Reward
from gvpo_core.training.rollout import Requests, Rollout, collect, requests_of
from gvpo_core.training.samplers import Sampler
from gvpo_core.training.samplers.gaps import GapCheck
from gvpo_core.training.samplers.protocol import describe, refresh
from gvpo_core.training.sampling import CURRICULUM, OWN, REDRAW, TRAIN
from gvpo_core.training.sources.ahead import Ahead
from gvpo_core.training.sources.join import equal_groups, join, leave_out
from gvpo_core.training.sources.recorded import recorded_rollout, scored_again


@dataclass
class Sampled:
    """Samples responses to the next prompts of the data, with the policy or with `sampler` (Cor. 3.2)."""

    config: Config
    prompts: Prompts
    rewards: Sequence[Reward]
    sampler: Sampler | None = None
    trained: bool = True  # the policy changes between steps
    ahead: Ahead | None = None  # responses requested before their step
    beside: Groups | None = None  # recorded responses to the same prompts, added to their groups
    reference: ReferenceScores | None = None  # reference scores of `beside`
    offset: int = 0  # prompts that earlier steps took beyond their size; below 0: fewer
    spreads: dict[int, float] = field(default_factory=dict)  # standard deviation of the newest rewards, by prompt index
    numbers: list[int] = field(default_factory=list)  # prompt index of each group of the newest step
    gaps: GapCheck | None = None  # checks that the sampler has the policy's weights

    @property
    def largest(self) -> tuple[int, int]:
        """Responses in a group, and tokens of the longest response."""
        rollout = self.config.rollout
        recorded = max(self.beside.sizes) if self.beside else 0
        return rollout.responses + recorded, rollout.max_tokens

    @property
    def on_policy(self) -> bool:
        """Whether the drawn responses come from the policy itself, at temperature 1."""
        own = self.sampler is None or self.config.rollout.own_responses > 0
        return own and self.config.rollout.sampling.temperature == 1

    def describe(self, prompts: int | None = None) -> dict[str, str]:
        """Lines of the header that say what a step draws.

        Args:
          prompts: number of prompts in a step. Default: rollout.prompts.
        """
        rollout = self.config.rollout
        mine = f" ({rollout.own_responses} the policy's own)" if rollout.own_responses else ""
        drawn = f"{rollout.responses} responses{mine} of at most {rollout.max_tokens} tokens"
        beside = f" and the recorded ones ({self.beside.describe()})" if self.beside else ""
        step = {"step": f"{prompts or rollout.prompts} prompts x {drawn}{beside}"}
        return step | ({} if self.sampler is None else {"sampler": describe(self.sampler) + self._early()})

    def _early(self) -> str:
        ahead = self.ahead.ahead if self.ahead else 0
        return f", up to {ahead} step{'s' * (ahead > 1)} ahead" if ahead else ""

    def groups(self, policy: Policy, step: int, *, size: int | None = None) -> Rollout:
        """Returns `rollout.prompts` prompts with `rollout.responses` scored responses each.

        If groups with equal rewards are redrawn, the rollout also contains the groups that were replaced.
        """
        rollout, size = self.config.rollout, size or self.config.rollout.prompts
        version = step - 1 if self.trained else 0
        refresh(self.sampler, policy, version)
        seen = self._seen(step, size)
        taken = (step - 1) * size + self.offset
        self.numbers = [*self._next(taken, size - len(seen)), *seen]
        sampler = self.sampler
        if self.ahead is not None:
            requests = partial(self._requests, policy, size)
            sampler = self.ahead.ready(policy, step, requests, rollout.sampling, self.gaps)
        drawn = self._drawn(policy, self.numbers, (TRAIN, step), version, sampler)
        for attempt in range(rollout.redraws if rollout.equal == "redraw" else 0):
            missing = size - int((~equal_groups(leave_out(drawn, replace(rollout, equal="keep")))).sum())
            if missing <= 0:
                break
            numbers = self._next(taken + len(self.numbers) - len(seen), missing)
            drawn = join(policy, [drawn, self._drawn(policy, numbers, (REDRAW, step, attempt), version, sampler)])
            self.numbers = [*self.numbers, *numbers]
        self.offset += len(self.numbers) - size - len(seen)
        if self.config.data.curriculum:
            self._remember(drawn)
            drawn = replace(drawn, details=drawn.details | {"groups/revisited": len(seen)})
        if rollout.equal == "redraw":
            drawn = replace(drawn, details=drawn.details | {"groups/redrawn": len(self.numbers) - size})
        if self.gaps is not None and self.ahead is None and self.gaps.due(step):
            drawn = replace(drawn, gaps=self.gaps)
        return leave_out(drawn, rollout)

    def _seen(self, step: int, size: int) -> list[int]:
        """Draws prompts seen before, in proportion to their spread, without repetition."""
        seen = sorted(number for number, spread in self.spreads.items() if spread > 0)
        count = min(round(size * self.config.data.curriculum), len(seen))
        weights = np.asarray([self.spreads[number] for number in seen])
        random = np.random.default_rng(np.random.SeedSequence((self.config.run.seed, CURRICULUM, step)))
        return [int(i) for i in random.choice(seen, count, replace=False, p=weights / weights.sum())] if count else []

    def _remember(self, drawn: Rollout) -> None:
        for group, number in enumerate(self.numbers):
            rewards = drawn.rewards[drawn.drawn & (drawn.group_ids == group)]
            rewards = rewards[~np.isnan(rewards)]
            differ = rewards.size and rewards.min() < rewards.max()  # rounding may give equal rewards a spread above 0
            self.spreads[number] = float(rewards.std()) if differ else 0.0

    def _next(self, taken: int, size: int) -> list[int]:
        return self.prompts.after(taken, size, seed=self.config.run.seed, shuffle=self.config.data.shuffle)

    def _requests(self, policy: Policy, size: int, step: int) -> Requests:
        path = (self.config.run.seed, TRAIN, step)
        numbers = self._next((step - 1) * size, size)
        rollout = self.config.rollout
        return requests_of(policy, self.prompts, numbers, rollout.responses - rollout.own_responses, path)

    def _drawn(
        self, policy: Policy, numbers: Sequence[int], path: tuple[int, ...], version: int, sampler: Sampler | None
    ) -> Rollout:
        rollout, seed = self.config.rollout, self.config.run.seed
        others = rollout.responses - rollout.own_responses
        how = (rollout.sampling, self.rewards)
        drawn = collect(policy, self.prompts, numbers, others, *how, (seed, *path), sampler=sampler, version=version)
        if rollout.own_responses:
            own = collect(policy, self.prompts, numbers, rollout.own_responses, *how, (seed, OWN, *path))
            elsewhere = replace(drawn, recorded=np.ones(len(drawn.rewards), bool))
            drawn = join(policy, [own, elsewhere], together=True)
        if self.beside is None:
            return drawn
        recorded = recorded_rollout(policy, self.beside, numbers, self.reference)
        if not self.beside.recorded.scored:
            recorded = scored_again(policy, recorded, self.prompts, numbers, self.rewards)
        return join(policy, [drawn, recorded], together=True)

    def state(self) -> dict[str, Any]:
        """State for the checkpoint; see `Source`."""
        early = {} if self.ahead is None else self.ahead.state()
        early |= {} if self.gaps is None else self.gaps.state()
        spreads = [[number, spread] for number, spread in self.spreads.items()]
        return early | ({"offset": self.offset} if self.offset else {}) | ({"spreads": spreads} if spreads else {})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned."""
        self.offset = int(state.get("offset", 0))
        spreads = ((int(number), float(spread)) for number, spread in state.get("spreads", ()))
        self.spreads = {number: spread for number, spread in spreads if number < len(self.prompts)}
        if self.gaps is not None:
            self.gaps.restore(state)
        if self.ahead is not None:
            self.ahead.restore(state)

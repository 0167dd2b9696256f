"""Groups that are sampled for the step: prompts, a sampler, rewards; and recorded responses in the same group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from gvpo_core.training.config import Config
from gvpo_core.training.data import Prompts
from gvpo_core.training.policy import Policy
from gvpo_core.training.recorded import Groups
from gvpo_core.training.rewards import Reward
from gvpo_core.training.rollout import Requests, Rollout, collect, requests_of
from gvpo_core.training.samplers import Sampler
from gvpo_core.training.samplers.protocol import refresh, said
from gvpo_core.training.sampling import REDRAW, TRAIN
from gvpo_core.training.sources.ahead import Ahead
from gvpo_core.training.sources.join import equal_groups, join, leave_out
from gvpo_core.training.sources.recorded import recorded_rollout, scored_again


@dataclass
class Sampled:
    """The next prompts of the data, answered by the policy or by `sampler` in its place (Cor. 3.2)."""

    config: Config
    prompts: Prompts
    rewards: Sequence[Reward]
    sampler: Sampler | None = None
    trained: bool = True  # the policy moves between the steps
    ahead: Ahead | None = None  # what the sampler was asked for before its step
    beside: Groups | None = None  # recorded responses to the same prompts, part of their groups
    redrawn: int = 0  # prompts that earlier steps took beyond their number
    numbers: list[int] = field(default_factory=list)  # of the prompts of the newest step, by group

    @property
    def largest(self) -> tuple[int, int]:
        """Responses of a group, tokens of the longest response."""
        rollout = self.config.rollout
        recorded = max(self.beside.sizes) if self.beside else 0
        return rollout.responses + recorded, rollout.max_tokens

    @property
    def on_policy(self) -> bool:
        """Whether the responses that are drawn are the policy's own, at temperature 1."""
        return self.sampler is None and self.config.rollout.sampling.temperature == 1

    def said(self) -> dict[str, str]:
        """For the header: what a step draws."""
        rollout = self.config.rollout
        drawn = f"{rollout.responses} responses of at most {rollout.max_tokens} tokens"
        beside = f" and the recorded ones ({self.beside.said()})" if self.beside else ""
        step = {"step": f"{rollout.prompts} prompts x {drawn}{beside}"}
        return step | ({} if self.sampler is None else {"sampler": said(self.sampler) + self._early()})

    def _early(self) -> str:
        ahead = self.ahead.ahead if self.ahead else 0
        return f", up to {ahead} step{'s' * (ahead > 1)} ahead" if ahead else ""

    def groups(self, policy: Policy, step: int, *, size: int | None = None) -> Rollout:
        """`rollout.prompts` prompts with `rollout.responses` scored responses each.

        Where equal groups are redrawn the step has more groups: those left out, and those drawn in their place.
        """
        rollout, size = self.config.rollout, size or self.config.rollout.prompts
        version = step - 1 if self.trained else 0
        refresh(self.sampler, policy, version)
        taken = (step - 1) * size + self.redrawn
        self.numbers = self._next(taken, size)
        sampler = self.sampler
        if self.ahead is not None:
            sampler = self.ahead.ready(policy, step, partial(self._requests, policy, size), rollout.sampling)
        drawn = self._drawn(policy, self.numbers, (TRAIN, step), version, sampler)
        for attempt in range(rollout.redraws if rollout.equal == "redraw" else 0):
            missing = size - int((~equal_groups(leave_out(drawn, replace(rollout, equal="keep")))).sum())
            if missing <= 0:
                break
            numbers = self._next(taken + len(self.numbers), missing)
            drawn = join(policy, [drawn, self._drawn(policy, numbers, (REDRAW, step, attempt), version, sampler)])
            self.numbers = [*self.numbers, *numbers]
        self.redrawn += len(self.numbers) - size
        if rollout.equal == "redraw":
            drawn = replace(drawn, details=drawn.details | {"groups/redrawn": len(self.numbers) - size})
        return leave_out(drawn, rollout)

    def _next(self, taken: int, size: int) -> list[int]:
        return self.prompts.after(taken, size, seed=self.config.run.seed, shuffle=self.config.data.shuffle)

    def _requests(self, policy: Policy, size: int, step: int) -> Requests:
        path = (self.config.run.seed, TRAIN, step)
        numbers = self._next((step - 1) * size, size)
        return requests_of(policy, self.prompts, numbers, self.config.rollout.responses, path)

    def _drawn(
        self, policy: Policy, numbers: Sequence[int], path: tuple[int, ...], version: int, sampler: Sampler | None
    ) -> Rollout:
        rollout, seed = self.config.rollout, self.config.run.seed
        drawn = collect(
            policy,
            self.prompts,
            numbers,
            rollout.responses,
            rollout.sampling,
            self.rewards,
            (seed, *path),
            sampler=sampler,
            version=version,
        )
        if self.beside is None:
            return drawn
        recorded = recorded_rollout(policy, self.beside, numbers, None)
        if not self.beside.recorded.scored:
            recorded = scored_again(policy, recorded, self.prompts, numbers, self.rewards)
        return join(policy, [drawn, recorded], together=True)

    def state(self) -> dict[str, Any]:
        """What the checkpoint needs to hold; see `Source`."""
        early = {} if self.ahead is None else self.ahead.state()
        return early | ({"redrawn": self.redrawn} if self.redrawn else {})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` gave."""
        self.redrawn = int(state.get("redrawn", 0))
        if self.ahead is not None:
            self.ahead.restore(state)

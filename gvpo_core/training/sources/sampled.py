"""Groups that are sampled for the step: prompts, a sampler, rewards."""

from collections.abc import Sequence
from dataclasses import dataclass

from gvpo_core.training.config import Config
from gvpo_core.training.data import Prompts
from gvpo_core.training.policy import Policy
from gvpo_core.training.rewards import Reward
from gvpo_core.training.rollout import Rollout, collect
from gvpo_core.training.samplers import Sampler
from gvpo_core.training.samplers.protocol import refresh, said
from gvpo_core.training.sampling import TRAIN


@dataclass(frozen=True)
class Sampled:
    """The next prompts of the data, answered by the policy or by `sampler` in its place (Cor. 3.2)."""

    config: Config
    prompts: Prompts
    rewards: Sequence[Reward]
    sampler: Sampler | None = None
    trained: bool = True  # the policy moves between the steps

    @property
    def largest(self) -> tuple[int, int]:
        """Responses of a group, tokens of the longest response."""
        return self.config.rollout.responses, self.config.rollout.max_tokens

    def said(self) -> dict[str, str]:
        """For the header: what a step draws."""
        rollout = self.config.rollout
        step = f"{rollout.prompts} prompts x {rollout.responses} responses of at most {rollout.max_tokens} tokens"
        return {"step": step} | ({} if self.sampler is None else {"sampler": said(self.sampler)})

    def groups(self, policy: Policy, step: int, *, size: int | None = None) -> Rollout:
        """`rollout.prompts` prompts with `rollout.responses` scored responses each."""
        rollout, seed = self.config.rollout, self.config.run.seed
        rows = self.prompts.batch(step - 1, size or rollout.prompts, seed=seed, shuffle=self.config.data.shuffle)
        version = step - 1 if self.trained else 0
        refresh(self.sampler, policy, version)
        return collect(
            policy,
            self.prompts,
            rows,
            rollout.responses,
            rollout.sampling,
            self.rewards,
            (seed, TRAIN, step),
            sampler=self.sampler,
            version=version,
        )

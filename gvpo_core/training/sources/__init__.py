"""Where the groups of a step come from. The loop asks a source and does not know which one it is."""

from typing import Protocol

from gvpo_core.training.data import Prompts
from gvpo_core.training.policy import Policy
from gvpo_core.training.rollout import Rollout
from gvpo_core.training.sources.recorded import Recorded, Streamed, recorded_rollout
from gvpo_core.training.sources.sampled import Sampled

__all__ = ["Recorded", "Sampled", "Source", "Streamed", "recorded_rollout"]


class Source(Protocol):
    """Gives each step its groups of scored responses."""

    @property
    def prompts(self) -> Prompts:
        """All prompts of the data."""

    @property
    def largest(self) -> tuple[int, int]:
        """Responses of the largest group, tokens of the longest response: for the estimate of memory."""

    def said(self) -> dict[str, str]:
        """Lines of the header: what a step takes."""

    def groups(self, policy: Policy, step: int, *, size: int | None = None) -> Rollout:
        """The groups of step `step` (from 1), with the rewards of all ranks; every rank calls.

        Args:
          size: groups wanted. Default: rollout.prompts.

        It must depend on the policy's parameters, the settings and `step` alone, so that a resumed run repeats it.
        """

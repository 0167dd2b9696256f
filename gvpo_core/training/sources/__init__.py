"""Where the groups of a step come from. The loop asks a source and does not know which one it is."""

from typing import Protocol

from gvpo_core.training.policy import Policy
from gvpo_core.training.rollout import Rollout
from gvpo_core.training.sources.sampled import Sampled

__all__ = ["Sampled", "Source"]


class Source(Protocol):
    """Gives each step its groups of scored responses."""

    def groups(self, policy: Policy, step: int) -> Rollout:
        """The groups of step `step` (from 1), with the rewards of all ranks; every rank calls.

        It must depend on the policy's parameters, the settings and `step` alone, so that a resumed run repeats it.
        """

"""Where the groups of a step come from. The loop asks a source and does not know which one it is."""

from collections.abc import Mapping
from typing import Any, Protocol

from gvpo_core.training.data import Prompts
from gvpo_core.training.policy import Policy, PolicyFacts
from gvpo_core.training.rollout import Rollout
from gvpo_core.training.sources.ahead import Ahead
from gvpo_core.training.sources.mixed import Mixed
from gvpo_core.training.sources.recorded import Recorded, Streamed, recorded_rollout
from gvpo_core.training.sources.replay import Buffer
from gvpo_core.training.sources.sampled import Sampled
from gvpo_core.training.sources.taught import Taught
from gvpo_core.training.teacher.sampler import TeacherSampler

__all__ = [
    "Ahead",
    "Buffer",
    "Mixed",
    "Recorded",
    "Sampled",
    "Source",
    "Streamed",
    "Taught",
    "recorded_rollout",
    "teacher_of",
]


def teacher_of(source: "Source") -> PolicyFacts | None:
    """Facts of a teacher that this process has loaded, which scores or draws."""
    if isinstance(source, Taught) and source.teacher.facts is not None:
        return source.teacher.facts
    sampled = source.source if isinstance(source, Taught) else source
    sampled = sampled.sampled if isinstance(sampled, Mixed) else sampled
    sampler = sampled.sampler if isinstance(sampled, Sampled) else None
    return sampler.teacher.facts if isinstance(sampler, TeacherSampler) else None


class Source(Protocol):
    """Gives each step its groups of scored responses."""

    @property
    def prompts(self) -> Prompts:
        """All prompts of the data."""

    @property
    def largest(self) -> tuple[int, int]:
        """Responses of the largest group, tokens of the longest response: for the estimate of memory."""

    @property
    def on_policy(self) -> bool:
        """Whether the responses that are drawn are the policy's own, at temperature 1."""

    def describe(self) -> dict[str, str]:
        """Lines of the header: what a step takes."""

    def groups(self, policy: Policy, step: int, *, size: int | None = None) -> Rollout:
        """The groups of step `step` (from 1), with the rewards of all ranks; every rank calls.

        Args:
          size: groups wanted. Default: rollout.prompts.

        It must depend on the policy's parameters, the settings, `step` and `state` alone, so that a resumed run
        repeats it. The loop asks for every step once, in order.
        """

    def state(self) -> dict[str, Any]:
        """What later steps depend on beside the step's number, as values that JSON has: the checkpoint holds it.

        Every rank calls.
        """

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned after the step that the run resumes from."""

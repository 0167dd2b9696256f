"""Sources of the groups of a step. The loop calls a source without knowing which one it is."""

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
    """Returns facts of the teacher that this process has loaded, to score or to draw; None if there is none."""
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
        """Responses in the largest group, and tokens of the longest response, for the memory estimate."""

    @property
    def on_policy(self) -> bool:
        """Whether the drawn responses come from the policy itself, at temperature 1."""

    def describe(self) -> dict[str, str]:
        """Lines of the header that say what a step uses."""

    def groups(self, policy: Policy, step: int, *, size: int | None = None) -> Rollout:
        """Returns the groups of step `step` (from 1), with the rewards of all ranks. Every rank calls this.

        Args:
          size: number of groups. Default: rollout.prompts.

        The result must depend only on the policy's parameters, the settings, `step` and `state`, so that a resumed run
        repeats it. The loop calls this once for every step, in order.
        """

    def state(self) -> dict[str, Any]:
        """State, besides the step's number, that later steps depend on, as JSON values for the checkpoint.

        Every rank calls this.
        """

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned after the step that the run resumes from."""

"""Groups with a teacher as the reference."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gvpo_core.training.data import Prompts
from gvpo_core.training.policy import Policy
from gvpo_core.training.rollout import Rollout
from gvpo_core.training.teacher import Teacher

if TYPE_CHECKING:
    from gvpo_core.training.sources import Source


@dataclass(frozen=True)
class Taught:
    """Groups of another source, with the teacher's log-probabilities instead of those of pi_ref."""

    source: "Source"
    teacher: Teacher

    @property
    def prompts(self) -> Prompts:
        """The prompts of the source."""
        return self.source.prompts

    @property
    def largest(self) -> tuple[int, int]:
        """See `Source`."""
        return self.source.largest

    @property
    def on_policy(self) -> bool:
        """See `Source`."""
        return self.source.on_policy

    def describe(self) -> dict[str, str]:
        """Lines of the header: those of the source, and the teacher."""
        return self.source.describe() | {"teacher": self.teacher.describe()}

    def groups(self, policy: Policy, step: int, *, size: int | None = None) -> Rollout:
        """Returns the source's groups, scored by the teacher."""
        return self.teacher.taught(policy, self.source.groups(policy, step, size=size))

    def state(self) -> dict[str, Any]:
        """State of the source."""
        return self.source.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores the state of the source."""
        self.source.restore(state)

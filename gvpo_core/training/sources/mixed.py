"""Groups of several sources in one step: sampled, recorded elsewhere, and replayed from earlier steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gvpo_core.training.config import Config
from gvpo_core.training.config.shares import shares
from gvpo_core.training.data import Prompts
from gvpo_core.training.policy import Policy
from gvpo_core.training.recorded import Groups
from gvpo_core.training.recorded.rows import Recorded as RecordedRows
from gvpo_core.training.recorded.shapes import RUN
from gvpo_core.training.rollout import Rollout
from gvpo_core.training.sources.join import join
from gvpo_core.training.sources.recorded import Recorded, recorded_rollout
from gvpo_core.training.sources.replay import Buffer, Past
from gvpo_core.training.sources.sampled import Sampled


@dataclass
class Mixed:
    """A step's sampled groups, with recorded and replayed groups added."""

    config: Config
    sampled: Sampled
    recorded: Recorded | None = None
    buffer: Buffer | None = None

    @property
    def prompts(self) -> Prompts:
        """The prompts that are sampled."""
        return self.sampled.prompts

    @property
    def largest(self) -> tuple[int, int]:
        """Responses in the largest group, and tokens of the longest response."""
        sizes = [self.sampled.largest, *([self.recorded.largest] if self.recorded else [])]
        return max(responses for responses, _ in sizes), max(tokens for _, tokens in sizes)

    @property
    def on_policy(self) -> bool:
        """Applies to the drawn responses; see `Sampled`."""
        return self.sampled.on_policy

    def describe(self) -> dict[str, str]:
        """Lines of the header that say what a step uses."""
        parts, replay = shares(self.config), self.config.replay
        lines = self.sampled.describe(parts.sampled)
        if self.recorded is not None:
            lines["recorded"] = f"{parts.recorded} groups a step of {self.recorded.recorded.describe()}"
        if self.buffer is not None:
            age = f", at most {replay.age} steps old" if replay.age else ""
            lines["replay"] = f"{parts.replayed} groups a step of the newest {replay.groups:,}{age}"
        return lines

    def groups(self, policy: Policy, step: int, *, size: int | None = None) -> Rollout:
        """Returns sampled, recorded and replayed groups, in this order. Early steps are smaller: fewer are kept."""
        counts = shares(self.config, size)
        sampled = self.sampled.groups(policy, step, size=max(1, counts.sampled))
        parts, details = [sampled], dict[str, float]()
        if self.recorded is not None:
            parts.append(self.recorded.groups(policy, step, size=counts.recorded))
            details["groups/recorded"] = counts.recorded
        if self.buffer is not None:
            past = self.buffer.drawn(step, counts.replayed)
            if past:
                parts.append(recorded_rollout(policy, self._groups(past), range(len(past)), None))
                details["replay/age"] = float(np.mean([step - group.step for group in past]))
            details |= {"groups/replayed": len(past)}
            self.buffer.add(policy, step, sampled, self.sampled.numbers, self.prompts)
            details["replay/kept"] = len(self.buffer.past)
        joined = join(policy, parts)
        joined.details.update(details)
        return joined

    def _groups(self, past: Sequence[Past]) -> Groups:
        prompts, numbers = self.prompts, [group.prompt for group in past]
        chosen = Prompts(
            [prompts.prompts[i] for i in numbers],
            [prompts.tokens[i] for i in numbers],
            [prompts.columns[i] for i in numbers],
            rows=[prompts.row(i) for i in numbers],
        )
        return Groups(chosen, [group.group for group in past], RecordedRows(RUN, "its own", ()))

    def state(self) -> dict[str, Any]:
        """State for the checkpoint; see `Source`."""
        return self.sampled.state() | ({"replay": self.buffer.state()} if self.buffer else {})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned."""
        self.sampled.restore(state)
        if self.buffer is not None:
            self.buffer.restore(state.get("replay", ()), self.prompts)

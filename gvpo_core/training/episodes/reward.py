"""The environment's reward, used together with the reward functions of a run."""

from collections.abc import Collection, Sequence
from typing import Any

from gvpo_core.training.rewards import Reward, RewardLog
from gvpo_core.training.rewards.calls import Columns
from gvpo_core.training.rewards.worker.functions import Signature

COLUMN = "environment_reward"
"""Column of the episodes' rewards. Reward functions may read it too."""


class FromEpisodes:
    """A `Caller` that returns the rewards of the environments."""

    width = 1
    start = 0.0
    signature = Signature([], [], True, [])

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Columns, limit: float, until: float
    ) -> Any:
        """See Caller."""
        return list(columns[COLUMN])

    def wrong_columns(self, columns: Collection[str] | None) -> str | None:
        """See Caller."""
        return None

    def close(self) -> None:
        """See Caller."""


def environment_reward(weight: float, log: RewardLog) -> Reward:
    """Returns the reward named environment."""
    return Reward("environment", FromEpisodes(), weight, log=log)

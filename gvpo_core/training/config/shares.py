"""The numbers of a step's groups by origin: sampled, from data.recorded, and replayed ([replay])."""

from dataclasses import dataclass

from gvpo_core.training.config.settings import Config


@dataclass(frozen=True)
class Shares:
    """Numbers of groups of a step."""

    sampled: int  # below 1 in settings that `check_config` rejects
    recorded: int
    replayed: int


def shares(config: Config, size: int | None = None) -> Shares:
    """Returns the numbers for a step of `size` groups. Default: rollout.prompts."""
    size = size or config.rollout.prompts
    recorded = round(size * config.data.recorded_share) if config.data.recorded else 0
    replayed = round(size * config.replay.share) if config.replay.groups else 0
    return Shares(size - recorded - replayed, recorded, replayed)

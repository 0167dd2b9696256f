"""How many groups of a step come from where: drawn, of data.recorded, and past ones of [replay]."""

from dataclasses import dataclass

from gvpo_core.training.config.settings import Config


@dataclass(frozen=True)
class Shares:
    """Groups of a step."""

    sampled: int  # below 1: settings that `check_config` refuses
    recorded: int
    replayed: int


def shares(config: Config, size: int | None = None) -> Shares:
    """The groups of a step of `size`; default rollout.prompts."""
    size = size or config.rollout.prompts
    recorded = round(size * config.data.recorded_share) if config.data.recorded else 0
    replayed = round(size * config.replay.share) if config.replay.groups else 0
    return Shares(size - recorded - replayed, recorded, replayed)

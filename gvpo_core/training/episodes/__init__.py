"""Episodes: several turns of the policy, with tools and environments between them."""

from gvpo_core.training.episodes.environments import Environments
from gvpo_core.training.episodes.play import EnvironmentFailed, Episode, ends_of, episode_metrics, episode_rows
from gvpo_core.training.episodes.prompts import EpisodePrompts, episode_prompts
from gvpo_core.training.episodes.reward import COLUMN, environment_reward
from gvpo_core.training.episodes.transcript import Chat, Transcript

__all__ = [
    "COLUMN",
    "Chat",
    "EnvironmentFailed",
    "Environments",
    "Episode",
    "EpisodePrompts",
    "Transcript",
    "ends_of",
    "environment_reward",
    "episode_metrics",
    "episode_prompts",
    "episode_rows",
]

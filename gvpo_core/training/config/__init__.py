"""The settings of a run, and how files and command lines set them."""

from gvpo_core.training.config.servers import EngineConfig, TeacherConfig
from gvpo_core.training.config.settings import (
    Config,
    ConfigError,
    DataConfig,
    EnvironmentConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReplayConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ReplayConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TeacherConfig",
]

"""The training loop, for use from Python: `train(config, policy)` with any `Policy`."""

from gvpo_core.training.config import (
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    EnvironmentConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReplayConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
)
from gvpo_core.training.evaluation import evaluate
from gvpo_core.training.loop import train
from gvpo_core.training.policy import Batch, Coefficients, Policy, Response, Update
from gvpo_core.training.policy.load import load_policy
from gvpo_core.training.report.result import Result
from gvpo_core.training.sampling import Sampling

__all__ = [
    "Batch",
    "Coefficients",
    "Config",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Policy",
    "ReplayConfig",
    "Response",
    "Result",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "Sampling",
    "TeacherConfig",
    "Update",
    "evaluate",
    "load_policy",
    "train",
]

"""GVPO (Group Variance Policy Optimization, arXiv 2504.19599): the core functions, and the trainer on first use.

The functions of `gvpo_core` work on your own arrays. `train`, `load_policy`, `Config` and the other names of
`gvpo_core.training` are imported on first access, so `import gvpo` needs only NumPy and array-api-compat.
"""

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

import gvpo_core
from gvpo_core import *  # noqa: F403
from gvpo_core import __version__

if TYPE_CHECKING:
    from gvpo_core.training import *  # noqa: F403

_TRAINER = (
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
)
__all__ = [*gvpo_core.__all__, *_TRAINER, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _TRAINER:
        value = getattr(import_module("gvpo_core.training"), name)
        globals()[name] = value
        return value
    close = get_close_matches(name, __all__, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise AttributeError(f"module 'gvpo' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted(__all__)

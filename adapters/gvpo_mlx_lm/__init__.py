"""GVPO on offline groups through mlx-lm's own trainer: `mlx_lm.lora` for scored responses.

`python -m gvpo_mlx_lm --config lora.yaml --beta 0.1` takes mlx-lm's settings. In Python, use `load`, `load_groups` and
`train`.
"""

from gvpo_core.hosts import Host, SettingsError

HOST = Host("gvpo_mlx_lm", "mlx-lm", "mlx-lm", "0.32.0", "0.33", "average micro-batches otherwise")
HOST.check()
try:
    import mlx.core  # noqa: F401
    import mlx_lm  # noqa: F401
except ImportError as error:
    raise HOST.missing(error) from error

from gvpo_mlx_lm.groups import Group, load_groups
from gvpo_mlx_lm.models import ModelError, check_model, check_rope, load
from gvpo_mlx_lm.training import GVPO, response_logprobs, train

__all__ = [
    "GVPO",
    "Group",
    "ModelError",
    "SettingsError",
    "check_model",
    "check_rope",
    "load",
    "load_groups",
    "response_logprobs",
    "train",
]

"""Exact GVPO in TRL: `GVPOTrainer` for `GRPOTrainer`, `GVPOConfig` for `GRPOConfig`, and nothing else changes."""

try:
    import trl  # noqa: F401
except ImportError as error:
    raise ImportError('gvpo_trl needs TRL: pip install "gvpo[trl]"') from error

from gvpo_trl.config import GVPOConfig
from gvpo_trl.trainer import GVPOTrainer

__all__ = ["GVPOConfig", "GVPOTrainer"]

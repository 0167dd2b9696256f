"""Exact GVPO in TRL: `GVPOTrainer` replaces `GRPOTrainer`, `GVPOConfig` replaces `GRPOConfig`; nothing else changes."""

from gvpo_core.hosts import Host

HOST = Host("gvpo_trl", "trl", "trl", "1.16", "1.17", "lack the methods that it overrides")
HOST.check()
try:
    import trl  # noqa: F401
except ImportError as error:
    raise HOST.missing(error) from error

from gvpo_trl.config import GVPOConfig
from gvpo_trl.trainer import GVPOTrainer

__all__ = ["GVPOConfig", "GVPOTrainer"]

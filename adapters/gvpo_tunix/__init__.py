"""Exact GVPO in Tunix: `GVPOConfig` and `GVPOLearner` replace GRPOConfig and GRPOLearner."""

from gvpo_core.hosts import Host, SettingsError

HOST = Host("gvpo_tunix", "tunix", "google-tunix", "0.1.7", "0.1.8", "batch, mask or score otherwise")
HOST.check()
try:
    import tunix  # noqa: F401
except ImportError as error:
    raise HOST.missing(error) from error

from gvpo_tunix.config import GVPOConfig
from gvpo_tunix.learner import GVPOLearner
from gvpo_tunix.rope import check_rope, mend_llama

__all__ = ["GVPOConfig", "GVPOLearner", "SettingsError", "check_rope", "mend_llama"]

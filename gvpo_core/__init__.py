"""GVPO (Group Variance Policy Optimization, arXiv 2504.19599) on the arrays you already hold."""

from gvpo_core.groups import dense_group_ids
from gvpo_core.objective import (
    GVPOLoss,
    GVPORegret,
    gvpo_coefficients,
    gvpo_loss,
    gvpo_regret,
    gvpo_surrogate,
    gvpo_weights,
    sequence_logprobs,
)

__all__ = [
    "GVPOLoss",
    "GVPORegret",
    "dense_group_ids",
    "gvpo_coefficients",
    "gvpo_loss",
    "gvpo_regret",
    "gvpo_surrogate",
    "gvpo_weights",
    "sequence_logprobs",
]
__version__ = "0.1.0"

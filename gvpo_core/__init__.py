"""GVPO (Group Variance Policy Optimization, arXiv 2504.19599) on the arrays you already hold."""

from gvpo_core.baselines import (
    clipped_ratio_weights,
    dr_grpo_weights,
    grpo_weights,
    importance_ratio,
    reject_sampling_weights,
    rloo_weights,
    sft_weights,
)
from gvpo_core.groups import dense_group_ids
from gvpo_core.objective import (
    GVPOLoss,
    gvpo_coefficients,
    gvpo_loss,
    gvpo_surrogate,
    gvpo_weights,
    sequence_logprobs,
)
from gvpo_core.objectives import OBJECTIVES, objective_coefficients
from gvpo_core.preferences import bradley_terry_loss, dpo_loss, dpo_weights
from gvpo_core.regret import GVPORegret, gvpo_regret

__all__ = [
    "OBJECTIVES",
    "GVPOLoss",
    "GVPORegret",
    "bradley_terry_loss",
    "clipped_ratio_weights",
    "dense_group_ids",
    "dpo_loss",
    "dpo_weights",
    "dr_grpo_weights",
    "grpo_weights",
    "gvpo_coefficients",
    "gvpo_loss",
    "gvpo_regret",
    "gvpo_surrogate",
    "gvpo_weights",
    "importance_ratio",
    "objective_coefficients",
    "reject_sampling_weights",
    "rloo_weights",
    "sequence_logprobs",
    "sft_weights",
]
__version__ = "0.1.0"

"""The interface of a backend, and helpers for writing one."""

from gvpo_core.training.policy.facts import MemoryFacts, PolicyFacts
from gvpo_core.training.policy.protocol import (
    Batch,
    Coefficients,
    Mask,
    Policy,
    PolicySettings,
    Prompt,
    Response,
    ResponseError,
    Segment,
    Tokens,
    Update,
    later_of,
    masks_of,
)

__all__ = [
    "Batch",
    "Coefficients",
    "Mask",
    "MemoryFacts",
    "Policy",
    "PolicyFacts",
    "PolicySettings",
    "Prompt",
    "Response",
    "ResponseError",
    "Segment",
    "Tokens",
    "Update",
    "later_of",
    "masks_of",
]

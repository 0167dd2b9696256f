"""Samplers: they draw responses instead of the policy."""

from gvpo_core.training.samplers.engine import Engine
from gvpo_core.training.samplers.in_process import VLLM
from gvpo_core.training.samplers.protocol import Drawn, Sampler, SamplerError, Text

__all__ = ["VLLM", "Drawn", "Engine", "Sampler", "SamplerError", "Text"]

"""What draws responses in the place of the policy."""

from gvpo_core.training.samplers.engine import Engine
from gvpo_core.training.samplers.protocol import Drawn, Sampler, SamplerError, Text

__all__ = ["Drawn", "Engine", "Sampler", "SamplerError", "Text"]

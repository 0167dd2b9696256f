"""GVPO's PyTorch backend: a language model of transformers as a policy; docs/models.md lists the families.

`load` makes a policy for the loop of `gvpo_core.training`; `token_logprobs` works alone.
"""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError('gvpo_torch needs PyTorch: pip install "gvpo[torch]"') from error

from gvpo_torch.logprobs import token_logprobs
from gvpo_torch.policy import TorchPolicy, load

__all__ = ["TorchPolicy", "load", "token_logprobs"]

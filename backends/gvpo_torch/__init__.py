"""GVPO's PyTorch backend: trains causal language models of transformers; docs/models.md lists the model families.

`load` makes a policy for the loop of `gvpo_core.training`. `token_logprobs` also works on its own.
"""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError('gvpo_torch needs PyTorch: pip install "gvpo[torch]"') from error

from gvpo_torch.logprobs import token_logprobs
from gvpo_torch.policy import TorchPolicy, load

__all__ = ["TorchPolicy", "load", "token_logprobs"]

"""GVPO's MLX backend: any language model of mlx-lm as a policy, quantized ones with adapters.

`load` makes a policy for the loop of `gvpo_core.training`; `token_logprobs` works alone.
"""

try:
    import mlx.core  # noqa: F401
except ImportError as error:
    raise ImportError('gvpo_mlx needs MLX: pip install "gvpo[mlx]"') from error

from gvpo_mlx.logprobs import token_logprobs
from gvpo_mlx.policy import MLXPolicy, load

__all__ = ["MLXPolicy", "load", "token_logprobs"]

"""GVPO's MLX backend: trains any language model of mlx-lm, and adapters on quantized models.

`load` returns a policy for the training loop in `gvpo_core.training`. `token_logprobs` works on its own.
"""

try:
    import mlx.core  # noqa: F401
except ImportError as error:
    raise ImportError('gvpo_mlx needs MLX: pip install "gvpo[mlx]"') from error

from gvpo_mlx.logprobs import token_logprobs
from gvpo_mlx.policy import MLXPolicy, load

__all__ = ["MLXPolicy", "load", "token_logprobs"]

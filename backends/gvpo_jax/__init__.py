"""GVPO's JAX backend: trains the decoder families listed in `families.py` on TPU, GPU or CPU, over a device mesh.

`load` returns a policy for the training loop in `gvpo_core.training`. `token_logprobs` works on its own.
"""

try:
    import jax  # noqa: F401
    import optax  # noqa: F401
    import orbax.checkpoint  # noqa: F401
except ImportError as error:
    raise ImportError('gvpo_jax needs JAX, optax and orbax: pip install "gvpo[jax]"') from error

from gvpo_jax.logprobs import token_logprobs
from gvpo_jax.policy import JaxPolicy, load

__all__ = ["JaxPolicy", "load", "token_logprobs"]

"""GVPO's JAX backend: decoders of the families in `families.py` as policies on TPU, GPU or CPU, over a mesh.

`load` makes a policy for the loop of `gvpo_core.training`; `token_logprobs` works alone.
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

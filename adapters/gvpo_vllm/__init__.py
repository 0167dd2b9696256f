"""Receives a trainer's weights over TCP in vLLM's workers.

Start the server with `vllm serve MODEL --worker-extension-cls gvpo_vllm.Worker --weight-transfer-config
'{"backend": "tcp"}'`, and set engine.transfer = "tcp" in the run.
"""

try:
    import vllm  # noqa: F401
except ImportError as error:
    raise ImportError(f"gvpo_vllm needs vllm ({error}): it runs in vLLM's server") from error

from gvpo_vllm.tcp import TCPEngine, Worker

__all__ = ["TCPEngine", "Worker"]

"""Processes that JAX joins, on this machine's CPU."""

from ports import free_port

PRELOAD = ("gvpo_jax.policy", "gvpo_jax.checkpoint", "transformers.models.auto.tokenization_auto")


def environments(size: int) -> list[dict[str, str]]:
    """JAX's variables of each of `size` processes."""
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(size)}
    return [shared | {"JAX_PROCESS_ID": str(number), "RANK": str(number)} for number in range(size)]

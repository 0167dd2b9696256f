"""Processes that torchrun's variables join, on this machine's CPU."""

from collections.abc import Sequence
from pathlib import Path

import forks
from places import SUPPORT
from ports import free_port

PRELOAD = ("gvpo_torch.policy", "peft", "transformers.models.llama.modeling_llama")


def environments(size: int) -> list[dict[str, str]]:
    """torchrun's variables of each of `size` processes."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    if size > 1:
        shared |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def run_processes(size: int, worker: str, arguments: Sequence[str], out: Path) -> None:
    """Starts `size` processes of a script of conformance/support and waits; their output goes into `out`.

    Raises: AssertionError: one that fails or hangs, with the end of what each printed.
    """
    logs = [out / f"rank{rank}.log" for rank in range(size)]
    statuses = forks.run_together(
        forks.run_script, (str(SUPPORT / worker), *arguments), logs, environments(size), preload=PRELOAD
    )
    texts = "\n".join(log.read_text()[-3000:] for log in logs if log.exists())
    assert statuses == [0] * size, f"workers ended with {statuses}:\n{texts}"

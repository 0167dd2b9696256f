"""Processes that torchrun's variables join, on this machine's CPU."""

import runpy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import forks
import killing
from places import SUPPORT
from ports import free_port

PRELOAD = (
    "gvpo_core.training.cli",
    "gvpo_core.training.loop",
    "gvpo_torch.policy",
    "peft",
    "transformers.models.llama.modeling_llama",
)
SECONDS = 240


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
    statuses = _ended(_run, (str(SUPPORT / worker), *arguments), logs)
    texts = "\n".join(log.read_text()[-3000:] for log in logs if log.exists())
    assert statuses == [0] * size, f"workers ended with {statuses}:\n{texts}"


def train(size: int, config: Path) -> tuple[int, str]:
    """`gvpo train config` in `size` processes: the worst exit status, and what all printed."""
    logs = [config.with_name(f"rank{rank}.log") for rank in range(size)]
    statuses = _ended(killing.train, (str(config),), logs)
    return max(abs(-1 if s is None else s) for s in statuses), "\n".join(log.read_text() for log in logs)


def _ended(function: Callable[..., None], arguments: Sequence[str], logs: Sequence[Path]) -> list[int | None]:
    """Exit statuses of a process for each log; None: it did not end in time and was killed."""
    workers = [
        forks.start(function, arguments, log, environment=environment, preload=PRELOAD)
        for log, environment in zip(logs, environments(len(logs)), strict=True)
    ]
    end = time.monotonic() + SECONDS
    for process in workers:
        process.join(max(0.0, end - time.monotonic()))
    statuses = [process.exitcode for process in workers]
    for process in workers:
        process.kill()
        process.join()
    return statuses


def _run(script: str, *arguments: str) -> None:
    """As `python script arguments` does."""
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")

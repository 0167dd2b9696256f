"""Processes forked from a server that has imported what they need: a start in milliseconds."""

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from places import SUPPORT

_CONTEXT = multiprocessing.get_context("forkserver")
# What every run imports.
_PRELOAD = ("gvpo_core.training.cli", "gvpo_core.training.loop", "tyro", "tomli_w", "array_api_compat.numpy")
_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def start(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    preload: Sequence[str] = (),
) -> ForkServerProcess:
    """Calls `function(*arguments)` in a new process, its output at the end of `log`.

    Args:
      environment: beside this process's own, that of now: the server may be of an earlier test.
      preload: modules that the server imports beside the trainer's; the first call of a process decides.
    """
    _CONTEXT.set_forkserver_preload([*_PRELOAD, *preload])
    # One thread a library: a fork would lose the others.
    with mock.patch.dict(os.environ, _THREADS), mock.patch.object(sys, "path", [str(SUPPORT), *filter(None, sys.path)]):
        forkserver.ensure_running()
    environment = {**os.environ, **(environment or {})}
    process = _CONTEXT.Process(target=_called, args=(function, tuple(arguments), environment, str(log)))
    process.start()
    return process


def run_together(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    logs: Sequence[Path],
    environments: Sequence[Mapping[str, str]],
    *,
    preload: Sequence[str] = (),
    seconds: float = 240,
) -> list[int | None]:
    """Calls `function(*arguments)` in a process for each log and environment, and waits.

    Returns: the exit statuses; None: it did not end in time and was killed.
    """
    started = [
        start(function, arguments, log, environment=environment, preload=preload)
        for log, environment in zip(logs, environments, strict=True)
    ]
    end = time.monotonic() + seconds
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
    statuses = [process.exitcode for process in started]
    for process in started:
        process.kill()
        process.join()
    return statuses


def run_script(script: str, *arguments: str) -> None:
    """As `python script arguments` does."""
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def _called(function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "a") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    function(*arguments)

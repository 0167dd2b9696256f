"""Processes forked from a server that has imported what they need: a start in milliseconds."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from places import SUPPORT

_CONTEXT = multiprocessing.get_context("forkserver")
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
      preload: modules that the server imports; the first call of a process decides.
    """
    _CONTEXT.set_forkserver_preload(list(preload))
    # One thread a library: a fork would lose the others.
    with mock.patch.dict(os.environ, _THREADS), mock.patch.object(sys, "path", [str(SUPPORT), *filter(None, sys.path)]):
        forkserver.ensure_running()
    environment = {**os.environ, **(environment or {})}
    process = _CONTEXT.Process(target=_called, args=(function, tuple(arguments), environment, str(log)))
    process.start()
    return process


def _called(function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "a") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    function(*arguments)

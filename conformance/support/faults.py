"""Runs `gvpo train` in a forked process that kills itself at the n-th chosen event: a file call, or a phase's start."""

import builtins
import hashlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import forks

PHASES = ("generate", "reward", "update", "evaluate", "save")
_FUNCTIONS = {
    "reward": ("gvpo_core.training.rollout", "call_rewards"),
    "evaluate": ("gvpo_core.training.loop", "evaluated"),
}  # the other phases are methods of the policy, whatever backend it is of


def run(
    config: Path, fault: str = "", at: int = 0, number: int = signal.SIGKILL, *, preload: Sequence[str] = ()
) -> int:
    """The exit status of a run in which event number `at` (from 1) of kind `fault` sends it the signal `number`.

    Args:
      fault: "" for none, "call" (sync, rename, make, remove), "write" (which is left half done), or one of PHASES.
      preload: modules imported once before runs are forked, beside the trainer's.
    """
    log = config.parent / "output.txt"
    process = forks.start(_run, (str(config), fault, at, int(number)), log, preload=preload)
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def _run(config: str, fault: str, at: int, number: int) -> None:
    from gvpo_core.training.cli import main

    if os.environ.get("GVPO_TEST_SAVES_BESIDE"):
        _save_beside()
    count = 0

    def event(first: Callable[[], Any] = lambda: None) -> None:
        nonlocal count
        count += 1
        if count == at:
            first()
            os.kill(os.getpid(), number)

    if fault in _FUNCTIONS:
        _before(*_FUNCTIONS[fault], event)
    elif fault in PHASES:
        _in_policy(fault, event)
    elif fault == "call":
        for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
            _before("os", name, event)
    elif fault == "write":
        _writes(event)
    sys.exit(main(["train", config]))


def _save_beside() -> None:
    """Gives the table policy what a large one has: `saving`, whose files are written beside the next step."""
    from gvpo_core.training.policy.table import TablePolicy
    from gvpo_core.training.policy.tensor_file import Digest

    def saving(policy: Any, directory: Path) -> Callable[[], dict[str, Digest]]:
        def write() -> dict[str, Digest]:
            policy.save(directory)
            contents = {path.name: path.read_bytes() for path in directory.iterdir()}
            return {name: Digest(len(c), hashlib.sha256(c).hexdigest()) for name, c in contents.items()}

        return write

    TablePolicy.saving = saving  # type: ignore[attr-defined]


def _in_policy(name: str, event: Callable[[], None]) -> None:
    """Makes a method of the policy that the run loads an event."""
    from gvpo_core.training.policy import load as backend

    real_load = backend.load_policy

    def load(config: Any) -> Any:
        policy = real_load(config)
        method = "saving" if name == "save" and hasattr(policy, "saving") else name
        real = getattr(policy, method)

        def wrapped(*args: Any, **options: Any) -> Any:
            event()
            return real(*args, **options)

        setattr(policy, method, wrapped)
        return policy

    backend.load_policy = load


def _before(module: str, name: str, event: Callable[[], None]) -> None:
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, last)

    def wrapped(*args: Any, **options: Any) -> Any:
        event()
        return real(*args, **options)

    setattr(owner, last, wrapped)


def _writes(event: Callable[..., None]) -> None:
    """Counts writes made from Python."""
    real_open = io.open

    def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        stream = real_open(file, mode, *args, **options)
        writes = any(letter in mode for letter in "wax+") and str(file) != os.devnull
        return _Counted(stream, event) if writes and not isinstance(file, int) else stream

    io.open = builtins.open = opened  # type: ignore[assignment]


class _Counted:
    """A file whose writes are events."""

    def __init__(self, stream: Any, event: Callable[..., None]) -> None:
        self._stream, self._event = stream, event

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._stream.write(data[: len(data) // 2])
            self._stream.flush()

        self._event(half)
        return self._stream.write(data)

    def __enter__(self) -> "_Counted":
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Any:
        return iter(self._stream)

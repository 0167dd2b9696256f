"""Sends the numbers of metrics.jsonl, under the same names, to wandb, trackio and TensorBoard.

A missing tracker is an error before the run. A tracker that fails during the run is dropped with one warning, and the
run continues. A tracker's package is imported only if run.trackers names it.
"""

import contextlib
import difflib
import importlib
import json
import os
import secrets
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from gvpo_core.training.config import ConfigError
from gvpo_core.training.files.disk import write_synced

Numbers = dict[str, float]


class TrackerError(RuntimeError):
    """A tracker did not start."""


class Tracker(Protocol):
    """A destination for records of metrics.jsonl."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Sends the numbers of one record; events and nulls are left out."""

    def close(self) -> None:
        """Flushes and closes the tracker; further calls do nothing."""


class _Backend(Protocol):
    def send(self, numbers: Numbers, step: int, time: float) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    module, install = "tensorboard.summary", "tensorboard"

    def __init__(self, module: Any, run: Path, identity: str, config: Mapping[str, Any]) -> None:
        del identity, config  # TensorBoard identifies a run by its folder
        self._writer = module.Writer(str(run / "tensorboard"))  # needs no framework, unlike torch.utils.tensorboard

    def send(self, numbers: Numbers, step: int, time: float) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step, wall_time=time)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    module, install = "wandb", "wandb"

    def __init__(self, module: Any, run: Path, identity: str, config: Mapping[str, Any]) -> None:
        self._run = module.init(
            project=os.environ.get("WANDB_PROJECT", "gvpo"),
            name=run.name,
            id=identity,
            resume="allow",
            dir=str(run),
            config=dict(config),
            settings=module.Settings(console="off"),  # do not capture the console or copy it to wandb's server
        )
        # wandb's own step must increase, but an evaluation has the same step as a training record: use ours as axis.
        self._run.define_metric("*", step_metric="step")

    def send(self, numbers: Numbers, step: int, time: float) -> None:
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    module, install = "trackio", "trackio"

    def __init__(self, module: Any, run: Path, identity: str, config: Mapping[str, Any]) -> None:
        self._run = module.init(
            project=os.environ.get("TRACKIO_PROJECT", "gvpo"),
            name=f"{run.name}-{identity[:8]}",
            resume="allow",
            config=dict(config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def send(self, numbers: Numbers, step: int, time: float) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


_KINDS: dict[str, Any] = {"wandb": _Wandb, "trackio": _Trackio, "tensorboard": _TensorBoard}


def open_trackers(
    names: Sequence[str],
    run: Path,
    config: Mapping[str, Any],
    *,
    warn: Callable[[str], None] | None = None,
) -> Tracker:
    """Returns one tracker that sends records to all named trackers; without names it does nothing.

    Args:
      names: any of wandb, trackio, tensorboard.
      run: the run folder. Its `trackers.json` holds the run's id and the last step sent, so that a resumed run
        continues the same run in the tracker and sends no step twice.
      config: settings that the tracker shows with the run.
      warn: called once when a tracker fails. Default: warnings.warn.
    Raises: ConfigError: see check_trackers. TrackerError: a tracker does not start (no login, no network).
    """
    modules = check_trackers(names)
    state = _State(run / "trackers.json") if names else None
    backends: dict[str, _Backend] = {}
    for name in dict.fromkeys(names):
        assert state is not None
        try:
            with _stdout_to_stderr():
                backends[name] = _KINDS[name](modules[name], run, state.identity, config)
        except Exception as e:
            raise TrackerError(
                f"tracker {name!r} did not start ({type(e).__name__}: {e}); fix that or remove it from run.trackers"
            ) from e
    return _Trackers(backends, state, warn or (lambda message: warnings.warn(message, stacklevel=3)))


def check_trackers(names: Sequence[str]) -> dict[str, Any]:
    """Imports the trackers' packages; returns them by name.

    Raises: ConfigError: a tracker is unknown, or its package is missing or broken; the message has the command that
      installs it.
    """
    for name in names:
        if name not in _KINDS:
            close = difflib.get_close_matches(name.lower(), _KINDS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"run.trackers has {name!r}; expected {', '.join(_KINDS)}{hint}")
    modules = {}
    for name in dict.fromkeys(names):
        kind = _KINDS[name]
        try:
            with _stdout_to_stderr():
                modules[name] = importlib.import_module(kind.module)
        except Exception as e:
            raise ConfigError(
                f"tracker {name!r} cannot be imported ({type(e).__name__}: {e}): pip install {kind.install}"
            ) from e
    return modules


class _Trackers:
    def __init__(self, backends: dict[str, _Backend], state: "_State | None", warn: Callable[[str], None]) -> None:
        self._backends, self._state, self._warn = backends, state, warn

    def log(self, record: Mapping[str, Any]) -> None:
        kind, step = record["kind"], record["step"]
        if self._state is None or kind == "event" or step <= self._state.sent.get(kind, -1):
            return
        numbers = {
            key: value
            for key, value in record.items()
            if key not in ("step", "time") and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for name, backend in list(self._backends.items()):
            self._guard(name, partial(backend.send, dict(numbers), step, record["time"]))
        self._state.mark(kind, step)

    def close(self) -> None:
        for name, backend in list(self._backends.items()):
            self._guard(name, backend.close)
        self._backends.clear()

    def _guard(self, name: str, call: Callable[[], None]) -> None:
        try:
            with _stdout_to_stderr():
                call()
        except Exception as e:
            self._backends.pop(name, None)
            self._warn(f"tracker {name!r} failed and is off for the rest of the run: {type(e).__name__}: {e}")


class _State:
    """trackers.json: the run's id in the trackers, and the last step sent for each kind of record."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            self.identity, self.sent = str(state["id"]), {k: int(v) for k, v in state["sent"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no file yet, or one cut short by a kill
            self.identity, self.sent = secrets.token_hex(8), {}

    def mark(self, kind: str, step: int) -> None:
        self.sent[kind] = step
        with contextlib.suppress(OSError):  # the next checkpoint reports a full disk
            write_synced(self._path, json.dumps({"id": self.identity, "sent": self.sent}).encode())


def _stdout_to_stderr() -> contextlib.redirect_stdout[Any]:
    # trackio prints to stdout, which must hold only the run's own parsable output.
    return contextlib.redirect_stdout(sys.stderr)

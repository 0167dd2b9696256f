"""`gvpo collect`: draws and scores the responses of a run's steps, without an update; `gvpo train` trains on the file.

The file is called `OUT.jsonl.partial` until the last step is done. It grows by whole steps, so a kill loses only the
current step.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from gvpo_core.training.config import Config, ConfigError, ReplayConfig, TeacherConfig
from gvpo_core.training.config.file import as_table
from gvpo_core.training.data import Prompts
from gvpo_core.training.files.disk import is_at, lock, make_synced, refuse_special, sync_folder, without_locks
from gvpo_core.training.files.records import append_synced, cut, encoded, records
from gvpo_core.training.inputs import Inputs
from gvpo_core.training.policy import Policy
from gvpo_core.training.policy.ranks import attempt, highest
from gvpo_core.training.rollout import Rollout
from gvpo_core.training.run.leaving import leaving
from gvpo_core.training.run.signals import StopRequest
from gvpo_core.training.samplers.load import opened_sampler
from gvpo_core.training.terminal.output import say, show_progress
from gvpo_core.training.terminal.text import fit

_log = logging.getLogger("gvpo")
# Sections, and settings of the engine, that the responses and rewards depend on.
_IDENTITY_SECTIONS = ("model", "data", "rollout", "rewards", "environment")
_WRITTEN_COLUMNS = frozenset(
    (
        *("kind", "step", "step_groups", "group", "row", "settings", "prompt", "prompt_ids"),
        *("responses", "rewards", "finished", "reward_parts", "response_ids", "response_mask", "response_segments"),
    )
)
"""Columns that gvpo collect writes itself."""
_IDENTITY_ENGINE_KEYS = ("kind", "options", "model", "tokens", "weights", "omit", "fields")


class CollectError(RuntimeError):
    """The output file cannot be written or has changed."""


def for_collecting(config: Config) -> Config:
    """The settings for a collection: only sampled groups, no held-out data, no reference model."""
    data, objective = (
        replace(config.data, evaluation="", recorded=""),
        replace(config.objective, reference="rollout"),
    )
    rollout = replace(config.rollout, equal="keep", truncated="keep")  # applied later, when a run trains on the file
    teacher = config.teacher if rollout.sampler == "teacher" else TeacherConfig()
    return replace(config, data=data, objective=objective, rollout=rollout, replay=ReplayConfig(), teacher=teacher)


def refuse_name(out: Path) -> None:
    """Raises ConfigError: the file exists, or its name does not end with .jsonl or .json."""
    if out.suffix not in (".jsonl", ".json"):
        raise ConfigError(f"{out}: expected a name that ends with .jsonl")
    if out.exists():
        raise ConfigError(f"{out} already exists; remove it, or give another name")


def collect(inputs: Inputs, policy: Policy, out: Path) -> int:
    """Draws and scores `run.steps` steps of groups into `out`, or continues a started file; returns the exit status.

    Step t uses the prompts and seeds of step t of the run. Every rank must call this function.

    Raises: ConfigError: `out` exists, or was started with other settings. CollectError: `out` cannot be written.
    """
    if inputs.recorded is not None:
        raise ConfigError(
            "the training data holds recorded responses, and gvpo collect draws new ones: set rollout.source ="
            " 'sampled'"
        )
    last = inputs.config.run.steps
    opened = opened_sampler(inputs.config, policy, trained=False)
    with opened as sampler, StopRequest() as stop, _Growing(out, inputs, policy) as file:
        inputs.heed(sampler, lambda: bool(stop.signal))
        source = inputs.source(policy, sampler, trained=False)
        step = highest(policy, attempt(policy, file.open, main_only=True) or 0)
        stopping = highest(policy, stop.signal)
        while step < last and not stopping:
            step += 1
            rollout = None
            with leaving(policy, stop):
                rollout = source.groups(policy, step)
            if rollout is None:
                step, stopping = step - 1, highest(policy, stop.signal)
                break
            attempt(policy, partial(file.append, step, rollout, source.prompts), main_only=True)
            stopping = highest(policy, stop.signal)
        attempt(policy, partial(file.end, step), main_only=True)
    return 128 + stopping if step < last else 0


def _groups(
    step: int, rollout: Rollout, prompts: Prompts, rows: Sequence[Mapping[str, Any]], settings: str
) -> Iterator[dict[str, Any]]:
    """Yields one record for each group, in the format of recorded groups."""
    ordered = sorted(rollout.completions, key=lambda c: c["group"])  # a sampler's may follow the policy's own
    members_of = [list(members) for _, members in groupby(ordered, key=lambda c: c["group"])]
    for responses in members_of:
        first = responses[0]
        record = {"kind": "train", "step": step, "step_groups": len(members_of), "group": first["group"]}
        record |= {"row": first["row"], "settings": settings}
        record |= {
            "prompt": first["messages"] or first["prompt"],
            "responses": [response["response"] for response in responses],
            "rewards": [response["reward"] for response in responses],
            "finished": [response["finished"] for response in responses],
            "reward_parts": [response["rewards"] for response in responses],
        }
        record |= {"prompt_ids": first["prompt_ids"]} if first.get("prompt_ids") else {}
        for column in ("response_ids", "response_mask", "response_segments"):
            values = [response.get(column) for response in responses]
            record |= {column: values} if any(value is not None for value in values) else {}
        row = rows[first["row"]]
        yield record | {name: row[name] for name in prompts.names if name in row and not _why_left_out(name, row[name])}


def _why_left_out(name: str, value: Any) -> str:
    """The reason why a column is left out of a row's record; empty if it is not left out."""
    if name in _WRITTEN_COLUMNS:
        return "the file has a column of its own of that name"
    try:
        return "" if _survives_json(value) else f"JSON would change its {type(value).__name__} ({value!r:.60})"
    except RecursionError:
        return f"its {type(value).__name__} nests too deep"


def _survives_json(value: Any) -> bool:
    """Whether JSON preserves the value: no tuple, date or NaN, and no mapping with keys other than strings."""
    if isinstance(value, Mapping):
        return type(value) is dict and all(type(k) is str and _survives_json(v) for k, v in value.items())
    if type(value) is list:
        return all(map(_survives_json, value))
    return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


class _Growing:
    """The output file while it grows. Only the main rank calls its methods."""

    def __init__(self, out: Path, inputs: Inputs, policy: Policy) -> None:
        self.out, self._file = out, out.absolute()  # a reward in a thread may change the working directory
        self.partial = self._file.with_name(out.name + ".partial")
        self._rows, self._steps, self._prompts = inputs.rows, inputs.config.run.steps, inputs.config.rollout.prompts
        self._lock: IO[bytes] | None = None
        self._left_out: set[str] = set()  # columns named in a warning
        table = as_table(inputs.config)
        identity_settings = {section: table.get(section) for section in _IDENTITY_SECTIONS} | {
            "seed": inputs.config.run.seed
        }
        engine = table.get("engine", {})
        identity_settings |= {"engine": {name: engine.get(name) for name in _IDENTITY_ENGINE_KEYS}}
        if inputs.config.rollout.sampler == "teacher":
            identity_settings["teacher"] = table.get("teacher")
        identity = json.dumps([identity_settings, inputs.fingerprints(policy)], sort_keys=True, default=str)
        self.settings = hashlib.sha256(identity.encode()).hexdigest()[:16]

    def open(self) -> int:
        """Locks the file and returns the number of complete steps in it."""
        refuse_name(self._file)
        try:
            make_synced(self._file.parent)
            refuse_special(self.partial)
            self._lock = self.partial.open("ab")
            self._take_lock(self._lock)
            self._confirm()
            return self._complete_steps()
        except OSError as e:
            raise CollectError(f"cannot write {self.partial}: {e.strerror or e}") from e

    def _take_lock(self, file: IO[bytes]) -> None:
        try:
            lock(file)
        except BlockingIOError as e:
            raise CollectError(f"{self.partial} is in use by another process") from e
        except OSError as e:
            raise CollectError(without_locks(self.partial, e)) from e

    def _complete_steps(self) -> int:
        counts: dict[int, int] = {}
        sizes: dict[int, int] = {}  # groups of a step: fewer than its prompts if a sampler lost one
        for record in records(self.partial):
            if record.get("settings") != self.settings:
                raise ConfigError(
                    f"{self.partial} was started with other settings, data, model or rewards; use the original ones, or"
                    " remove it"
                )
            counts[record["step"]] = counts.get(record["step"], 0) + 1
            sizes[record["step"]] = record.get("step_groups", self._prompts)
        complete = 0
        while counts.get(complete + 1, 0) == sizes.get(complete + 1):
            complete += 1
        cut(self.partial, complete, parse=False)
        if complete:
            _log.info("%s holds %d steps: continuing", self.partial, complete)
        return complete

    def append(self, step: int, rollout: Rollout, prompts: Prompts) -> None:
        """Appends a step and syncs the file to disk."""
        groups = _groups(step, rollout, prompts, self._rows, self.settings)
        self._name_left_out(rollout, prompts)
        self._confirm()
        try:
            append_synced(self.partial, encoded(groups))
        except OSError as e:
            raise CollectError(f"cannot write {self.partial}: {e.strerror or e}; its complete steps are kept") from e
        mean = fit(float(np.nanmean(rollout.rewards)), 6)
        show_progress(f"step {step} of {self._steps}: {len(rollout.rewards)} responses, mean reward {mean}")

    def _confirm(self) -> None:
        """Raises CollectError: the path now leads to another file than the one that was opened."""
        try:
            unchanged = self._lock is None or is_at(self._lock, self.partial)
        except OSError as e:
            raise CollectError(f"cannot read {self.partial}: {e.strerror or e}; its complete steps are kept") from e
        if not unchanged:
            raise CollectError(
                f"{self.partial} was moved, removed or replaced meanwhile: nothing more was written. Move it back and"
                " run the same command, which continues"
            )

    def _name_left_out(self, rollout: Rollout, prompts: Prompts) -> None:
        """Logs one warning for each column that the file cannot hold."""
        for row in sorted({completion["row"] for completion in rollout.completions}):
            for name in sorted({*prompts.names} & self._rows[row].keys() - self._left_out):
                if why := _why_left_out(name, self._rows[row][name]):
                    self._left_out.add(name)
                    _log.warning("column %r of row %d is left out of %s: %s", name, row, self.out, why)

    def end(self, step: int) -> None:
        """Renames the file to its final name if all steps are done."""
        if step < self._steps:
            show_progress(f"stopped after step {step} of {self._steps}; the same command continues")
            return
        self._confirm()
        if self._file.exists():
            raise CollectError(
                f"{self.out} was created meanwhile by another process; the collected steps are in {self.partial}"
            )
        self.partial.rename(self._file)
        sync_folder(self._file.parent)
        say(self.out)

    def __enter__(self) -> "_Growing":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._lock is not None:
            self._lock.close()

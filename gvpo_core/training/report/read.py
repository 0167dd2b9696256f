"""Reads a run folder: series of numbers, and the completions that the page shows.

Every file may be missing, cut short or damaged: a crashed run needs a report most.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_core.training.files.disk import refuse_special
from gvpo_core.training.files.records import is_number
from gvpo_core.training.metrics import read_records
from gvpo_core.training.report.columns import Columns

_BROWSED_STEPS = 60  # steps whose responses the page shows
_ALERTED_STEPS = 20  # largest number of further steps, at which an alert was raised
_KEPT = ("step", "time")  # numbers that stay in a train record
_LABELS = ("group", "end")  # keys of a row of completions that must be text or integers
_HEAD = re.compile(rb'^\{"kind": ?"(train|eval)", ?"step": ?(\d+)')


@dataclass
class Series:
    """The values of one key in the records that have it."""

    steps: np.ndarray  # (n,) float64, increasing
    values: np.ndarray  # (n,) float64; NaN where null

    def __bool__(self) -> bool:
        return bool(np.isfinite(self.values).any())


@dataclass
class Run:
    """The content of a run folder."""

    folder: Path
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    train: list[dict[str, Any]]  # one for each step, in order; their numbers are in `numbers`
    evaluations: list[dict[str, Any]]  # one for each step, in order
    events: list[dict[str, Any]]
    numbers: Columns = field(default_factory=Columns)  # numbers of the train records
    held_out: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # first and last evaluated step -> rows
    browsed: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # step -> all its rows
    problems: list[str] = field(default_factory=list)  # files that could not be read, in words
    _series: dict[tuple[str, str], Series] = field(default_factory=dict, repr=False)
    _keys: dict[str, list[str]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for record in self.train:
            self.numbers.put(record["step"], _numbers(record))

    def series(self, key: str, *, kind: str = "train") -> Series:
        """The values of `key` in the train or eval records that have it. null becomes NaN."""
        if (kind, key) not in self._series and kind == "train":
            self._series[kind, key] = Series(*self.numbers.series(key))
        elif (kind, key) not in self._series:
            rows = [(r["step"], number(r[key])) for r in self.evaluations if key in r]
            steps, values = zip(*rows, strict=True) if rows else ((), ())
            self._series[kind, key] = Series(np.asarray(steps, np.float64), np.asarray(values, np.float64))
        return self._series[kind, key]

    def along(self, series: Series, key: str, *, kind: str = "train") -> np.ndarray:
        """The values of `key` at the steps of another series; NaN for steps without a value."""
        other = self.series(key, kind=kind)
        if np.array_equal(other.steps, series.steps):
            return other.values
        by_step = dict(zip(other.steps, other.values, strict=True))
        return np.asarray([by_step.get(step, np.nan) for step in series.steps])

    def reward_range(self) -> tuple[float, float]:
        """The lowest and the highest reward of any response. All means lie between them."""
        low, high = self.series("reward/min").values, self.series("reward/max").values
        if not (np.isfinite(low).any() and np.isfinite(high).any()):
            return -np.inf, np.inf
        held_out = self.series("eval/reward", kind="eval").values
        finite_means = held_out[np.isfinite(held_out)]
        return float(min([np.nanmin(low), *finite_means])), float(max([np.nanmax(high), *finite_means]))

    def keys(self, prefix: str, *, kind: str = "train") -> list[str]:
        """The keys with a prefix, in order of first appearance."""
        if kind not in self._keys:
            all_keys = (
                self.numbers.keys() if kind == "train" else dict.fromkeys(key for r in self.evaluations for key in r)
            )
            self._keys[kind] = list(all_keys)
        return [key for key in self._keys[kind] if key.startswith(prefix)]

    def failure_value(self, reward: str) -> float | None:
        """The value that an error or a timeout of a reward counts as; None: the response leaves its group."""
        settings = self.setting("rewards", reward)
        value = number(settings.get("failure_value")) if isinstance(settings, dict) else float("nan")
        return value if value == value else None

    def setting(self, section: str, key: str, default: Any = None) -> Any:
        """A value of config.toml, or the default."""
        table = self.config.get(section)
        return table.get(key, default) if isinstance(table, dict) else default


def number(value: Any) -> float:
    """A JSON number as float; NaN for null and values that are not numbers."""
    return float(value) if is_number(value) and not isinstance(value, bool) else float("nan")


def read_run(folder: Path) -> Run:
    """Reads a run folder, finished or not.

    Raises: FileNotFoundError: no such folder, or neither config.toml nor metrics.jsonl in it.
    """
    if not (folder / "metrics.jsonl").exists() and not (folder / "config.toml").exists():
        raise FileNotFoundError(
            f"{folder} is not a run folder: it has neither metrics.jsonl nor config.toml; give the run.folder of a run"
        )
    problems: list[str] = []
    text = _text(folder / "config.toml", problems)
    try:
        config = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        config = {}
        problems.append(f"config.toml is not TOML: {e}")
    try:
        environment = json.loads(_text(folder / "environment.json", problems) or "{}")
    except (ValueError, RecursionError) as e:
        environment = {}
        problems.append(f"environment.json is not JSON: {e}")
    run = Run(folder, config, text, environment if isinstance(environment, dict) else {}, [], [], [])
    run.problems = problems
    _read_records(run, folder / "metrics.jsonl")
    _read_completions(run, folder / "completions.jsonl")
    return run


def _text(path: Path, problems: list[str]) -> str:
    try:
        refuse_special(path)
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
    except OSError as e:
        problems.append(f"{path.name} cannot be read: {e.strerror or e}")
    return ""


def _read_records(run: Run, path: Path) -> None:
    """Reads the file line by line into `run`. A step that ran again after a crash counts once."""
    train: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    try:
        refuse_special(path)
        for record in read_records(path):
            kind, step = record.get("kind"), record.get("step")
            if type(step) is not int:
                continue
            if kind == "event" and isinstance(record.get("event"), str):
                run.events.append(record)
            elif kind == "eval":
                evaluations[step] = record
            elif kind == "train":
                numbers = _numbers(record)
                run.numbers.put(step, numbers)
                train[step] = {k: v for k, v in record.items() if k in _KEPT or k not in numbers}
    except FileNotFoundError:
        run.problems.append("metrics.jsonl is missing: the run ended before its first step")
    except OSError as e:
        run.problems.append(f"metrics.jsonl cannot be read: {e.strerror or e}")
    run.train, run.evaluations = ([records[step] for step in sorted(records)] for records in (train, evaluations))


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if v is None or (is_number(v) and not isinstance(v, bool))}


def _read_completions(run: Run, path: Path) -> None:
    """Reads the file line by line, since it may be larger than memory, and parses only the lines to be shown."""
    steps = [r["step"] for r in run.train]
    evaluated = [r["step"] for r in run.evaluations]
    browsed = {steps[i] for i in np.linspace(0, len(steps) - 1, min(_BROWSED_STEPS, len(steps))).astype(int)}
    browsed |= _alerted(run.train)
    wanted = {("train", step) for step in browsed} | {("eval", step) for step in evaluated[:1] + evaluated[-1:]}
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    if not path.exists():
        run.problems.append("completions.jsonl is missing: no examples")
        return
    try:
        refuse_special(path)
        for key, row in _wanted_rows(path, wanted):
            rows.setdefault(key, []).append(row)
    except OSError as e:
        run.problems.append(f"completions.jsonl cannot be read: {e.strerror or e}")
    for (kind, step), completions in sorted(rows.items()):
        if kind == "eval":
            run.held_out[step] = completions
        else:
            run.browsed[step] = completions


def _alerted(train: list[dict[str, Any]]) -> set[int]:
    """The first steps with an alert that the step before did not have."""
    steps: list[int] = []
    before: set[str] = set()
    for record in train:
        lists = [record[k] for k in ("alerts", "machine/alerts") if isinstance(record.get(k), list)]
        now = {str(a.get("key")) for some in lists for a in some if isinstance(a, dict)}
        if now - before:
            steps.append(record["step"])
        before = now
    return set(steps[:_ALERTED_STEPS])


def _wanted_rows(path: Path, wanted: set[tuple[str, int]]) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    with path.open("rb") as file:
        for line in file:
            head = _HEAD.match(line)
            if head and (head[1].decode(), int(head[2])) not in wanted:
                continue
            try:
                row = json.loads(line)
                key = (row["kind"], row["step"])
                usable = all(isinstance(row[name], str) for name in ("kind", "prompt", "response"))
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            if usable and type(row["step"]) is int and key in wanted:
                yield key, {k: v for k, v in row.items() if k not in _LABELS or isinstance(v, str | int)}

"""JSON-lines files that grow with a run: appends records, and cuts a file back to a step.

A run of 100,000 steps writes gigabytes, so this code reads one line at a time.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gvpo_core.training.files.disk import retried, sync_folder

_HEAD = re.compile(rb'\{"kind": ?"(train|eval|event)", ?"step": ?(\d{1,15}), ?"')
_LINE_BREAKS = str.maketrans({c: f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"})  # str.splitlines splits at these
LARGEST = 1e150  # largest magnitude of a metric: rewards are within float32, and their variances far below this
_NAMED = 5  # line numbers that a message lists
_VERDICTS, _LEVELS = ("verdict", "machine/verdict"), ("OK", "WATCH", "BAD")
_ALERTS, _OF_ALERT = ("alerts", "machine/alerts"), ("key", "level", "seen", "advice")


@dataclass
class Kept:
    """The result of `cut`."""

    trained: int = 0  # steps that have a train record
    last: int = 0  # largest step in the file before the cut
    odd: list[str] = field(default_factory=list)  # messages about unexpected content


def encoded(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Records as JSON lines. NaN and infinities become null; characters that UTF-8 cannot encode become escapes."""
    lines = (json.dumps(_finite(r), ensure_ascii=False, allow_nan=False).translate(_LINE_BREAKS) for r in records)
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")


def append_synced(path: Path, content: bytes) -> None:
    """Appends to a file. Once this has returned, a power loss cannot remove any of `content`."""
    with path.open("ab") as f:
        if not f.tell():  # a new file: sync its name before it has content
            sync_folder(path.parent)
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def cut(path: Path, step: int, *, parse: bool) -> Kept:
    """Drops the records after `step` (-1: all), and a last line that a kill or a power loss left incomplete.

    Lines between kept records that are not records stay in the file; `Kept.odd` names them.

    Args:
      parse: parse every line and check the types of its metrics; otherwise only check how lines begin.
    Raises: OSError: the file cannot be read or written. FileNotFoundError: no such file.
    """
    kept, steps = Kept(), bytearray(step + 1)
    end = position = dropped = 0
    stray_lines: list[int] = []  # numbers of the lines that stay without being records
    trailing_lines: list[int] = []  # numbers of the lines after the last kept record that are not records
    incomplete: set[int] = set()  # those in `trailing_lines` that a kill or a power loss explains
    in_order, later_step_seen = True, False
    with retried(lambda: path.open("rb")) as f:
        for number, line in enumerate(f, 1):
            position += len(line)
            kind, record_step = _kind_and_step(line, parse)
            if record_step is None:
                trailing_lines.append(number)
                if not line.endswith(b"\n") or b"\0" in line:
                    incomplete.add(number)
                continue
            kept.last = max(kept.last, record_step)
            if record_step > step:
                later_step_seen, dropped = True, dropped + 1
                continue
            in_order = in_order and not later_step_seen
            stray_lines, trailing_lines, end = stray_lines + trailing_lines, [], position
            if kind == "train":
                steps[record_step] = min(2, steps[record_step] + 1)
    if not in_order:
        _filtered(path, step, parse, end)
    elif end < position:
        with path.open("r+b") as out:
            out.truncate(end)
            os.fsync(out.fileno())
    kept.trained = sum(map(bool, steps[1:]))
    if stray_lines:
        kept.odd.append(f"{path}: {_lines(stray_lines)} not a record (edited or damaged); kept, but not used")
    if cut_short := [number for number in trailing_lines if number in incomplete]:
        kept.odd.append(f"{path}: {_lines(cut_short)} not a complete record (cut by a kill or a power loss); dropped")
    if others := [number for number in trailing_lines if number not in incomplete]:
        kept.odd.append(f"{path}: {_lines(others)} not a record (edited or damaged); dropped")
    if not in_order:
        kept.odd.append(f"{path}: its steps are out of order (edited); {dropped} records after step {step} dropped")
    if parse and (repeated := [s for s, times in enumerate(steps) if times > 1 and s]):
        kept.odd.append(
            f"{path}: {len(repeated)} steps have more than one record, the first is step {repeated[0]} (edited)"
        )
    if parse and kept.trained < step:
        first_missing = next(s for s in range(1, step + 1) if not steps[s])
        kept.odd.append(
            f"{path}: {step - kept.trained} of the {step} steps done have no record, the first is step {first_missing}:"
            " the report and the verdicts lack them"
        )
    return kept


def _lines(numbers: list[int]) -> str:
    listed = ", ".join(map(str, numbers[:_NAMED])) + (f" and {len(numbers) - _NAMED} more" if numbers[_NAMED:] else "")
    return f"line {listed} is" if len(numbers) == 1 else f"lines {listed} are"


def _filtered(path: Path, step: int, parse: bool, end: int) -> None:
    """Replaces the file by its lines up to the byte `end`, without records after `step`."""
    aside, position = path.with_name(f".{path.name}.aside"), 0
    with path.open("rb") as lines, aside.open("wb") as out:
        for line in lines:
            position += len(line)
            record_step = _kind_and_step(line, parse)[1]
            if position <= end and (record_step is None or record_step <= step):
                out.write(line)
        out.flush()
        os.fsync(out.fileno())
    aside.rename(path)
    sync_folder(path.parent)


def _kind_and_step(line: bytes, parse: bool) -> tuple[str, int | None]:
    """The kind and the step of a record; the step is None if the line is not a complete record."""
    if not line.endswith((b"}\n", b"}\r\n")):  # \r\n: copied through Windows or git
        return "", None
    if not parse and (head := _HEAD.match(line)):
        return head[1].decode(), (int(head[2]) if b"\0" not in line else None)
    record = parsed(line, metrics=parse)
    return (str(record["kind"]), record["step"]) if record else ("", None)


def parsed(line: bytes, *, metrics: bool = False) -> dict[str, Any] | None:
    """The record of a line; None if it is not a JSON object with a kind and a step.

    Args:
      metrics: also return None if a value of a step or an evaluation has a type that metrics.jsonl does not have.
    """
    try:
        record = json.loads(line)
        good = isinstance(record["kind"], str) and type(record["step"]) is int and record["step"] >= 0
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if good and metrics and record["kind"] != "event":
        good = all(_is_metric(name, value) for name, value in record.items() if name != "kind")
    return record if good else None


def _is_metric(name: str, value: Any) -> bool:
    """Whether the value of a metric is a number within LARGEST or null, a level, or a list of alerts."""
    if name in _VERDICTS:
        return value in _LEVELS
    if name in _ALERTS:
        return isinstance(value, list) and all(
            isinstance(alert, dict) and all(isinstance(alert.get(part), str) for part in _OF_ALERT) for alert in value
        )
    return value is None or is_number(value)


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be summed and squared: not an edited 1e308 or an integer of 400 digits."""
    return isinstance(value, int | float) and not abs(value) > LARGEST


def records(path: Path, *, metrics: bool = False) -> Iterator[dict[str, Any]]:
    """Yields the records of a file. Skips other lines, and yields nothing for a missing file: `cut` reports both.

    Args:
      metrics: see `parsed`.
    """
    with contextlib.suppress(FileNotFoundError), retried(lambda: path.open("rb")) as f:
        for line in f:
            if record := parsed(line, metrics=metrics):
                yield record


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""The alerts of a run as episodes with dates: from the verdicts that the run recorded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gvpo_core.training.report.read import Run, number
from gvpo_core.training.watch.alerts import BAD, LEVELS, OK, WATCH, Alert

_GAP = 5  # steps without an alert that do not end its episode


@dataclass(frozen=True)
class Episode:
    """One alert from the step at which it was raised to the last at which it held."""

    key: str
    level: str  # the worst
    first: int
    last: int
    begun: float  # Unix time, NaN: unknown
    seen: str  # at the worst
    advice: str
    open: bool = False  # it holds at the run's last step


def episodes(run: Run) -> list[Episode]:
    """All of them: those that still hold first, then the worst, then the latest."""
    current: dict[str, Episode] = {}
    done: list[Episode] = []
    for record, alerts in _judged(run):
        step = record["step"]
        for alert in alerts:
            known = current.get(alert.key)
            if known is not None and step - known.last <= _GAP:
                if LEVELS.index(alert.level) > LEVELS.index(known.level):
                    known = replace(known, level=alert.level, seen=alert.seen, advice=alert.advice)
                current[known.key] = replace(known, last=step)
                continue
            if known is not None:
                done.append(known)
            begun = number(record.get("time"))
            current[alert.key] = Episode(alert.key, alert.level, step, step, begun, alert.seen, alert.advice)
    end = max(
        [run.train[-1]["step"] if run.train else 0, *(e["step"] for e in run.events if e.get("event") == "failed")]
    )
    result = done + [replace(e, open=e.last == end) for e in current.values()]
    return sorted(result, key=lambda e: (not e.open, -LEVELS.index(e.level), -e.first))


def verdict(alerts: Sequence[Episode]) -> str:
    """The run's current verdict: the worst level of the episodes that still hold."""
    return max((e.level for e in alerts if e.open), key=LEVELS.index, default=OK)


def _judged(run: Run) -> Iterator[tuple[dict[str, Any], Sequence[Alert]]]:
    """The records with their alerts, by step: those of the steps taken, then of the one that failed."""
    for record in run.train:
        yield record, _written(record, "alerts", "machine/alerts")
    for event in run.events:
        if event.get("event") == "failed":
            yield event, _written(event, "alerts")


def _written(record: Mapping[str, Any], *keys: str) -> list[Alert]:
    written = [a for key in keys for a in _list(record.get(key))]
    return [Alert(**{k: str(a[k]) for k in Alert._fields}) for a in written if _usable(a)]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _usable(alert: Any) -> bool:
    return isinstance(alert, Mapping) and set(Alert._fields) <= set(alert) and alert["level"] in (WATCH, BAD)

"""Groups the alerts that a run recorded into episodes with dates."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gvpo_core.training.report.read import Run, number
from gvpo_core.training.watch.alerts import BAD, LEVELS, OK, WATCH, Alert

_GAP = 5  # steps without an alert that do not end its episode


@dataclass(frozen=True)
class Episode:
    """One alert, from the step that raised it to the last step at which it held."""

    key: str
    level: str  # the worst level
    first: int
    last: int
    begun: float  # Unix time; NaN: unknown
    seen: str  # text of the alert at its worst level
    advice: str
    open: bool = False  # whether the alert holds at the run's last step


def episodes(run: Run) -> list[Episode]:
    """All episodes, sorted: those that still hold first, then the worst level, then the latest."""
    current: dict[str, Episode] = {}
    done: list[Episode] = []
    for record, alerts in _judged(run):
        step = record["step"]
        for alert in alerts:
            episode = current.get(alert.key)
            if episode is not None and step - episode.last <= _GAP:
                if LEVELS.index(alert.level) > LEVELS.index(episode.level):
                    episode = replace(episode, level=alert.level, seen=alert.seen, advice=alert.advice)
                current[episode.key] = replace(episode, last=step)
                continue
            if episode is not None:
                done.append(episode)
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
    """Yields records with their alerts: first the training steps, then the failed step."""
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

"""Checks of the rewards: falling, missing, failing."""

from collections.abc import Iterator

from gvpo_core.training.watch.checks.recent import START, Recent
from gvpo_core.training.watch.usual import mean
from gvpo_core.training.watch.verdict import BAD, WATCH, Alert


class RewardChecks:
    """Alerts `reward`, `unscored` and `reward_<kind>/<name>`."""

    def alerts(self, recent: Recent) -> Iterator[Alert]:
        """The alerts after the last step of `recent`."""
        for check in (self._unscored, self._reward_falling):
            if alert := check(recent):
                yield alert
        yield from self._reward_failures(recent)

    def _unscored(self, recent: Recent) -> Alert | None:
        unscored, total = recent.sum("responses/unscored"), recent.sum("responses/total")
        # If the cause is known, the alert of that reward has more detail.
        if any(recent.failing) or unscored < 4 or unscored < 0.05 * total:
            return None
        seen = f"{unscored:.0f} of {total:.0f} responses of {len(recent.last)} steps have no reward"
        level = BAD if unscored >= 0.25 * total else WATCH
        return Alert("unscored", level, seen, "look at the rewards that give None or NaN")

    def _reward_falling(self, recent: Recent) -> Alert | None:
        values = list(recent.rewards)
        if len(values) < 3 * START:
            return None
        now, noise = mean(values[-START:]), recent.noise()
        if recent.best - now <= max(2.5 * noise, 0.05 * (recent.range[1] - recent.range[0])):
            return None
        start = mean(recent.start["reward/mean"])
        seen = f"reward {now:.3g} over {START} steps, {recent.best:.3g} at its best, {start:.3g} at the start"
        advice = "resume an earlier checkpoint (--from-step N) with a lower learning rate or a higher beta"
        return Alert("reward", BAD if now <= start else WATCH, seen, advice)

    def _reward_failures(self, recent: Recent) -> list[Alert]:
        total, alerts = recent.sum("responses/total"), []
        keys = sorted({key for keys in recent.failing for key in keys})
        for key in keys:
            failed = recent.sum(key)
            if failed < 4 or failed < 0.05 * total:
                continue
            _, name, kind = key.split("/", 1)[0], *key.removeprefix("reward_errors/").rsplit("/", 1)
            event, advice = {
                "timeout": ("ran out of time", f"raise rewards.{name}.timeout or .workers, or speed it up"),
                "none": ("gave None or NaN", "completions.jsonl shows the responses without a score"),
            }.get(kind, ("failed", "the log has the traceback"))
            seen = f"reward {name} {event} for {failed:.0f} of {total:.0f} responses of {len(recent.last)} steps"
            alerts.append(Alert(f"reward_{kind}/{name}", BAD if failed >= 0.25 * total else WATCH, seen, advice))
        return alerts

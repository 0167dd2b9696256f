"""Checks whether an update works: finite numbers, a gradient and a learning rate that are not 0."""

from collections.abc import Iterator

from gvpo_core.training.watch.checks.recent import Recent, number
from gvpo_core.training.watch.verdict import BAD, Alert

SMALLEST_GRADIENT = 1e-18  # with AdamW's usual eps of 1e-8 it moves weights by 1e-10 of the learning rate


class UpdateChecks:
    """Alerts `not_finite` and `no_update`."""

    def alerts(self, recent: Recent) -> Iterator[Alert]:
        """The alerts after the last step of `recent`."""
        for check in (self._not_finite, self._no_update):
            if alert := check(recent):
                yield alert

    def _not_finite(self, recent: Recent) -> Alert | None:
        for record, bad in zip(reversed(recent.last), reversed(recent.bad), strict=True):
            if bad:
                names = ", ".join(bad[:4]) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
                seen = f"{names}: no finite number at step {record.get('step', '?')}"
                return Alert(
                    "not_finite",
                    BAD,
                    seen,
                    "stop, lower the learning rate, and resume an earlier checkpoint: --from-step N",
                )
        return None

    def _no_update(self, recent: Recent) -> Alert | None:
        record = recent.last[-1]
        mixed = record.get("groups/counted", 0) - record.get("groups/all_equal", 0)
        if mixed <= 0:
            return None
        if (norm := number(record, "gradient_norm")) < SMALLEST_GRADIENT:
            advice = (
                "the model no longer learns: resume an earlier checkpoint (--from-step N) with a lower learning rate"
            )
            size = f"of norm {norm:.2g}, which changes no weight" if norm else "exactly 0"
            return Alert("no_update", BAD, f"gradient {size}, and rewards differ in {mixed} groups", advice)
        if number(record, "learning_rate") == 0:
            advice = "raise optimizer.learning_rate, or make the schedule as long as the run"
            return Alert("no_update", BAD, "learning rate 0: the step changed no parameter", advice)
        return None

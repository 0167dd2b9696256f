"""A verdict on the run after each step, from metrics.jsonl alone: compares a step with the run's own usual numbers.

    alerts = Alerts.replay(records of earlier steps)        # the same state as in an uninterrupted run
    verdict = alerts.update(train record)                   # OK, WATCH or BAD, with reasons and what to do

This code reads no clock and draws no random numbers: the same records give the same verdicts. Speed and memory differ
between two equal runs, so they have a verdict of their own; a resumed run repeats the verdict on the training.
"""

import math
from collections.abc import Iterable
from typing import Any

from gvpo_core.training.watch.checks.machine import MachineChecks
from gvpo_core.training.watch.checks.policy import PolicyChecks
from gvpo_core.training.watch.checks.recent import START, Recent, Record, number
from gvpo_core.training.watch.checks.responses import ResponseChecks
from gvpo_core.training.watch.checks.rewards import RewardChecks
from gvpo_core.training.watch.checks.sampler import SamplerChecks
from gvpo_core.training.watch.checks.update import UpdateChecks
from gvpo_core.training.watch.usual import mean
from gvpo_core.training.watch.verdict import BAD, LEVELS, OK, WATCH, Alert, Verdict, verdict_of

__all__ = ["ALERTS", "BAD", "LEVELS", "MACHINE", "OK", "WATCH", "Alert", "Alerts", "Verdict", "failed", "verdict_of"]

ALERTS = {
    "not_finite": "A number of the step is NaN or infinite, except the mean of a single reward. If no step can be "
    "taken, the run ends, and the alert is in an event `failed`.",
    "no_update": "The gradient is below 1e-18 or the learning rate is 0, although rewards differ within groups.",
    "error": "An error ended the run in this step, or in the evaluation or save after it. The alert is in an event "
    "`failed`.",
    "dead_groups": "In 5 steps, at least 85 % of the groups are dead (all rewards equal), and the 95 % interval of "
    "that share begins at 60 % or above.",
    "entropy": "Entropy is below half of the usual twice in a row, or below a tenth of the start for 5 steps. In both "
    "cases the reward did not rise.",
    "kl": "KL is above 2.5 times its largest value in the steps before, by at least 0.5 nats a response and 8 "
    "deviations.",
    "kl_cost": "Since the first 10 steps, beta x KL grew by more than the reward did. The difference exceeds noise and "
    "5 % of the range of all rewards. Only if the policy draws the responses itself, at temperature 1.",
    "gradient": "Gradient norm is above 5 times its largest value in the steps before, and by 8 deviations.",
    "truncation": "In 5 steps, half of the responses are cut, or 20 percentage points more than in the first steps. Of "
    "episodes: those cut at a token limit.",
    "turns": "In 5 steps, half of the episodes reach environment.max_turns, or half repeat a message or a tool call.",
    "environment": "In 5 steps, the environment failed for at least 5 % of the episodes.",
    "length": "Length is twice the usual twice in a row, or three times that of the start while the reward did not "
    "rise.",
    "reward_<kind>/<name>": "In 5 steps, one reward failed on at least 5 % of the responses: error, timeout or none.",
    "unscored": "In 5 steps, at least 5 % of the responses have no reward, and no failure of a reward explains it.",
    "reward": "The mean reward of 10 steps is below the best mean of 20 steps by 2.5 deviations and 5 % of the range "
    "of all rewards.",
    "sampler_gap": "Sampler and policy differ by more than 0.05 nats a token, and by more than twice the difference of "
    "the first step. BAD above 0.5.",
    "staleness": "A response was drawn with weights that are older than rollout.ahead allows.",
    "throughput": "Over 5 steps, tokens a second are half the usual, and the time of a step is 1.5 times the usual.",
    "memory": "Peak memory rose in 20 of 50 steps and by 5 % in total, while responses did not grow longer.",
}
"""When each alert is raised. Usual: the median of up to 20 earlier steps without outliers. Three outliers in five steps
are BAD (kl, gradient); ten in a row become the usual."""
MACHINE = frozenset({"throughput", "memory"})
"""Keys of alerts about the machine. Two equal runs may differ in them."""
OF_DRAWN = frozenset({"dead_groups", "truncation", "length", "unscored", "reward"})
"""Keys of alerts about sampled responses; recorded responses raise none of them."""


def failed(step: int, error: Exception) -> Alert:
    """The alert of a run that failed at `step` with this error."""
    if isinstance(error, FloatingPointError):
        advice = (
            "lower optimizer.learning_rate or optimizer.max_gradient_norm, and resume the last checkpoint with"
            " run.allow_changes = true, or an earlier one with --from-step N as well"
        )
        return Alert("not_finite", BAD, f"step {step} failed: {error}", advice)
    reason = str(error).strip().partition("\n")[0]
    if not type(error).__module__.startswith("gvpo_"):
        reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    advice = "fix it and run the same command: it resumes from the last checkpoint; the log has the full error"
    return Alert("error", BAD, f"step {step} failed: {reason}", advice)


class Alerts:
    """Judges train records in the order of their steps."""

    def __init__(self, beta: float | None = None, ahead: int = 0) -> None:
        """
        Args:
          beta: cost of one nat of KL, in units of reward. None: unknown, or the record's `kl` does not estimate the
            KL, because the policy did not sample the responses itself at temperature 1.
          ahead: steps by which the sampler's weights may be older than the policy.
        """
        self._recent = Recent()
        training = (UpdateChecks(), ResponseChecks(), PolicyChecks(beta), RewardChecks(), SamplerChecks(ahead))
        self._checks = (*training, MachineChecks())

    @classmethod
    def replay(cls, records: Iterable[Record], beta: float | None = None) -> "Alerts":
        """The state after these records. Only those of kind "train" count."""
        alerts = cls(beta)
        for record in records:
            if record.get("kind") == "train":
                alerts.update(record)
        return alerts

    def annotate(self, record: Record) -> dict[str, Any]:
        """Judges the record and returns the keys of METRICS that the verdict adds to it."""
        now, before = number(record, "reward/mean"), list(self._recent.rewards)[-START:]
        verdict = self.update(record)
        training = verdict_of(a for a in verdict.reasons if a.key not in MACHINE)
        machine = verdict_of(a for a in verdict.reasons if a.key in MACHINE)
        trend = {"reward/trend": now - mean(before)} if before and math.isfinite(now) and _drawn(record) else {}
        return trend | {
            "verdict": training.level,
            "alerts": [a._asdict() for a in training.reasons],
            "machine/verdict": machine.level,
            "machine/alerts": [a._asdict() for a in machine.reasons],
        }

    def update(self, record: Record) -> Verdict:
        """Adds the next step and returns the verdict on the run after it.

        Args:
          record: a train record of metrics.jsonl, or one that is not written yet. null and NaN mean the same.
        """
        self._recent.add(record)
        alerts = [alert for checks in self._checks for alert in checks.alerts(self._recent)]
        return verdict_of(a for a in alerts if a.key not in OF_DRAWN or _drawn(record))


def _drawn(record: Record) -> bool:
    """Whether the step's responses were sampled in the step, not recorded before."""
    return record.get("tokens/sampled") != 0

"""Is the run healthy? A verdict a step, from the lines of metrics.jsonl alone, against the run's own usual numbers.

    alerts = Alerts.replay(records of the steps before)     # the same state as in a run that was never broken
    verdict = alerts.update(train record)                   # OK, WATCH or BAD, with reasons and what to do

Nothing here looks at a clock or draws a number: the same records give the same verdicts. What differs between two
equal runs (speed, memory) is kept apart, so that the verdict on the training itself is repeated by a resumed run.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from gvpo_core.training.intervals import wilson
from gvpo_core.training.watch.usual import USUAL, WINDOW, Usual, mean, median

Record = Mapping[str, Any]

OK, WATCH, BAD = LEVELS = ("OK", "WATCH", "BAD")
ALERTS = {
    "not_finite": "A number of the step, but a single reward's mean, is NaN or infinite. Where no step can be taken "
    "for it, the run ends, and the alert stands in an event `failed`.",
    "no_update": "The gradient or the learning rate is exactly 0, though rewards differ within groups.",
    "error": "The run ended by an error in this step, or in the evaluation or save after it: an event `failed`.",
    "dead_groups": "At least 85 % of 5 steps' groups have all rewards equal, and enough groups to be sure of 60 %.",
    "entropy": "Entropy below half of the usual twice in a row, or below a tenth of the start for 5 steps, while the "
    "reward is no higher.",
    "kl": "KL beyond 2.5 times the largest of the steps before, by at least 0.5 nats a response and 8 deviations.",
    "gradient": "Gradient norm beyond 5 times the largest of the steps before, and 8 deviations.",
    "truncation": "Of 5 steps' responses 20 points more are cut than in the first steps, or half of them.",
    "length": "Twice the usual length twice in a row, or three times the start's while the reward is no higher.",
    "reward_<kind>/<name>": "One reward failed on at least 5 % of 5 steps' responses: error, timeout, none.",
    "unscored": "At least 5 % of 5 steps' responses have no reward, for no cause that the step knows of.",
    "reward": "The mean of 10 steps lies below the best of 20 by 2.5 deviations and 5 % of all rewards' range.",
    "throughput": "Half the usual tokens a second and half as long again a step, over 5 steps.",
    "memory": "Peak memory rose in 20 of 50 steps, by 5 %, while responses grew no longer.",
}
"""When each alert is raised. Usual: the median of up to 20 earlier steps without the outliers among them. An outlier
that stays is BAD after three steps (kl, gradient), and is the usual after ten."""
MACHINE = frozenset({"throughput", "memory"})
"""Keys of alerts about the machine, which two equal runs need not share."""

_START = 10  # first steps, that say what the run began with
_TOTALS = ("reward/mean", "reward/half_width", "reward/spread", "reward/min", "reward/max", "reward/trend")
_MAY_BE_NULL = ("reward/", "policy/", "reward_seconds/")  # a reward that scored nothing has no mean


class Alert(NamedTuple):
    """One thing wrong, in words."""

    key: str
    level: str  # WATCH or BAD
    seen: str  # with the numbers
    advice: str


class Verdict(NamedTuple):
    """What a step's record says of the run."""

    level: str  # the worst of the reasons'; OK without one
    reasons: tuple[Alert, ...]


def verdict_of(reasons: Iterable[Alert]) -> Verdict:
    """The verdict that these reasons make, worst first."""
    ordered = tuple(sorted(reasons, key=lambda a: -LEVELS.index(a.level)))
    return Verdict(ordered[0].level if ordered else OK, ordered)


def failed(step: int, error: Exception) -> Alert:
    """The alert of a run that this error ended at `step`."""
    if isinstance(error, FloatingPointError):
        advice = (
            "lower optimizer.learning_rate or optimizer.max_gradient_norm, and resume the last checkpoint with"
            " run.allow_changes = true, or an earlier one with --from-step N as well"
        )
        return Alert("not_finite", BAD, f"step {step} failed: {error}", advice)
    said = str(error).strip().partition("\n")[0]
    if not type(error).__module__.startswith("gvpo_"):
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    advice = "mend it, and give the same command: it goes on from the last checkpoint; all of the error is in the log"
    return Alert("error", BAD, f"step {step} failed: {said}", advice)


class Alerts:
    """Judges train records in the order of their steps."""

    def __init__(self) -> None:
        self._last: deque[Record] = deque(maxlen=WINDOW)
        self._bad: deque[list[str]] = deque(maxlen=WINDOW)  # keys without a finite number
        self._failing: deque[list[str]] = deque(maxlen=WINDOW)  # keys of rewards that failed
        self._count = 0
        self._kl, self._gradient, self._entropy, self._length = (Usual() for _ in range(4))
        self._machine: deque[tuple[float, float]] = deque(maxlen=USUAL + WINDOW)  # tokens/s, seconds
        self._memory: deque[tuple[float, float, int]] = deque(maxlen=50)  # highest so far, tokens, 1 where it rose
        self._rewards: deque[float] = deque(maxlen=100)
        self._start: dict[str, list[float]] = {}
        self._best = -math.inf  # highest mean reward over USUAL steps
        self._range = (math.inf, -math.inf)
        self._slow = 0  # steps in a row with the entropy of a collapsed policy

    @classmethod
    def replay(cls, records: Iterable[Record]) -> "Alerts":
        """The state after these records, of which those of kind "train" count."""
        alerts = cls()
        for record in records:
            if record.get("kind") == "train":
                alerts.update(record)
        return alerts

    def annotate(self, record: Record) -> dict[str, Any]:
        """Judges the record; the keys of METRICS that the verdict adds to it."""
        now, before = _number(record, "reward/mean"), list(self._rewards)[-_START:]
        verdict = self.update(record)
        training = verdict_of(a for a in verdict.reasons if a.key not in MACHINE)
        machine = verdict_of(a for a in verdict.reasons if a.key in MACHINE)
        trend = {"reward/trend": now - mean(before)} if before and math.isfinite(now) else {}
        return trend | {
            "verdict": training.level,
            "alerts": [a._asdict() for a in training.reasons],
            "machine/verdict": machine.level,
            "machine/alerts": [a._asdict() for a in machine.reasons],
        }

    def update(self, record: Record) -> Verdict:
        """Takes in the next step and judges the run as it stands after it.

        Args:
          record: a train record of metrics.jsonl, or of what will be one: null and NaN are the same.
        """
        self._last.append(record)
        self._bad.append([k for k, v in record.items() if not _finite(v) and _is_number_key(k)])
        self._failing.append([k for k, v in record.items() if v and k.startswith("reward_errors/")])
        self._count += 1
        self._remember(record)
        checks: tuple[Callable[[], Alert | None], ...] = (
            self._not_finite,
            self._no_update,
            self._dead_groups,
            self._entropy_drop,
            self._kl_spike,
            self._gradient_spike,
            self._truncation,
            self._length_blow_up,
            self._unscored,
            self._reward_falling,
            self._throughput,
            self._memory_growth,
        )
        found = [alert for check in checks if (alert := check())]
        return verdict_of(found + self._reward_failures())

    def _remember(self, record: Record) -> None:
        reward = _number(record, "reward/mean")
        if math.isfinite(reward):
            self._rewards.append(reward)
            if len(self._rewards) >= USUAL:
                self._best = max(self._best, mean(list(self._rewards)[-USUAL:]))
            low, high = _number(record, "reward/min"), _number(record, "reward/max")
            self._range = min(self._range[0], low, reward), max(self._range[1], high, reward)
        for key in ("reward/mean", "entropy", "length/mean", "truncated"):
            values = self._start.setdefault(key, [])
            if len(values) < _START and math.isfinite(_number(record, key)):
                values.append(_number(record, key))

    # What is wrong at once.

    def _not_finite(self) -> Alert | None:
        for record, bad in zip(reversed(self._last), reversed(self._bad), strict=True):
            if bad:
                names = ", ".join(bad[:4]) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
                seen = f"{names}: no finite number at step {record.get('step', '?')}"
                return Alert(
                    "not_finite",
                    BAD,
                    seen,
                    "stop, lower the learning rate, resume an earlier checkpoint: --from-step N",
                )
        return None

    def _no_update(self) -> Alert | None:
        record = self._last[-1]
        mixed = record.get("groups/counted", 0) - record.get("groups/all_equal", 0)
        if mixed <= 0:
            return None
        if _number(record, "gradient_norm") == 0:
            advice = "the model is beyond repair: go back to a checkpoint before, with a lower learning rate"
            return Alert("no_update", BAD, f"gradient exactly 0, and rewards differ in {mixed} groups", advice)
        if _number(record, "learning_rate") == 0:
            advice = "raise optimizer.learning_rate, or give the schedule as many steps as the run has"
            return Alert("no_update", BAD, "learning rate 0: the step changed no parameter", advice)
        return None

    # What is wrong when it lasts.

    def _dead_groups(self) -> Alert | None:
        counted = self._sum("groups/counted")
        dead, right, wrong = (self._sum(f"groups/all_{x}") for x in ("equal", "best", "worst"))
        # The lower end of a 95 % interval: two dead groups of two say little.
        if len(self._last) < WINDOW or dead < 0.85 * counted or wilson(dead, counted)[0] < 0.6:
            return None
        share = dead / counted
        seen = (
            f"dead groups {share:.0%} for {WINDOW} steps ({right / counted:.0%} all right,"
            f" {wrong / counted:.0%} all wrong)"
        )
        if self._range[0] == self._range[1]:
            advice = "every reward so far is the same: look at responses and at the reward function"
            return Alert("dead_groups", BAD, seen, advice)
        if right >= 0.5 * dead:
            return Alert("dead_groups", WATCH, seen, "these prompts are solved: take harder ones, or stop here")
        level = BAD if share >= 0.95 and wilson(dead, counted)[0] >= 0.75 else WATCH
        if wrong >= 0.5 * dead:
            advice = "raise the temperature or the responses a prompt, or take easier prompts"
        else:
            advice = "a reward between best and worst for all alike: raise the temperature, or use a finer reward"
        return Alert("dead_groups", level, seen, advice)

    def _truncation(self) -> Alert | None:
        if self._count < 3:
            return None
        cut = sum(_number(r, "truncated") * r.get("responses/total", 1) for r in self._last)
        total = self._sum("responses/total") or len(self._last)
        if not math.isfinite(cut):
            return None
        share, began = cut / total, mean(self._start["truncated"])
        first = self._count <= _START  # the steps judged are the ones the run began with
        noise = 5 * math.sqrt(max(began * (1 - began), 0.01) / total)
        if not (share > began + max(0.2, noise) and not first) and not (share >= 0.5 and self._count >= WINDOW):
            return None
        seen = f"{share:.0%} of the responses of {len(self._last)} steps are cut at the token limit"
        seen += "" if first else f", {began:.0%} in the first steps"
        return Alert(
            "truncation", BAD if share >= 0.8 else WATCH, seen, "raise rollout.max_tokens, or reward short answers"
        )

    def _length_blow_up(self) -> Alert | None:
        values = [_number(r, "length/mean") for r in self._last]
        value, usual = values[-1], self._length
        jumped = usual.ready and value > max(2 * usual.median, usual.median + 6 * usual.sigma)
        usual.add(value, outlier=jumped)
        start = self._start["length/mean"]
        grown = self._count > 3 * _START and min(values) > 3 * mean(start) and not self._above_start()
        if usual.outliers >= 2 and math.isfinite(value):
            seen = f"length {value:.3g} tokens, usually {usual.median:.3g}"
            level = BAD if value > 4 * usual.median else WATCH
        elif grown:
            level, seen = WATCH, f"length {value:.3g} tokens, {mean(start):.3g} at the start, reward no higher"
        else:
            return None
        return Alert("length", level, seen, "read some responses: repetition? raise beta, or reward short answers")

    def _entropy_drop(self) -> Alert | None:
        value, usual, start = _number(self._last[-1], "entropy"), self._entropy, mean(self._start["entropy"])
        low = usual.ready and value < min(0.5 * usual.median, usual.median - 4 * usual.sigma)
        # A policy that learns is surer of itself: its entropy may fall while its reward rises.
        low = low and usual.median > 0.05 * start and not self._rising()
        usual.add(value, outlier=low)
        collapsed = self._count > _START and 0 <= value < 0.1 * start and not self._above_start()
        self._slow = self._slow + 1 if collapsed else 0
        advice = "raise the temperature or beta, or lower the learning rate"
        if usual.outliers >= 2:
            seen = f"entropy fell to {value:.3g} nats a token, usually {usual.median:.3g}, reward no higher"
            return Alert("entropy", BAD if value < 0.2 * usual.median else WATCH, seen, advice)
        if self._slow >= WINDOW:
            seen = f"entropy {value:.3g} nats a token, {start:.3g} at the start, reward no higher"
            return Alert("entropy", BAD, seen, advice)
        return None

    def _kl_spike(self) -> Alert | None:
        value, usual = _number(self._last[-1], "kl"), self._kl
        size = abs(value)
        # Against the largest, not the median: KL starts at 0, and may well double from step to step at first.
        limit = max(2.5 * usual.largest, usual.largest + 0.5, usual.median + 8 * usual.sigma)
        usual.add(size, outlier=usual.ready and size > limit)
        if not usual.recent_outliers:
            return None
        seen = f"KL {usual.outlier:.3g} nats a response, at most {usual.largest:.3g} in the steps before"
        advice = "lower the learning rate or optimizer.max_gradient_norm, or raise beta"
        return Alert("kl", BAD if usual.recent_outliers >= 3 else WATCH, seen, advice)

    def _gradient_spike(self) -> Alert | None:
        record, usual = self._last[-1], self._gradient
        value = _number(record, "gradient_norm")
        if record.get("groups/all_equal", 0) < record.get("groups/counted", 1):  # all dead: nothing to compare with
            limit = max(5 * usual.largest, usual.median + 8 * usual.sigma)
            usual.add(value, outlier=len(usual) >= 8 and usual.largest > 0 and value > limit)
        else:
            usual.pass_over()
        if not usual.recent_outliers:
            return None
        seen = f"gradient norm {usual.outlier:.3g}, at most {usual.largest:.3g} in the steps before"
        advice = "look at that step's responses and rewards; clip lower or lower the learning rate"
        return Alert("gradient", BAD if usual.recent_outliers >= 3 else WATCH, seen, advice)

    def _reward_falling(self) -> Alert | None:
        values = list(self._rewards)
        if len(values) < 3 * _START:
            return None
        now, noise = mean(values[-_START:]), self._noise()
        if self._best - now <= max(2.5 * noise, 0.05 * (self._range[1] - self._range[0])):
            return None
        start = mean(self._start["reward/mean"])
        seen = f"reward {now:.3g} over {_START} steps, {self._best:.3g} at its best, {start:.3g} at the start"
        advice = "resume an earlier checkpoint (--from-step N) with a lower learning rate or a higher beta"
        return Alert("reward", BAD if now <= start else WATCH, seen, advice)

    def _unscored(self) -> Alert | None:
        unscored, total = self._sum("responses/unscored"), self._sum("responses/total")
        if (
            any(self._failing) or unscored < 4 or unscored < 0.05 * total
        ):  # with a cause known, that is the better alert
            return None
        seen = f"{unscored:.0f} of {total:.0f} responses of {len(self._last)} steps have no reward"
        level = BAD if unscored >= 0.25 * total else WATCH
        return Alert("unscored", level, seen, "look at the rewards that give None or NaN")

    def _reward_failures(self) -> list[Alert]:
        total, found = self._sum("responses/total"), []
        keys = sorted({key for keys in self._failing for key in keys})
        for key in keys:
            failed = self._sum(key)
            if failed < 4 or failed < 0.05 * total:
                continue
            _, name, kind = key.split("/", 1)[0], *key.removeprefix("reward_errors/").rsplit("/", 1)
            said, advice = {
                "timeout": ("ran out of time", f"raise rewards.{name}.timeout or .workers, or make it quicker"),
                "none": ("gave None or NaN", "see in completions.jsonl which responses it does not score"),
            }.get(kind, ("failed", "see the traceback in the log"))
            seen = f"reward {name} {said} for {failed:.0f} of {total:.0f} responses of {len(self._last)} steps"
            found.append(Alert(f"reward_{kind}/{name}", BAD if failed >= 0.25 * total else WATCH, seen, advice))
        return found

    # The machine.

    def _throughput(self) -> Alert | None:
        record = self._last[-1]
        speed, seconds = _number(record, "tokens_per_second"), _number(record, "seconds/step")
        if math.isfinite(speed) and math.isfinite(seconds):
            self._machine.append((speed, seconds))
        if len(self._machine) < _START + WINDOW:
            return None
        rows = list(self._machine)
        (speed, took), (usual, usually) = (
            (median([s for s, _ in part]), median([t for _, t in part])) for part in (rows[-WINDOW:], rows[:-WINDOW])
        )
        if speed >= 0.5 * usual or took < 1.5 * usually + 0.5:  # a step of milliseconds varies by itself
            return None
        seen = f"{speed:.3g} tokens/s, usually {usual:.3g}; {took:.3g} s a step, usually {usually:.3g}"
        advice = "look at the seconds by phase: something else on the machine, a slow reward, swapping?"
        return Alert("throughput", WATCH, seen, advice)

    def _memory_growth(self) -> Alert | None:
        record, size = self._last[-1], _number(self._last[-1], "memory/peak")
        if not math.isfinite(size):
            return None
        highest = self._memory[-1][0] if self._memory else size
        length = _number(record, "length/mean")
        self._memory.append((max(highest, size), length, int(size > highest)))
        (first, short, _), (last, long, _), rises = self._memory[0], self._memory[-1], sum(m[2] for m in self._memory)
        # Peaks of a healthy run are beaten ever more rarely; longer responses take more.
        if len(self._memory) < 50 or rises < 20 or last < 1.05 * first or long > 1.1 * short:
            return None
        seen = f"peak memory grew from {first / 2**30:.3g} to {last / 2**30:.3g} GiB, in {rises} of the last 50 steps"
        return Alert("memory", WATCH, seen, "something keeps memory (a reward, a cache): it may run out overnight")

    # Sums and comparisons.

    def _sum(self, key: str) -> float:
        return sum(v for r in self._last if math.isfinite(v := _number(r, key)))

    def _noise(self) -> float:
        """Standard deviation of a step's mean reward, from the changes between neighbours: a trend does not count."""
        values = list(self._rewards)
        changes = [b - a for a, b in pairwise(values)]
        return math.sqrt(sum(c * c for c in changes) / (2 * len(changes))) if changes else math.inf

    def _rising(self) -> bool:
        """Whether the last steps' reward lies above that of the steps before by more than noise."""
        values = list(self._rewards)
        before = values[-USUAL - WINDOW : -WINDOW]
        return bool(before) and mean(values[-WINDOW:]) - mean(before) > self._noise()

    def _above_start(self) -> bool:
        """Whether the reward has risen since the first steps. The mean of 10 of them is off by a third of the noise."""
        values = list(self._rewards)[-50:]
        return bool(values) and mean(values) - mean(self._start["reward/mean"]) > 0.4 * self._noise()


def _is_number_key(key: str) -> bool:
    return key in _TOTALS or not key.startswith(_MAY_BE_NULL)


def _finite(value: Any) -> bool:
    return value is not None and (not isinstance(value, float) or math.isfinite(value))


def _number(record: Record, key: str) -> float:
    value = record.get(key)
    return math.nan if value is None else float(value)

"""Checks of how the policy changes: entropy, KL and its cost, gradient norm."""

import math
from collections import deque
from collections.abc import Iterator

from gvpo_core.training.watch.checks.recent import START, Recent, number
from gvpo_core.training.watch.usual import WINDOW, Usual, mean
from gvpo_core.training.watch.verdict import BAD, WATCH, Alert


class PolicyChecks:
    """Alerts `entropy`, `kl`, `kl_cost` and `gradient`."""

    def __init__(self, beta: float | None) -> None:
        self._beta = beta
        self._kl, self._gradient, self._entropy = (Usual() for _ in range(3))
        self._kls: deque[float] = deque(maxlen=START)
        self._collapsed_steps = 0  # steps in a row with the entropy of a collapsed policy

    def alerts(self, recent: Recent) -> Iterator[Alert]:
        """The alerts after the last step of `recent`."""
        for check in (self._entropy_drop, self._kl_spike, self._kl_cost, self._gradient_spike):
            if alert := check(recent):
                yield alert

    def _entropy_drop(self, recent: Recent) -> Alert | None:
        value, usual, start = recent.now("entropy"), self._entropy, mean(recent.start["entropy"])
        low = usual.ready and value < min(0.5 * usual.median, usual.median - 4 * usual.sigma)
        # A policy that learns becomes more certain: its entropy may fall while its reward rises.
        low = low and usual.median > 0.05 * start and not recent.rising()
        usual.add(value, outlier=low)
        collapsed = recent.count > START and 0 <= value < 0.1 * start and not recent.above_start()
        self._collapsed_steps = self._collapsed_steps + 1 if collapsed else 0
        advice = "raise the temperature or beta, or lower the learning rate"
        if usual.outliers >= 2:
            seen = f"entropy fell to {value:.3g} nats a token, usually {usual.median:.3g}, and the reward did not rise"
            return Alert("entropy", BAD if value < 0.2 * usual.median else WATCH, seen, advice)
        if self._collapsed_steps >= WINDOW:
            seen = f"entropy {value:.3g} nats a token, {start:.3g} at the start, and the reward did not rise"
            return Alert("entropy", BAD, seen, advice)
        return None

    def _kl_spike(self, recent: Recent) -> Alert | None:
        value, usual = recent.now("kl"), self._kl
        size = abs(value)
        # Compare with the largest, not the median: KL starts at 0 and may double from step to step at first.
        limit = max(2.5 * usual.largest, usual.largest + 0.5, usual.median + 8 * usual.sigma)
        usual.add(size, outlier=usual.ready and size > limit)
        if not usual.recent_outliers:
            return None
        seen = f"KL {usual.outlier:.3g} nats a response, at most {usual.largest:.3g} in the steps before"
        advice = "lower the learning rate or optimizer.max_gradient_norm, or raise beta"
        return Alert("kl", BAD if usual.recent_outliers >= 3 else WATCH, seen, advice)

    def _kl_cost(self, recent: Recent) -> Alert | None:
        self._kls.append(recent.now("kl"))
        if self._beta is None or recent.count < 3 * START or len(recent.rewards) < 3 * START:
            return None
        kl_growth = mean(list(self._kls)) - mean(recent.start["kl"])
        gain = mean(list(recent.rewards)[-START:]) - mean(recent.start["reward/mean"])
        cost = self._beta * kl_growth
        noise = recent.noise() * math.sqrt(2 / START)  # of a difference of two means
        if not cost - max(gain, 0) > max(2.5 * noise, 0.05 * (recent.range[1] - recent.range[0])):
            return None
        seen = f"beta x KL grew by {cost:.3g} since the start, the reward by {gain:.3g}"
        return Alert(
            "kl_cost", WATCH, seen, "the KL penalty exceeds the gain in reward: raise beta, or lower the learning rate"
        )

    def _gradient_spike(self, recent: Recent) -> Alert | None:
        record, usual = recent.last[-1], self._gradient
        value = number(record, "gradient_norm")
        if record.get("groups/all_equal", 0) < record.get("groups/counted", 1):  # else all groups are dead
            limit = max(5 * usual.largest, usual.median + 8 * usual.sigma)
            usual.add(value, outlier=len(usual) >= 8 and usual.largest > 0 and value > limit)
        else:
            usual.pass_over()
        if not usual.recent_outliers:
            return None
        seen = f"gradient norm {usual.outlier:.3g}, at most {usual.largest:.3g} in the steps before"
        advice = "look at that step's responses and rewards; lower optimizer.max_gradient_norm or the learning rate"
        return Alert("gradient", BAD if usual.recent_outliers >= 3 else WATCH, seen, advice)

"""Checks of the responses: dead groups, truncation, length, turns and environment."""

import math
from collections.abc import Iterator

from gvpo_core.training.intervals import wilson
from gvpo_core.training.watch.checks.recent import START, Recent, number
from gvpo_core.training.watch.usual import WINDOW, Usual, mean
from gvpo_core.training.watch.verdict import BAD, WATCH, Alert


class ResponseChecks:
    """Alerts `dead_groups`, `truncation`, `length`, `turns` and `environment`."""

    def __init__(self) -> None:
        self._length = Usual()

    def alerts(self, recent: Recent) -> Iterator[Alert]:
        """The alerts after the last step of `recent`."""
        for check in (self._dead_groups, self._truncation, self._length_blow_up, self._turns, self._environment):
            if alert := check(recent):
                yield alert

    def _dead_groups(self, recent: Recent) -> Alert | None:
        if "groups/all_equal" not in recent.last[-1]:  # with a teacher, groups of equal rewards still teach
            return None
        counted = recent.sum("groups/counted")
        dead, right, wrong = (recent.sum(f"groups/all_{x}") for x in ("equal", "best", "worst"))
        # Use the lower end of a 95 % interval: two dead groups of two are little evidence.
        if len(recent.last) < WINDOW or dead < 0.85 * counted or wilson(dead, counted)[0] < 0.6:
            return None
        share = dead / counted
        seen = (
            f"dead groups {share:.0%} for {WINDOW} steps ({right / counted:.0%} all right,"
            f" {wrong / counted:.0%} all wrong)"
        )
        if recent.range[0] == recent.range[1]:
            advice = "all rewards so far are equal: check the responses and the reward function"
            return Alert("dead_groups", BAD, seen, advice)
        if right >= 0.5 * dead:
            return Alert("dead_groups", WATCH, seen, "these prompts are solved: use harder ones, or stop the run")
        level = BAD if share >= 0.95 and wilson(dead, counted)[0] >= 0.75 else WATCH
        if wrong >= 0.5 * dead:
            advice = "raise rollout.temperature or rollout.responses, or use easier prompts"
        else:
            advice = (
                "all responses of a group get the same medium reward: raise rollout.temperature, or use a finer reward"
            )
        return Alert("dead_groups", level, seen, advice)

    def _truncation(self, recent: Recent) -> Alert | None:
        if recent.count < 3:
            return None
        key = "episodes/tokens" if "episodes/tokens" in recent.last[-1] else "truncated"
        cut = sum(number(r, key) * r.get("responses/total", 1) for r in recent.last)
        total = recent.sum("responses/total") or len(recent.last)
        if not math.isfinite(cut):
            return None
        share, start_share = cut / total, mean(recent.start[key])
        at_start = recent.count <= START  # the judged steps are among the first steps of the run
        noise = 5 * math.sqrt(max(start_share * (1 - start_share), 0.01) / total)
        if not (share > start_share + max(0.2, noise) and not at_start) and not (
            share >= 0.5 and recent.count >= WINDOW
        ):
            return None
        in_episodes = key != "truncated"
        subject = "episodes" if in_episodes else "responses"
        seen = f"{share:.0%} of the {subject} of {len(recent.last)} steps are cut at the token limit"
        seen += "" if at_start else f", {start_share:.0%} in the first steps"
        advice = "raise rollout.max_tokens, or reward short answers"
        if in_episodes:
            advice = "raise rollout.max_tokens or environment.turn_tokens, return shorter answers, or allow fewer turns"
        return Alert("truncation", BAD if share >= 0.8 else WATCH, seen, advice)

    def _turns(self, recent: Recent) -> Alert | None:
        if len(recent.last) < WINDOW or "episodes/turns" not in recent.last[-1]:
            return None
        cut, repeated = (mean([number(r, f"episodes/{x}") for r in recent.last]) for x in ("turns", "repeated"))
        if not max(cut, repeated) >= 0.5:
            return None
        seen = f"{cut:.0%} of {WINDOW} steps' episodes reach the turn limit, {repeated:.0%} repeat a message or a call"
        advice = (
            "read some episodes for loops; prompt the policy to end, lower environment.cut_reward, or raise max_turns"
        )
        return Alert("turns", WATCH, seen, advice)

    def _environment(self, recent: Recent) -> Alert | None:
        if "episodes/failed" not in recent.last[-1]:
            return None
        failed = mean([number(r, "episodes/failed") for r in recent.last])
        if not failed >= 0.05:
            return None
        seen = f"the environment failed for {failed:.0%} of {len(recent.last)} steps' episodes"
        return Alert(
            "environment", WATCH, seen, "read run.log and rewards.log; raise environment.timeout if it is slow"
        )

    def _length_blow_up(self, recent: Recent) -> Alert | None:
        values = [number(r, "length/mean") for r in recent.last]
        value, usual = values[-1], self._length
        jumped = usual.ready and value > max(2 * usual.median, usual.median + 6 * usual.sigma)
        usual.add(value, outlier=jumped)
        start = recent.start["length/mean"]
        grown = recent.count > 3 * START and min(values) > 3 * mean(start) and not recent.above_start()
        if usual.outliers >= 2 and math.isfinite(value):
            seen = f"length {value:.3g} tokens, usually {usual.median:.3g}"
            level = BAD if value > 4 * usual.median else WATCH
        elif grown:
            level, seen = (
                WATCH,
                f"length {value:.3g} tokens, {mean(start):.3g} at the start, and the reward did not rise",
            )
        else:
            return None
        return Alert("length", level, seen, "read some responses for repetition; raise beta, or reward short answers")

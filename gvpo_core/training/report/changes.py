"""Changes of a run's rewards and whether they are more than noise. Held-out rewards are paired by prompt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gvpo_core.training.intervals import Z, mean_half_width, prompts_half_width
from gvpo_core.training.report.read import Run, number


@dataclass(frozen=True)
class Change:
    """A mean at the start and at the end, with half-widths of 95 % intervals (NaN: unknown).

    `difference` and `half` are of the paired differences if `paired` is not 0.
    """

    start: float
    start_half: float
    end: float
    end_half: float
    difference: float
    half: float
    beyond_noise: bool | None  # None: too little data to tell
    paired: int = 0  # number of prompts in both means; 0: not paired


def held_out_change(run: Run) -> Change | None:
    """The change from the first to the last evaluation. Paired by prompt if possible, which removes most noise."""
    rewards = [
        (number(r.get("eval/reward")), number(r.get("eval/half_width"))) for r in run.evaluations if "eval/reward" in r
    ]
    if len(rewards) < 2:
        return None
    pair = paired_rewards(run)
    if pair is None:
        (start, start_half), (end, end_half) = rewards[0], rewards[-1]
        half = math.hypot(start_half, end_half)
        return Change(start, start_half, end, end_half, end - start, half, _beyond(end - start, half))
    return paired_change(*pair)


def paired_change(before: np.ndarray, after: np.ndarray) -> Change:
    """The change of (P,) mean rewards of the same prompts."""
    differences = after - before
    mean, half = float(differences.mean()), mean_half_width(differences)
    beyond = signs_tell(differences)
    return Change(
        start=float(before.mean()),
        start_half=prompts_half_width(before),
        end=float(after.mean()),
        end_half=prompts_half_width(after),
        difference=mean,
        half=half,
        beyond_noise=beyond and abs(mean) > half,
        paired=len(differences),
    )


def paired_rewards(run: Run) -> tuple[np.ndarray, np.ndarray] | None:
    """Two (P,) arrays: mean rewards of the prompts with scores in both the first and the last evaluation.

    None without completions of both evaluations, or without such a prompt.
    """
    if len(run.held_out) < 2:
        return None
    first, last = (prompt_rewards(run.held_out[step]) for step in (min(run.held_out), max(run.held_out)))
    shared = [prompt for prompt in first if prompt in last]
    return (np.asarray([first[p] for p in shared]), np.asarray([last[p] for p in shared])) if shared else None


def prompt_rewards(rows: Sequence[dict[str, Any]]) -> dict[Any, float]:
    """Mean reward of each prompt's scored responses, by the prompt's group and text."""
    rewards: dict[Any, list[float]] = {}
    for row in rows:
        if number(row.get("reward")) == number(row.get("reward")):
            rewards.setdefault((row.get("group"), row["prompt"]), []).append(row["reward"])
    return {prompt: sum(values) / len(values) for prompt, values in rewards.items()}


def signs_tell(differences: np.ndarray) -> bool | None:
    """Whether paired differences are beyond noise, by the sign-flip test at 5 %.

    Without a real change each difference is as likely negative as positive, so their sum has variance sum d^2. Unlike
    Student's t, this is also right if all prompts change by the same amount.

    Returns: None if one to five prompts changed, or none of fewer than six: no outcome could reach 5 %. False if none
      of six or more changed.
    """
    changed = differences[differences != 0]
    if len(changed) < 6:
        return None if len(differences) < 6 or len(changed) else False
    return bool(changed.sum() ** 2 > Z**2 * (changed**2).sum())


def training_change(run: Run) -> Change | None:
    """The change of the mean training reward from the first steps to the last; None with fewer than two steps."""
    series, halves = run.series("reward/mean"), run.series("reward/half_width")
    size = window(len(series.values))
    if len(series.values) < 2:
        return None
    by_step = dict(zip(halves.steps, halves.values, strict=True))
    means, errors = [], []
    for part in (slice(None, size), slice(-size, None)):
        means.append(float(np.nanmean(series.values[part])) if np.isfinite(series.values[part]).any() else math.nan)
        half = np.asarray([by_step.get(step, math.nan) for step in series.steps[part]])
        errors.append(float(np.sqrt((half**2).sum())) / size)
    difference, half_width = means[1] - means[0], math.hypot(*errors)
    return Change(means[0], errors[0], means[1], errors[1], difference, half_width, _beyond(difference, half_width))


def window(n: int) -> int:
    """Number of steps that represent the start, and the end, of a run of `n` steps."""
    return max(1, min(10, n // 4))


def in_words(name: str, change: Change, where: str) -> str:
    """The change as a sentence. It says "rose" or "fell" only if the change is beyond noise and shows in the digits."""
    start, end = plus_minus(change.start, change.start_half), plus_minus(change.end, change.end_half)
    shown = [float(text.partition(" ")[0].replace("?", "nan")) for text in (start, end)]
    if change.beyond_noise and (shown[1] - shown[0]) * change.difference > 0:
        change_text = f"{name} {'rose' if change.difference > 0 else 'fell'} from {start} to {end}"
    else:
        change_text = f"{name} was {start} at first and {end} at last"
    verdict = {
        True: "beyond noise",
        False: "within noise: it does not show a change",
        None: "too little data to tell from noise",
    }[change.beyond_noise]
    return f"{change_text} ({where}); the change is {difference_in_words(change)}, {verdict}."


def difference_in_words(change: Change) -> str:
    """The difference with its sign and interval."""
    sign = "+" if change.difference > 0 else ""
    return f"{sign}{plus_minus(change.difference, change.half)}{', paired by prompt' if change.paired else ''}"


def plus_minus(value: float, half: float) -> str:
    """A number and its half-width, rounded to the second digit of the half-width or the third of the larger one."""
    if half < 1e-9 * abs(value):  # rounding error
        half = 0.0
    if not (math.isfinite(half) and half > 0 and math.isfinite(value)):
        return f"{short(value)} ± {short(half)}"
    places = max(0, min(1 - math.floor(math.log10(half)), 2 - math.floor(math.log10(max(abs(value), half)))))
    return f"{value:.{places}f} ± {half:.{places}f}"


def short(value: float) -> str:
    """A number with three digits; "?" if it is not finite."""
    return f"{value:.3g}" if math.isfinite(value) else "?"


def _beyond(difference: float, half: float) -> bool | None:
    return abs(difference) > half if math.isfinite(half) and math.isfinite(difference) else None

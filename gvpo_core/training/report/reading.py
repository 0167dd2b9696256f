"""A run in plain words: what was trained, what changed, whether that is more than noise, and what to look at."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gvpo_core.training.metrics import mean_half_width
from gvpo_core.training.report.read import Run, Series, number
from gvpo_core.training.watch.text import duration

_TRUNCATED = 0.2  # share of cut responses worth a word
_DEAD = 0.5  # share of dead groups
_SPIKE = 5.0  # times the median of the 20 steps before
_COLLAPSE = 0.2  # of the entropy at the start
_MARKED = ("resume", "stop")


@dataclass(frozen=True)
class Change:
    """A number at the start and at the end, with half-widths of 95 % intervals (NaN: unknown)."""

    start: float
    start_half: float
    end: float
    end_half: float
    difference: float
    half: float
    beyond_noise: bool | None  # None: too little to tell


@dataclass(frozen=True)
class Reading:
    """What stands at the top of the report."""

    sentences: list[str]
    warnings: list[str]
    notes: list[str]
    figures: list[tuple[str, str, str]]  # label, value, small print


def read_out(run: Run) -> Reading:
    """The run in words. Every number comes from metrics.jsonl or completions.jsonl."""
    sentences = [_what(run), _state(run)]
    figures = []
    held_out, training = held_out_change(run), training_change(run)
    if held_out is not None:
        prompts = run.evaluations[-1].get("eval/prompts", "?")
        sentences.append(_in_words("Held-out reward", held_out, f"over {prompts} prompts"))
        figures.append((f"Held-out reward, {prompts} prompts", _arrow(held_out), _halves(held_out)))
    elif run.evaluations:
        only = run.evaluations[0]
        sentences.append(
            f"Held-out reward was {plus_minus(number(only.get('eval/reward')), number(only.get('eval/half_width')))}"
            f" at step {only['step']}; there is no second evaluation to compare with."
        )
    else:
        sentences.append("There was no held-out evaluation, so nothing here says how the model does on new prompts.")
    if training is not None:
        window = _window(len(run.series("reward/mean").values))
        span = f"first and last {window} steps" if window > 1 else "first and last step"
        sentences.append(_in_words("Training reward", training, span))
        figures.append((f"Training reward, {span}", _arrow(training), _halves(training)))
    kl = _ends(run.series("kl"))
    if kl is not None:
        figures.append(("KL to the reference, at the end", _n(kl[1]), "nats a response"))
    steps = run.setting("run", "steps", "?")
    if run.train:
        took = duration(float(np.nansum(run.series("seconds/step").values)))
        figures.append(("Steps", f"{run.train[-1]['step']} of {steps}", f"in {took} of training"))
    notes = _notes(run)
    return Reading([s for s in sentences if s], _warnings(run, training), notes, figures)


def held_out_change(run: Run) -> Change | None:
    """First against last evaluation; paired by prompt where the completions allow, which takes most noise away."""
    rewards = [(number(r.get("eval/reward")), number(r.get("eval/half_width"))) for r in run.evaluations]
    if len(rewards) < 2:
        return None
    (start, start_half), (end, end_half) = rewards[0], rewards[-1]
    differences = paired_differences(run)
    if differences is None:
        half = math.hypot(start_half, end_half)
        return Change(start, start_half, end, end_half, end - start, half, _beyond(end - start, half))
    half = mean_half_width(differences) if len(differences) > 1 else math.nan
    mean = float(differences.mean())
    return Change(start, start_half, end, end_half, mean, half, signs_tell(differences))


def paired_differences(run: Run) -> np.ndarray | None:
    """(P,) last minus first mean reward of each held-out prompt; None without completions of both evaluations."""
    if len(run.held_out) < 2:
        return None
    first, last = (prompt_rewards(run.held_out[step]) for step in (min(run.held_out), max(run.held_out)))
    shared = [prompt for prompt in first if prompt in last]
    return np.asarray([last[p] - first[p] for p in shared]) if shared else None


def prompt_rewards(rows: Sequence[dict[str, Any]]) -> dict[Any, float]:
    """Mean reward of each prompt's scored responses, by the prompt's place and text."""
    rewards: dict[Any, list[float]] = {}
    for row in rows:
        if number(row.get("reward")) == number(row.get("reward")):
            rewards.setdefault((row.get("group"), row["prompt"]), []).append(row["reward"])
    return {prompt: sum(values) / len(values) for prompt, values in rewards.items()}


def signs_tell(differences: np.ndarray) -> bool | None:
    """Whether paired differences lie beyond noise: the sign-flip test at 5 %.

    Under no change each difference is as likely negative as positive, so their sum has variance sum d^2. Unlike
    Student's t this stays right when all prompts change by the same amount. None: fewer than six changed prompts,
    where no outcome could reach 5 %, unless none of at least six changed.
    """
    changed = differences[differences != 0]
    if len(changed) < 6:
        return None if len(differences) < 6 or len(changed) else False
    return bool(changed.sum() ** 2 > 1.959964**2 * (changed**2).sum())


def training_change(run: Run) -> Change | None:
    """Mean training reward of the first and of the last steps; None with fewer than two steps."""
    series, halves = run.series("reward/mean"), run.series("reward/half_width")
    window = _window(len(series.values))
    if len(series.values) < 2:
        return None
    by_step = dict(zip(halves.steps, halves.values, strict=True))
    means, errors = [], []
    for part in (slice(None, window), slice(-window, None)):
        means.append(float(np.nanmean(series.values[part])) if np.isfinite(series.values[part]).any() else math.nan)
        half = np.asarray([by_step.get(step, math.nan) for step in series.steps[part]])
        errors.append(float(np.sqrt((half**2).sum())) / window)
    difference, half_width = means[1] - means[0], math.hypot(*errors)
    return Change(means[0], errors[0], means[1], errors[1], difference, half_width, _beyond(difference, half_width))


def _what(run: Run) -> str:
    if not run.config:
        return "Its settings are not known."
    name = run.setting("model", "path", "") or run.setting("run", "backend", "a policy")
    facts = run.environment.get("policy", run.environment)
    facts = facts if isinstance(facts, dict) else {}
    where = ", ".join(str(facts[key]) for key in ("backend", "device", "dtype") if facts.get(key))
    rank = run.setting("model", "lora_rank", 0)
    how = f"LoRA adapters of rank {rank}" if rank else "all parameters"
    return (
        f"{str(name).rstrip('/').rpartition('/')[2]}{f' ({where})' if where else ''}: {how} trained with "
        f"{run.setting('objective', 'name', 'gvpo')}, beta {run.setting('objective', 'beta', '?')}, "
        f"{run.setting('rollout', 'prompts', '?')} prompts x {run.setting('rollout', 'responses', '?')} "
        "responses a step."
    )


def _state(run: Run) -> str:
    steps = run.setting("run", "steps")
    if run.events and run.events[-1].get("event") == "failed":  # not resumed since
        return f"It failed at step {run.events[-1]['step']} of {steps or '?'}: the alert says why."
    if not run.train:
        return "No step is recorded: the run stopped, or is still, before the end of its first."
    last = run.train[-1]["step"]
    if not isinstance(steps, int):
        return f"Its last recorded step is {last}."
    if last >= steps:
        return f"It ran to its end, step {last}."
    return (
        f"It stands at step {last} of {steps}: still running, stopped or killed. The same command goes on from there."
    )


def _in_words(name: str, change: Change, where: str) -> str:
    verb = "rose" if change.difference > 0 else "fell" if change.difference < 0 else "stayed"
    ends = f"from {plus_minus(change.start, change.start_half)} to {plus_minus(change.end, change.end_half)}"
    sign = "+" if change.difference > 0 else ""
    verdict = {
        True: "beyond noise",
        False: "within noise: it does not show a change",
        None: "too little to tell from noise",
    }[change.beyond_noise]
    return (
        f"{name} {verb} {ends} ({where}); the change is {sign}{plus_minus(change.difference, change.half)}, {verdict}."
    )


def _warnings(run: Run, training: Change | None) -> list[str]:
    found = []
    truncated = _ends(run.series("truncated"))
    if truncated and truncated[1] > _TRUNCATED:
        limit = run.setting("rollout", "max_tokens", "?")
        found.append(
            f"{truncated[1]:.0%} of the last responses were cut at the limit of {limit} tokens: raise "
            "rollout.max_tokens, or have the reward favour shorter answers."
        )
    found += _dead_groups(run)
    found += _divergence(run, training)
    entropy = _ends(run.series("entropy"))
    if entropy and entropy[0] > 0 and entropy[1] < _COLLAPSE * entropy[0]:
        found.append(
            f"Entropy fell from {_n(entropy[0])} to {_n(entropy[1])} nats a token: the samples hardly differ any more. "
            "If reward is not at its best, raise beta or lower the learning rate."
        )
    for key in ("loss", "gradient_norm"):
        series = run.series(key)
        bad = series.steps[~np.isfinite(series.values)]
        if len(bad):
            found.append(f"{key} was not a finite number in {len(bad)} steps, first at step {int(bad[0])}.")
    responses = float(np.nansum(run.series("responses/total").values))
    for key in run.keys("reward_errors/"):
        count = int(np.nansum(run.series(key).values))
        if count:
            name, kind = key.removeprefix("reward_errors/").rsplit("/", 1)
            value = None if kind == "none" else run.failure_value(name)
            words = {"error": "raised an error on", "timeout": "ran out of time on", "none": "gave no score to"}
            found.append(
                f"Reward {name!r} {words.get(kind, kind + ':')} {count:,} of {responses:,.0f} responses"
                f"{f' ({count / responses:.1%})' if responses else ''}; "
                + ("they left their groups." if value is None else f"they counted as {value:g}, its failure_value.")
            )
    return found


def _dead_groups(run: Run) -> list[str]:
    window = _window(len(run.train)) if run.train else 0
    counted, dead, best, worst = (
        int(np.nansum(run.series(f"groups/{name}").values[-window:] if window else 0))
        for name in ("counted", "all_equal", "all_best", "all_worst")
    )
    if not counted or dead <= _DEAD * counted:
        return []
    advice = "harder prompts" if best > worst else "easier prompts" if worst > best else "a finer reward"
    return [
        f"{dead / counted:.0%} of the last groups were dead: all their rewards equal ({best} at the best, {worst} at "
        f"the worst reward). They teach nothing but the pull to the reference: use {advice}, or a higher temperature."
    ]


def _divergence(run: Run, training: Change | None) -> list[str]:
    kl, beta = run.series("kl"), run.setting("objective", "beta")
    found = []
    ends = _ends(kl)
    if ends and training is not None and isinstance(beta, int | float) and beta > 0:
        cost, gain = beta * (ends[1] - ends[0]), training.difference
        if cost > max(gain, 0) and cost > 0.01:
            found.append(
                f"KL cost more than it bought: beta x KL grew by {_n(cost)}, the training reward by {_n(gain)}. "
                "Raise beta, or lower the learning rate."
            )
    if len(kl.values) > 5:
        # Row i: the up to 20 steps before step i, NaN where there are fewer.
        padded = np.concatenate([np.full(20, np.nan), np.abs(kl.values)])
        before = np.lib.stride_tricks.sliding_window_view(padded, 20)[5 : len(kl.values)]
        known = np.isfinite(before).any(axis=1)
        usual = np.full(len(before), np.inf)
        usual[known] = np.nanmedian(before[known], axis=1)
        jumps = np.flatnonzero((kl.values[5:] > _SPIKE * usual) & (kl.values[5:] > usual + 1))
        if len(jumps):
            first = int(jumps[0])
            found.append(
                f"KL jumped to {_n(kl.values[first + 5])} nats a response at step {int(kl.steps[first + 5])}, "
                f"from about {_n(usual[first])}: look at the gradient norm there; lower the learning rate or the clip."
            )
    return found


def _notes(run: Run) -> list[str]:
    notes = [f"Step {e['step']}: {e.get('message', e['event'])}" for e in run.events if e.get("event") in _MARKED]
    told = Counter(str(e.get("message", "")) for e in run.events if e.get("event") == "warning")
    for message, count in told.most_common(8):
        notes.append(f"{message}{f' ({count} times)' if count > 1 else ''}")
    if len(told) > 8:
        notes.append(f"{len(told) - 8} more warnings stand in metrics.jsonl.")
    return notes + run.problems


def _window(n: int) -> int:
    return max(1, min(10, n // 4))


def _ends(series: Series) -> tuple[float, float] | None:
    """Means over the first and the last steps, or None."""
    values = series.values[np.isfinite(series.values)]
    if not len(values):
        return None
    window = _window(len(values))
    return float(values[:window].mean()), float(values[-window:].mean())


def _beyond(difference: float, half: float) -> bool | None:
    return abs(difference) > half if math.isfinite(half) and math.isfinite(difference) else None


def _arrow(change: Change) -> str:
    start, end = (plus_minus(*x).partition(" ")[0] for x in _both(change))
    return f"{start} → {end}"


def _halves(change: Change) -> str:
    start, end = (plus_minus(*x).partition(" ")[2] for x in _both(change))
    return f"{start} → {end}"


def _both(change: Change) -> tuple[tuple[float, float], tuple[float, float]]:
    return (change.start, change.start_half), (change.end, change.end_half)


def plus_minus(value: float, half: float) -> str:
    """A number and its half-width, both to the half-width's second digit, or the larger one's third."""
    if not (math.isfinite(half) and half > 0 and math.isfinite(value)):
        return f"{_n(value)} ± {_n(half)}"
    places = max(0, min(1 - math.floor(math.log10(half)), 2 - math.floor(math.log10(max(abs(value), half)))))
    return f"{value:.{places}f} ± {half:.{places}f}"


def _n(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "?"

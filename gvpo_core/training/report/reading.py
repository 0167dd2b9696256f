"""Describes a run in words: what was trained, what changed, and whether that is more than noise."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from gvpo_core.training.report.changes import (
    Change,
    difference_in_words,
    held_out_change,
    in_words,
    plus_minus,
    short,
    training_change,
    window,
)
from gvpo_core.training.report.read import Run, Series, number
from gvpo_core.training.terminal.text import duration

_MARKED = ("resume", "stop")


@dataclass(frozen=True)
class Reading:
    """The texts and figures at the top of the report."""

    sentences: list[str]
    notes: list[str]
    figures: list[tuple[str, str, str]]  # label, value, small print


def read_out(run: Run) -> Reading:
    """Describes the run in words. Every number comes from metrics.jsonl or completions.jsonl."""
    sentences, figures = [], []
    held_out, training = held_out_change(run), training_change(run)
    if held_out is not None:
        prompts = held_out.paired or run.evaluations[-1].get("eval/prompts", "?")
        sentences.append(in_words("Held-out reward", held_out, f"over {prompts} prompts"))
        figures.append((f"Held-out reward, {prompts} prompts", _arrow(held_out), _small(held_out)))
    elif answered := [e for e in run.evaluations if "eval/reward" in e]:
        first = answered[0]
        sentences.append(
            f"Held-out reward was {plus_minus(number(first.get('eval/reward')), number(first.get('eval/half_width')))}"
            f" at step {first['step']}; there is no second evaluation to compare with."
        )
    elif not run.evaluations:
        sentences.append(
            "There was no held-out evaluation, so this report does not show how the model does on new prompts."
        )
    if losses := [number(e["eval/loss"]) for e in run.evaluations if "eval/loss" in e]:
        change = short(losses[0]) if len(losses) == 1 else f"{short(losses[0])} → {short(losses[-1])}"
        sentences.append(f"Held-out loss on recorded groups: {change}.")
        figures.append(("Held-out loss", change, f"{run.evaluations[-1].get('eval/groups', '?')} recorded groups"))
    if kls := [number(e["eval/teacher_kl"]) for e in run.evaluations if "eval/teacher_kl" in e]:
        change = short(kls[0]) if len(kls) == 1 else f"{short(kls[0])} → {short(kls[-1])}"
        sentences.append(f"Held-out KL to the teacher: {change} nats a response.")
        figures.append(("Held-out KL to the teacher", change, "nats a response"))
    if training is not None and not _recorded(run):
        size = window(len(run.series("reward/mean").values))
        span = f"first and last {size} steps" if size > 1 else "first and last step"
        sentences.append(in_words("Training reward", training, span))
        figures.append((f"Training reward, {span}", _arrow(training), _small(training)))
    kl = run_end(run.series("kl"))
    if kl is not None:
        figures.append(("KL to the reference, at the end", short(kl), "nats a response"))
    steps = run.setting("run", "steps", "?")
    if run.train:
        took = duration(float(np.nansum(run.series("seconds/step").values)))
        figures.append(("Steps", f"{run.train[-1]['step']} of {steps}", f"in {took} of training"))
    return Reading([*sentences, _description(run), _state(run)], _notes(run), figures)


def run_end(series: Series) -> float | None:
    """The mean over the last steps; None without a finite value."""
    values = series.values[np.isfinite(series.values)]
    return float(values[-window(len(values)) :].mean()) if len(values) else None


def _recorded(run: Run) -> bool:
    """Whether the last step trained on recorded responses, whose rewards do not measure the policy."""
    drawn = run.series("tokens/sampled").values
    return len(drawn) > 0 and float(drawn[-1]) == 0


def _description(run: Run) -> str:
    if not run.config:
        return "Its settings are not known."
    name = run.setting("model", "path", "") or run.setting("run", "backend", "a policy")
    facts = run.environment.get("policy", run.environment)
    facts = facts if isinstance(facts, dict) else {}
    where = ", ".join(str(facts[key]) for key in ("backend", "device", "dtype") if facts.get(key))
    rank = run.setting("model", "lora_rank", 0)
    how = f"LoRA adapters of rank {rank}" if rank else "all parameters"
    prompts, responses = run.setting("rollout", "prompts", "?"), run.setting("rollout", "responses", "?")
    step = f"{prompts} recorded groups" if _recorded(run) else f"{prompts} prompts x {responses} responses"
    return (
        f"{str(name).rstrip('/').rpartition('/')[2]}{f' ({where})' if where else ''}: {how} trained with "
        f"{run.setting('objective', 'name', 'gvpo')}, beta {run.setting('objective', 'beta', '?')}, "
        f"{step} a step."
    )


def _state(run: Run) -> str:
    steps = run.setting("run", "steps")
    if run.events and run.events[-1].get("event") == "failed":  # not resumed since
        return f"It failed at step {run.events[-1]['step']} of {steps or '?'}: the alert says why."
    if not run.train:
        return "No step is recorded: the first step has not finished, or the run stopped before its end."
    last = run.train[-1]["step"]
    if not isinstance(steps, int):
        return f"Its last recorded step is {last}."
    if last >= steps:
        return f"It finished at step {last}."
    return f"It is at step {last} of {steps}: still running, stopped or killed. The same command resumes it."


def _notes(run: Run) -> list[str]:
    notes = [f"Step {e['step']}: {e.get('message', e['event'])}" for e in run.events if e.get("event") in _MARKED]
    warnings = Counter(str(e.get("message", "")) for e in run.events if e.get("event") == "warning")
    for message, count in warnings.most_common(8):
        notes.append(f"{message}{f' ({count} times)' if count > 1 else ''}")
    if len(warnings) > 8:
        notes.append(f"{len(warnings) - 8} more warnings are in metrics.jsonl.")
    return notes + run.problems


def _arrow(change: Change) -> str:
    start = plus_minus(change.start, change.start_half).partition(" ")[0]
    end = plus_minus(change.end, change.end_half).partition(" ")[0]
    return f"{start} → {end}"


def _small(change: Change) -> str:
    return f"change {difference_in_words(change)}"

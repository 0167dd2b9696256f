"""Compares several runs on one page: held-out results, settings that differ, and curves in shared charts."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_core.training.config import ConfigError, RewardConfig
from gvpo_core.training.report.changes import (
    difference_in_words,
    held_out_change,
    paired_change,
    plus_minus,
    prompt_rewards,
)
from gvpo_core.training.report.charts import SMOOTHED, Chart, Line, Points
from gvpo_core.training.report.document import chart_section, document, escaped
from gvpo_core.training.report.history import episodes, verdict
from gvpo_core.training.report.read import Run, number

MOST = 6  # largest number of runs on a page: one for each colour
_CURVES = (
    ("kl", "KL to the reference", "nats a response", None),
    ("entropy", "Entropy", "nats a token", 0.0),
    ("regret/series", "Regret", "reward", None),
    ("reward/spread", "Spread of rewards inside a group", "standard deviation", 0.0),
    ("length/mean", "Length", "tokens", 0.0),
    ("truncated", "Cut at a limit", "share", 0.0),
    ("gradient_norm", "Gradient norm", "before clipping", 0.0),
    ("seconds/step", "Time of a step", "seconds", 0.0),
)
_OF_A_REWARD = ("function", "weight", "options", "failure_value")  # settings that a reward's scale depends on
_DEFAULT = RewardConfig()
_NAMES = {"run.folder"}  # settings that always differ


def comparison(runs: Sequence[Run]) -> str:
    """The page of two to MOST runs.

    Raises: ConfigError: the runs have different rewards, so their numbers cannot be compared.
    """
    names = labels([run.folder for run in runs])
    _refuse_different_rewards(runs, names)
    return document(
        f"{' and '.join(names)}: GVPO runs",
        [
            f"<h1>{escaped(', '.join(names))}</h1>",
            '<p class="small">± is half of a 95 % interval.</p>',
            _results(runs, names),
            chart_section("Reward", _reward_charts(runs, names)),
            "<h2>Settings that differ</h2>",
            _differences(runs, names),
            chart_section("Training", _curves(runs, names)),
        ],
    )


def _refuse_different_rewards(runs: Sequence[Run], names: Sequence[str]) -> None:
    runs_with_rewards = [(name, run, _rewards(run)) for name, run in zip(names, runs, strict=True) if _rewards(run)]
    for name, run, rewards in runs_with_rewards[1:]:
        first, other, first_rewards = runs_with_rewards[0]
        if [*rewards] != [*first_rewards]:
            raise ConfigError(
                f"{first} has the rewards {', '.join(first_rewards)}, {name} has {', '.join(rewards)}; runs are"
                " compared on the same rewards"
            )
        for reward, table in rewards.items():
            for key in _OF_A_REWARD:
                a, b = (settings.get(key, getattr(_DEFAULT, key)) for settings in (first_rewards[reward], table))
                if a != b and not (key == "function" and _code(other, reward) == _code(run, reward) != ""):
                    raise ConfigError(
                        f"rewards.{reward}.{key} is {a!r} in {first} and {b!r} in {name}; runs are compared on the same"
                        " rewards"
                    )


def _rewards(run: Run) -> dict[str, dict[str, Any]]:
    """The settings of a run's rewards, sorted by name; empty if the settings are unknown."""
    tables = run.config.get("rewards")
    tables = tables if isinstance(tables, dict) else {}
    return {name: table for name, table in sorted(tables.items()) if isinstance(table, dict)}


def _code(run: Run, reward: str) -> str:
    """The SHA-256 of a reward's file; "" if it is unknown."""
    rewards = run.environment.get("rewards")
    entry = rewards.get(reward) if isinstance(rewards, dict) else None
    return str(entry.get("sha256", "")) if isinstance(entry, dict) else ""


def labels(folders: Sequence[Path]) -> list[str]:
    """The names of the folders, with as many parents as needed to make them unique."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _results(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = []
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        change = held_out_change(run)
        if change is not None:
            start, end = plus_minus(change.start, change.start_half), plus_minus(change.end, change.end_half)
            cells = [start, end, difference_in_words(change)]
        elif answered := [e for e in run.evaluations if "eval/reward" in e]:
            evaluation = answered[0]
            cells = [
                plus_minus(number(evaluation.get("eval/reward")), number(evaluation.get("eval/half_width"))),
                "",
                "",
            ]
        else:
            cells = ["no held-out reward", "", ""]
        against = _against(runs[0], run) if i else "" if len(runs) == 1 else "-"
        steps = f"{run.train[-1]['step'] if run.train else 0} of {run.setting('run', 'steps', '?')}"
        level = verdict(episodes(run))
        rows.append(
            f'<tr><td><i class="dot b{i + 1}"></i> {escaped(name)}</td><td>{escaped(steps)}</td>'
            + "".join(f"<td>{escaped(cell)}</td>" for cell in [*cells, against])
            + f'<td><b class="level {level}">{level}</b></td></tr>'
        )
    head = "".join(
        f"<th>{title}</th>"
        for title in (
            "Run",
            "Steps",
            "Held-out, first",
            "Held-out, last",
            "Change",
            f"Compared with {escaped(names[0])}",
            "Verdict",
        )
    )
    body = "".join(rows)
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _against(first: Run, other: Run) -> str:
    """The difference of the last evaluations over the held-out prompts of both runs, in words."""
    a, b = (prompt_rewards(run.held_out[max(run.held_out)]) if run.held_out else {} for run in (first, other))
    by_text = [{prompt: reward for (_, prompt), reward in rewards.items()} for rewards in (a, b)]
    shared = [prompt for prompt in by_text[0] if prompt in by_text[1]]
    if not shared:
        return "no held-out prompt in common"
    before, after = (np.asarray([rewards[prompt] for prompt in shared]) for rewards in by_text)
    change = paired_change(before, after)
    words = {True: "beyond noise", False: "within noise", None: "too little data to tell"}[change.beyond_noise]
    return f"{difference_in_words(change)} ({len(shared)} prompts), {words}"


def _reward_charts(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    held_out, training = [], []
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        evaluated = run.series("eval/reward", kind="eval")
        half = run.along(evaluated, "eval/half_width", kind="eval")
        if evaluated:
            held_out.append(Points(name, evaluated, i + 1, half, run.reward_range()))
        if run.series("reward/mean"):
            training.append(Line(name, run.series("reward/mean"), i + 1, smooth=True))
    smoothed = any(len(line.series.values) >= SMOOTHED for line in training)
    thick = f"Thin: each step. Thick, from {SMOOTHED} steps on: the mean of the steps around it."
    charts = [
        Chart("Held-out reward", "", "Bars are 95 % intervals of each run alone.", points=held_out),
        Chart("Training reward", "", thick if smoothed else "The training prompts of each step.", lines=training),
    ]
    losses = [run.series("eval/loss", kind="eval") for run in runs]
    points = [Points(names[i], loss, i + 1) for i, loss in enumerate(losses) if loss]
    charts.append(Chart("Held-out loss", "reward²", "GVPO loss of recorded groups.", points=points))
    return [chart for chart in charts if chart]


def _curves(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    charts = []
    for key, title, unit, floor in _CURVES:
        lines = [
            Line(name, run.series(key), i + 1, smooth=True)
            for i, (run, name) in enumerate(zip(runs, names, strict=True))
        ]
        charts.append(Chart(title, unit, "", [line for line in lines if line.series], floor=floor))
    return [chart for chart in charts if chart]


def _differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    facts = [_flat(run.config) | _environment(run) for run in runs]
    keys = [k for k in dict.fromkeys(k for f in facts for k in f) if k not in _NAMES]
    rows = []
    for key in keys:
        values = [fact.get(key) for fact in facts]
        if any(value != values[0] for value in values):
            cells = "".join(f"<td>{escaped('' if v is None else _cut(str(v)))}</td>" for v in values)
            rows.append(f"<tr><td>{escaped(key)}</td>{cells}</tr>")
    if not rows:
        return "<p>None: the settings, data, versions and reward code are the same.</p>"
    head = "".join(f"<th>{escaped(name)}</th>" for name in names)
    return (
        f'<div class="card scroll"><table><thead><tr><th>Setting</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _environment(run: Run) -> dict[str, Any]:
    """The facts of a run beside its settings: data, model, rewards, versions, device."""
    policy = run.environment.get("policy")
    policy = policy if isinstance(policy, dict) else {}
    facts: dict[str, Any] = {
        k: run.environment.get(k) for k in ("data", "model", "rewards", "objective", "gvpo", "ranks")
    }
    facts |= {k: policy.get(k) for k in ("backend", "device", "versions")}
    flat = _flat({k: v for k, v in facts.items() if v is not None}, "environment")
    hashes = {k: v[:12] if isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) else v for k, v in flat.items()}
    return hashes


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        flat |= _flat(value, name) if isinstance(value, Mapping) else {name: value}
    return flat


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]} ..."

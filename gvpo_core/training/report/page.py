"""The report page: result, alerts, charts, examples, settings. All text from models and users is escaped."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from gvpo_core.training.report.browser import browser, data_columns
from gvpo_core.training.report.changes import paired_rewards, prompt_rewards
from gvpo_core.training.report.document import chart_section, document, escaped
from gvpo_core.training.report.history import Episode, episodes, verdict
from gvpo_core.training.report.read import Run, number
from gvpo_core.training.report.reading import read_out
from gvpo_core.training.report.sections import RESULT, sections
from gvpo_core.training.watch.ending import ending

_PROMPTS = 12  # held-out prompts shown before and after
_RESUMED = '<p class="small">A dashed line in a chart: the run was resumed there.</p>'
_EPISODES = 30  # alerts shown
_CUT = 1500  # characters of a text shown


def page(run: Run) -> str:
    """The report of a run as one HTML document that loads nothing from elsewhere."""
    reading, alerts, drawn = read_out(run), episodes(run), sections(run)
    cards = "".join(
        f'<div class="card"><span class="label">{escaped(name)}</span><b>{escaped(value)}</b>'
        f'<span class="small">{escaped(small)}</span></div>'
        for name, value, small in reading.figures
    )
    body = [
        f"<h1>{escaped(run.folder.resolve().name)}</h1>",
        f'<p class="when">{escaped(_when(run))}</p>',
        f'<div class="figures">{cards}</div>' if cards else "",
        f'<section class="card words">{"".join(f"<p>{escaped(s)}</p>" for s in reading.sentences)}'
        '<p class="small">± is half of a 95 % interval.</p></section>',
        *(chart_section(title, charts) for title, charts in drawn if title == RESULT),
        _alerts(run, alerts),
        _list("notes", reading.notes),
        _RESUMED if any(e.get("event") == "resume" for e in run.events) else "",
        *(chart_section(title, charts) for title, charts in drawn if title != RESULT),
        _before_after(run),
        browser(run),
        "<h2>Settings and environment</h2>",
        _facts(run),
        _fold("config.toml", _verbatim(run.config_text)) if run.config_text else "",
        _fold("Environment", _verbatim(json.dumps(run.environment, indent=1))) if run.environment else "",
    ]
    return document(f"{run.folder.resolve().name}: GVPO run", body)


def _alerts(run: Run, alerts: Sequence[Episode]) -> str:
    """The verdict, and a table of the alerts with dates."""
    if not run.train and not alerts:
        return ""
    level, still_open = verdict(alerts), sum(e.open for e in alerts)
    count = len(run.train)
    if not alerts:
        summary = f"no alert in {count:,} step{'s' * (count != 1)}"
    else:
        now = f"{still_open or 'none'} of them at the last step"
        summary = f"{len(alerts)} alert{'s' * (len(alerts) != 1)} in {count:,} step{'s' * (count != 1)}, {now}"
    rows = []
    for e in alerts[:_EPISODES]:
        date = f"{datetime.fromtimestamp(e.begun, UTC):%d %b %Y, %H:%M} UTC" if e.begun == e.begun else ""
        steps = f"step {e.first}" if e.first == e.last else f"steps {e.first} to {e.last}"
        rows.append(
            f'<tr><td><b class="level {e.level}">{e.level}</b>{" still" if e.open else ""}</td>'
            f'<td>{steps}<br><span class="small">{date}</span></td>'
            f"<td>{escaped(e.seen)}</td><td>{escaped(e.advice)}</td></tr>"
        )
    more = f'<p class="small">{len(alerts) - _EPISODES} more in metrics.jsonl.</p>' if len(alerts) > _EPISODES else ""
    head = "<thead><tr><th></th><th>When</th><th>What</th><th>What to do</th></tr></thead>"
    table = f'<div class="scroll"><table class="alerts">{head}<tbody>{"".join(rows)}</tbody></table></div>{more}'
    return (
        f'<section class="card verdict"><p><b class="level {level}">{level}</b> {summary}</p>{table if rows else ""}'
        "</section>"
    )


def _facts(run: Run) -> str:
    """What is needed to repeat the run: seed, versions, command and resumes."""
    seed, environment = run.setting("run", "seed"), run.environment
    policy = environment.get("policy")
    libraries = policy.get("versions") if isinstance(policy, dict) else None
    versions = {"gvpo": environment.get("gvpo"), "Python": environment.get("python")}
    versions |= libraries if isinstance(libraries, dict) else {}
    command = environment.get("command")
    resumes = [str(e["step"]) for e in run.events if e.get("event") == "resume"]
    facts = {
        "Seed": ""
        if seed is None
        else f"{seed}; each sample's seed is derived from it, the step, the prompt and the response's number",
        "Versions": ", ".join(f"{name} {value}" for name, value in versions.items() if value),
        "Platform": environment.get("platform", ""),
        "Ranks": environment.get("ranks", ""),
        "Command": " ".join(map(str, command)) if isinstance(command, list) else "",
        "Resumed after step": ", ".join(resumes),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escaped(value)}</dd>" for name, value in facts.items() if str(value))
    return f'<dl class="card facts">{rows}</dl>' if rows else ""


def _before_after(run: Run) -> str:
    """The same held-out prompts at the first and the last evaluation, in the order of the data, without selection."""
    if len(run.held_out) < 2:
        return ""
    first, last = min(run.held_out), max(run.held_out)
    before, after = _by_prompt(run.held_out[first]), _by_prompt(run.held_out[last])
    shared = [key for key in before if key in after]
    old, new = prompt_rewards(run.held_out[first]), prompt_rewards(run.held_out[last])
    pair = paired_rewards(run)
    if pair is None or not shared:
        return ""
    differences = pair[1] - pair[0]
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    rows = []
    for key in shared[:_PROMPTS]:
        change = new.get(key, np.nan) - old.get(key, np.nan)
        mark = "up" if change > 0 else "down" if change < 0 else ""
        rows.append(
            f'<tr><td><p class="text">{_text(key[1])}</p>{_columns(before[key])}</td><td>{_response(before[key])}</td>'
            f"<td>{_response(after[key], mark)}</td></tr>"
        )
    return (
        f"<h2>Held-out prompts before and after</h2><p>Of {len(differences)} prompts {better} got better, "
        f"{worse} worse, {len(differences) - better - worse} stayed. The first {len(rows)} in the data's order:</p>"
        '<div class="card scroll"><table><thead><tr><th>Prompt</th>'
        f"<th>Step {first}</th><th>Step {last}</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _by_prompt(rows: Iterable[Mapping[str, Any]]) -> dict[Any, Mapping[str, Any]]:
    """The first response to each prompt, by the prompt's group and text."""
    by_prompt: dict[Any, Mapping[str, Any]] = {}
    for row in rows:
        by_prompt.setdefault((row.get("group"), row["prompt"]), row)
    return by_prompt


def _response(row: Mapping[str, Any], mark: str = "") -> str:
    reward = number(row.get("reward"))
    parts = row.get("rewards")
    parts = parts if isinstance(parts, dict) and len(parts) > 1 else {}
    facts = [f"{name} {_number(number(value))}" for name, value in parts.items()]
    facts += [f"{row['tokens']} tokens"] if "tokens" in row else []
    facts += [ending(row)] if ending(row) else []
    score = f'<b class="{mark}">{_number(reward)}</b> <span>{escaped(" · ".join(facts))}</span>'
    return f'<p class="score">{score}</p><p class="text">{_text(row["response"])}</p>'


def _columns(row: Mapping[str, Any]) -> str:
    items = (f"<div><dt>{escaped(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in data_columns([row]))
    return f'<dl class="columns">{"".join(items)}</dl>' if row.get("columns") else ""


def _number(value: float) -> str:
    return f"{value:.3g}" if value == value else "no score"


def _when(run: Run) -> str:
    times = [t for r in (*run.train, *run.evaluations, *run.events) if (t := number(r.get("time"))) == t]
    if not times:
        return "no records"
    start, end = (datetime.fromtimestamp(t, UTC) for t in (min(times), max(times)))
    same_day = start.date() == end.date()
    return f"{start:%d %B %Y, %H:%M} to {end:{'%H:%M' if same_day else '%d %B %Y, %H:%M'}} UTC"


def _list(kind: str, items: Iterable[str]) -> str:
    lines = "".join(f"<li>{escaped(item)}</li>" for item in items)
    return f'<ul class="{kind}">{lines}</ul>' if lines else ""


def _fold(title: str, content: str) -> str:
    return f"<details><summary>{escaped(title)}</summary><div>{content}</div></details>"


def _text(text: str) -> str:
    """Escapes foreign text, and cuts it to _CUT characters."""
    more = len(text) - _CUT
    shown = text[:_CUT] if more > 0 else text
    return escaped(shown, keep="\n") + (f" … ({more:,} more characters)" if more > 0 else "")


def _verbatim(text: str) -> str:
    shown = escaped(text, keep="\n")
    return f'<pre class="text">{shown}</pre>'

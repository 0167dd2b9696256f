"""The responses of many steps with filters for step, group and rank. The page's script shows them from inert data."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_core.training.report.read import Run, number
from gvpo_core.training.terminal.text import printable
from gvpo_core.training.watch.ending import ENDS, ending

_BUDGET = 1_500_000  # characters of all texts, so that a page of any run opens at once
_CUT = 700  # characters of a text
_ROWS = 24  # responses of a group: the best and the worst

_CONTROLS = """
<div class="controls"><button type="button" id="earlier">earlier</button>
<label>Step <select id="at-step"></select></label><button type="button" id="later">later</button>
<label>Group <select id="at-group"></select></label>
<label>Show <select id="which"><option value="ends">best and worst</option><option value="all">all</option>
<option value="best">best</option><option value="worst">worst</option>{ends}
<option value="unscored">without a score</option></select></label>
<span class="small" id="shown"></span></div>"""


def browser(run: Run) -> str:
    """The HTML section; empty if the run has no responses."""
    ends = {str(row["end"]) for rows in run.browsed.values() for row in rows if row.get("end") in ENDS}
    chosen = {"cut": "cut at the token limit"} if not ends else {k: v for k, v in ENDS.items() if k in ends}
    options = "".join(f'<option value="{name}">{words}</option>' for name, words in chosen.items())
    steps = _data(run)
    if not steps:
        return ""
    rows = sum(len(group["rows"]) for step in steps for group in step["groups"])
    # Escape characters that could end an attribute or an element. JSON makes everything else ASCII.
    data = json.dumps(steps, separators=(",", ":"))
    data = data.replace("&", "&amp;").replace("'", "&#39;").replace("<", "&lt;").replace(">", "&gt;")
    return (
        f'<section id="browse"><h2>Responses across steps</h2><p>{rows:,} responses of {len(steps)} of '
        f"{len(run.train)} steps: steps spread over the run, and those at which an alert was raised. All of them are "
        "in completions.jsonl.</p><noscript><p>The page's script shows them; without it, read that file.</p></noscript>"
        f'{_CONTROLS.format(ends=options)}<div id="responses"></div><div id="rows" hidden data-rows=\'{data}\'>'
        "</div></section>"
    )


def _data(run: Run) -> list[dict[str, Any]]:
    if not run.browsed:
        return []
    share = _BUDGET // len(run.browsed)
    steps = []
    for step, rows in sorted(run.browsed.items()):
        groups: dict[Any, list[Mapping[str, Any]]] = {}
        for row in rows:
            groups.setdefault(row.get("group"), []).append(row)
        kept: list[dict[str, Any]] = []
        size = 0
        for name, group in groups.items():
            shown = _group(name, group)
            size += len(shown["prompt"]) + sum(len(n) + len(v) for n, v in shown["columns"])
            size += sum(len(r[3]) + 70 for r in shown["rows"])
            if kept and size > share:
                break
            kept.append(shown)
        steps.append({"step": step, "of": len(groups), "groups": kept})
    return steps


def _group(name: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def rank(row: Mapping[str, Any]) -> float:
        reward = number(row.get("reward"))
        return -reward if reward == reward else float("inf")

    ordered = sorted(rows, key=rank)
    if len(ordered) > _ROWS:
        ordered = ordered[: _ROWS // 2] + ordered[-_ROWS // 2 :]
    return {
        "group": _text(str(name)),
        "of": len(rows),
        "prompt": _text(rows[0]["prompt"]),
        "columns": [(_text(name), _text(value)) for name, value in data_columns(rows)],
        "rows": list(map(_row, ordered)),
    }


def data_columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The data columns of a group's prompt as pairs of text (name, value). The group's first response has them."""
    columns: Mapping[str, Any] = next((row["columns"] for row in rows if isinstance(row.get("columns"), dict)), {})
    return [(str(k), v if isinstance(v, str) else json.dumps(v)) for k, v in columns.items()]


def _row(row: Mapping[str, Any]) -> list[Any]:
    """[reward or null, tokens or null, end, "cut" or "", response, rewards in words, end in words]."""
    reward, tokens, parts = number(row.get("reward")), number(row.get("tokens")), row.get("rewards")
    parts_text = ""
    if isinstance(parts, dict) and len(parts) > 1:
        parts_text = " · ".join(f"{_text(str(k))} {_short(number(v))}" for k, v in parts.items())
    return [
        float(f"{reward:.4g}") if reward == reward else None,
        int(tokens) if tokens == tokens else None,
        str(row["end"]) if row.get("end") in ENDS else "" if row.get("finished", True) else "cut",
        _text(row["response"]),
        parts_text,
        _text(ending(row)),
    ]


def _short(value: float) -> str:
    return f"{value:.3g}" if value == value else "no score"


def _text(text: str) -> str:
    more = len(text) - _CUT
    return printable(text[:_CUT], keep="\n") + (f" … ({more:,} more characters)" if more > 0 else "")

"""Loops and contexts that overflow are named: in the records, on the console and in the report."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import toy_run
from places import SUPPORT
from scripted_policy import ScriptedPolicy
from toy_run import records

from gvpo_core.training import train
from gvpo_core.training.config import EnvironmentConfig
from gvpo_core.training.report import write_report
from gvpo_core.training.watch.alerts import Alerts
from gvpo_core.training.watch.console import Console

pytestmark = pytest.mark.core

GAMES = str(SUPPORT / "episode_games.py")


def watched(folder: Path, script, *, max_tokens: int = 600, **environment) -> tuple[list[dict], str, str]:
    """Six steps of a policy that says a script's words: records, what the console showed, and the report."""
    config = toy_run.config_of(folder, "scripted", 6, rollout={"max_tokens": max_tokens})
    given = {"max_turns": 4, "workers": 1, "memory": 0.0} | environment
    config = replace(config, environment=EnvironmentConfig(**given))
    policy, console = ScriptedPolicy(script, updates=6), io.StringIO()
    rows = [{"prompt": "guess", "secret": secret} for secret in (3, 7)]
    rewards = {"long": lambda completions: [float(len(c[0]["content"])) for c in completions]}
    train(config, policy, train_rows=rows, rewards=rewards, console=Console(6, stream=console))
    return records(folder), console.getvalue(), write_report(folder).read_text()


def alert_of(found: list[dict], key: str) -> dict:
    return next(alert for alert in found[-1]["alerts"] if alert["key"] == key)


def test_a_repeated_tool_call_is_a_loop_despite_other_text(tmp_path) -> None:
    def script(text: str, u: float) -> str:
        asked = text.count("<tool>")
        call = json.dumps({"name": "add", "arguments": {"a": 1, "b": 1 + asked // 2}})
        return f"{u:.3f} <tool_call>{call}</tool_call>" if asked < 3 else "done"

    found, console, report = watched(tmp_path / "run", script, tools=(f"{GAMES}:add",))
    assert [r["episodes/repeated"] for r in found] == [1.0] * 6 and found[-1]["episodes/turns"] == 0
    alert = alert_of(found, "turns")
    assert "100% repeat a message or a call" in alert["seen"] and "loops" in alert["advice"]
    assert "repeat a message or a call" in " ".join(console.split())
    assert "100% repeat a message or a call" in report


def test_calls_that_differ_are_no_loop(tmp_path) -> None:
    def script(text: str, u: float) -> str:
        asked = text.count("<tool>")
        return (
            f'<tool_call>{{"name": "add", "arguments": {{"a": 1, "b": {asked}}}}}</tool_call>' if asked < 3 else "done"
        )

    found, _, _ = watched(tmp_path / "run", script, tools=(f"{GAMES}:add",))
    assert {r["episodes/repeated"] for r in found} == {0.0}
    assert not any(alert["key"] == "turns" for r in found for alert in r["alerts"])


def test_a_context_that_overflows_is_named_with_what_helps(tmp_path) -> None:
    found, console, report = watched(tmp_path / "run", lambda text, u: f"{u:.5f}", path=f"{GAMES}:Guess", max_tokens=40)
    assert {r["episodes/tokens"] for r in found} == {1.0}
    alert = alert_of(found, "truncation")
    assert alert["seen"].startswith("100% of the episodes of 5 steps are cut at the token limit")
    assert "environment.turn_tokens" in alert["advice"]
    for page in (" ".join(console.split()), report):
        assert "of the episodes of 5 steps are cut at the token limit" in page


def test_overflow_alert_ignores_episodes_cut_at_the_turn_limit() -> None:
    step = {"kind": "train", "truncated": 0.9, "episodes/turns": 0.9, "episodes/tokens": 0.0, "responses/total": 64}
    alerts = Alerts()
    for number in range(1, 21):
        before = alerts.update(step | {"step": number})
    assert not any(alert.key == "truncation" for alert in before.reasons)
    for number in range(21, 26):
        after = alerts.update(step | {"step": number, "episodes/turns": 0.5, "episodes/tokens": 0.4})
    [alert] = [alert for alert in after.reasons if alert.key == "truncation"]
    assert alert.seen.endswith(", 0% in the first steps")

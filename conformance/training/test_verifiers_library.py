"""The policy draws inside environments of `verifiers` 0.4; and traces that it writes become groups, token by token."""

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy_run
from places import ROOT, SUPPORT
from required import require
from scripted_policy import ScriptedPolicy
from toy_run import records

from gvpo_core.training import ConfigError
from gvpo_core.training.config import EnvironmentConfig
from gvpo_core.training.episodes import EnvironmentFailed

require("verifiers", subject="verifiers")
sys.path.append(str(ROOT / "examples" / "verifiers"))
from groups import groups_of

Calls = list[tuple[list[int], int]]  # what the policy saw before a token, and the token that it drew
USER, POLICY, END = 11, 12, 0


def spelled(text: str) -> list[int]:
    return [100 + ord(c) for c in text]


def rendered(messages: list) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of the messages and the span of each; what an earlier answer says before a tilde is dropped."""
    ids, spans = [], []
    for message in messages:
        start, own = len(ids), type(message).__name__ == "AssistantMessage"
        text = message.content.rpartition("~")[2] if own else message.content
        ids += [POLICY if own else USER, *spelled(text), END]
        spans.append((start, len(ids)))
    return ids, spans


def played(said: list[str], reward: float):
    """A trace of these answers, built by the library's own graph, and each token that was drawn with its context."""
    from verifiers.v1 import graph, types
    from verifiers.v1.configs.agent import WireAgentConfig
    from verifiers.v1.task import WireTaskData
    from verifiers.v1.trace import AgentInfo, TraceTask, WireTrace

    task = TraceTask(type="Task", data=WireTaskData(prompt="hi"), hash="h")
    trace = WireTrace(task=task, agent=AgentInfo(config=WireAgentConfig()), is_completed=True, ok=True)
    messages: list = [types.UserMessage(content="hi")]
    calls: Calls = []
    for number, words in enumerate(said):
        ids, spans = rendered(messages)
        prompt, drawn = [*ids, POLICY], [*spelled(words), END]
        calls += [([*prompt, *drawn[:j]], token) for j, token in enumerate(drawn)]
        answer = types.AssistantMessage(content=words)
        tokens = types.TurnTokens(
            prompt_ids=prompt, completion_ids=drawn, completion_logprobs=[-1.0] * len(drawn), message_spans=spans
        )
        response = types.Response(
            id=str(number), created=0, model="m", message=answer, finish_reason="stop", tokens=tokens
        )
        graph.prepare_turn(trace, messages).commit(response)
        messages = [*messages, answer, types.UserMessage(content=f"n{number}")]
    trace.record_reward("right", reward)
    return trace, calls


@pytest.mark.parametrize("said", [["a", "b", "c"], ["x~a", "y~b", "c"], ["a", "y~b", "c"]], ids=" ".join)
def test_the_library_s_traces_are_read_token_by_token(said: list[str], tmp_path: Path) -> None:
    from verifiers.v1.episode import EnvInfo, WireEpisode
    from verifiers.v1.utils.trace_store import write_episode

    trace, calls = played(said, 0.5)
    write_episode(tmp_path, WireEpisode(env=EnvInfo(id="e"), task=trace.task, traces=[trace], ok=True))
    [line] = (tmp_path / "traces.jsonl").read_text().splitlines()
    [group] = groups_of([json.loads(line)])
    later = group["response_segments"][0] or []
    assert len(later) == sum("~" in words for words in said[:-1]), "a dropped thought begins a segment"
    segments = [(group["prompt_ids"], group["responses"][0], group["response_mask"][0])]
    segments += [(s["prompt_ids"], s["response_ids"], s["response_mask"]) for s in later]
    found = [([*prompt, *ids[:j]], ids[j]) for prompt, ids, mask in segments for j, mine in enumerate(mask) if mine]
    assert sorted(found) == sorted(calls)
    assert group["rewards"] == [0.5] == [trace.reward]


ENVIRONMENT = f"{ROOT}/examples/verifiers/environment.py"


def config_of(folder: Path, taskset: str, *, steps: int = 1, options: dict | None = None, **settings):
    config = toy_run.config_of(folder, "scripted", steps, rollout={"max_tokens": 400})
    options = options or {"env": {"taskset": {"id": taskset}}}
    given = {"max_turns": 4, "workers": 1, "timeout": 120.0} | settings
    return replace(config, environment=EnvironmentConfig(path=f"{ENVIRONMENT}:Verifiers", options=options, **given))


def played_by(folder: Path, taskset: str, script, rows=({"task": 1}, {"task": 2}), **settings):
    """The policy and the batches that it was updated with."""
    config, batches = config_of(folder, taskset, **settings), []
    policy = ScriptedPolicy(script, updates=config.updates)
    update = policy.update
    policy.update = lambda batch, *a, **o: batches.append(batch) or update(batch, *a, **o)
    toy_run.run(config, list(rows), policy)
    return policy, batches


def check_tokens(policy: ScriptedPolicy, batch, written: list[dict]) -> None:
    """The tokens that are trained on are those that the script said, and all others are what it read."""
    for i, c in enumerate(written):
        mask = (
            batch.masks[i]
            if batch.masks is not None and batch.masks[i] is not None
            else [True] * len(batch.responses[i])
        )
        text = ["", ""]
        for token, own in zip(batch.responses[i], mask, strict=True):
            text[own] += policy.tokenizer.decode([token])
        turns = [m["content"] for m in c["episode"] if m["role"] == "assistant"]
        heard = [m for m in c["episode"] if m["role"] != "assistant"]
        assert text[True] == "".join(turn + "<end>" for turn in turns)
        assert text[False] == "".join(f"<{m['role']}>{m['content']}<end><assistant>" for m in heard), c
    assert np.abs(policy.weights - policy.reference).max() > 1e-2


def test_single_answers_are_scored_by_the_rewards_of_the_trace(tmp_path: Path) -> None:
    policy, [batch] = played_by(tmp_path / "run", "sum_tasks", lambda text, u: "1" if u < 0.5 else "22")
    written = records(tmp_path / "run", "completions")
    assert len(written) == 8 and policy.calls == [(2, 8)], "one call draws every answer"
    assert {c["prompt"] for c in written} == {"user: 0+1=", "user: 0+2="}
    for c in written:
        said, right = c["episode"][0]["content"], str(c["row"] + 1)
        assert c["reward"] == pytest.approx((said == right) - 0.01 * len(said)) and c["end"] == "done"
    assert {c["reward"] for c in written} == {0.99, -0.01, -0.02}
    check_tokens(policy, batch, written)


CALL = '<tool_call>{"name": "multiply", "arguments": {"a": 17, "b": 35}}</tool_call>'


def page() -> dict:
    """The settings of docs/environments.md."""
    text = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8").partition("```toml\n")[2]
    return tomllib.loads(text.partition("```")[0])["environment"]


def test_tool_server_works_with_the_settings_of_the_page(tmp_path: Path) -> None:
    def script(text: str, u: float) -> str:
        if "<tool>" in text:
            return text.rpartition("<tool>")[2].partition("<end>")[0]
        return f"I ask: {CALL}" if u < 0.6 else CALL[:50] if u < 0.8 else "595"

    settings = page()
    assert settings["options"] == {"env": {"taskset": {"id": "tool_tasks"}}}
    assert str(ROOT / settings.pop("path")) == f"{ENVIRONMENT}:Verifiers"
    policy, [batch] = played_by(tmp_path / "run", "", script, [{"task": 1}, {"task": 2}], **settings)
    written, record = records(tmp_path / "run", "completions"), records(tmp_path / "run")[0]
    assert policy.tokenizer.decode(written[0]["prompt_ids"]).startswith("<system>multiply<end><user>17*35=")
    called = [c for c in written if c["turns"] == 2]
    assert called and [m["content"] for m in called[0]["episode"]] == [f"I ask: {CALL}", "595", "595"]
    for c in written:
        right = (c["episode"][-1]["content"] == ["595", "2436"][c["row"]]) + 0.25 * (c in called)
        assert c["reward"] == right and c["end"] == "done", c
    assert len({c["reward"] for c in written}) >= 3 and 0 < record["tools/failed"] < 1
    assert policy.calls == [(2, 8), (2, len(called))], "all episodes of a turn are drawn by one call"
    check_tokens(policy, batch, written)


def guess(text: str, u: float) -> str:
    last = text.rpartition("<user>")[2]
    better = {"higher": "7", "lower": "3"}.get(last.partition("<end>")[0], "5")
    return "<think>hm</think>" + (better if u < 0.6 else "6")


def test_verifiers_user_turns_and_thoughts_are_not_answers(tmp_path: Path) -> None:
    policy, [batch] = played_by(tmp_path / "run", "guess_tasks", guess, [{"task": 2}, {"task": 6}], max_turns=3)
    written = records(tmp_path / "run", "completions")
    assert {c["end"] for c in written} == {"done", "turns"} and max(c["turns"] for c in written) == 3
    for c in written:
        said = [m["content"] for m in c["episode"] if m["role"] == "assistant"]
        won = said[-1].endswith(str([3, 7][c["row"]]))
        assert c["reward"] == pytest.approx(won - 0.1 * len(said)), "what a limit cuts is scored too"
        assert c["finished"] == won
        c["episode"] = c["episode"][: 2 * c["turns"] - 1]  # the hint that nobody read
    check_tokens(policy, batch, written)


def test_a_turn_that_is_cut_ends_the_rollout_and_is_scored(tmp_path: Path) -> None:
    played_by(tmp_path / "run", "guess_tasks", lambda text, u: "3" if u < 0.6 else "8...", [{"task": 2}, {"task": 4}])
    written = records(tmp_path / "run", "completions")
    cut = [c for c in written if c["end"] == "tokens"]
    assert cut and all(c["reward"] == pytest.approx(-0.1 * c["turns"]) for c in cut)


def test_two_runs_of_one_seed_are_equal_and_a_resumed_one_repeats(tmp_path: Path) -> None:
    first, _ = played_by(tmp_path / "a", "guess_tasks", guess, steps=2, workers=2)
    second, _ = played_by(tmp_path / "b", "guess_tasks", guess, steps=2)
    played_by(tmp_path / "c", "guess_tasks", guess)
    resumed, _ = played_by(tmp_path / "c", "guess_tasks", guess, steps=2)
    for policy, name in ((second, "b"), (resumed, "c")):
        np.testing.assert_array_equal(policy.weights, first.weights)
        same = [
            [(c["episode"], c["reward"]) for c in records(tmp_path / folder, "completions")] for folder in ("a", name)
        ]
        assert same[0] == same[1]
    assert len({json.dumps(c["episode"]) for c in records(tmp_path / "a", "completions")}) > 4


def test_an_environment_error_is_logged_and_fails_its_episode(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.syspath_prepend(str(SUPPORT))
    script = lambda text, u: "raise" if u < 0.2 else "hang" if u < 0.35 else "wait" if u < 0.5 else "fine"
    played_by(tmp_path / "run", "odd_tasks", script, [{"task": 0}, {"task": 1}], timeout=20.0)
    written = records(tmp_path / "run", "completions")
    failed = [c for c in written if c["end"] == "failed"]
    assert 0 < len(failed) <= 4 and {c["reward"] for c in written if c not in failed} == {1.0}
    assert all(c["reward"] is None for c in failed)
    assert {c["episode"][0]["content"] for c in written} == {"raise", "hang", "wait", "fine"}
    [warning] = [r.getMessage() for r in caplog.records if "the environment failed for" in r.getMessage()][:1]
    assert "ZeroDivisionError: of the task" in warning


def with_harness(taskset: str) -> dict:
    agent = {"harness": {"id": "odd_harness"}, "runtime": {"type": "subprocess"}}
    return {"env": {"taskset": {"id": taskset}, "agent": agent}}


def test_another_harness_that_streams_its_calls_gets_the_policy_s_turns(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(SUPPORT))
    options = with_harness("sum_tasks")
    policy, [batch] = played_by(tmp_path / "run", "", lambda text, u: "1" if u < 0.5 else "22", options=options)
    written = records(tmp_path / "run", "completions")
    assert {c["reward"] for c in written} == {0.99, -0.01, -0.02}
    check_tokens(policy, batch, written)


def test_a_conversation_that_does_not_grow_and_tools_that_differ_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(SUPPORT))
    options = with_harness("odd_tasks")
    with pytest.raises(EnvironmentFailed, match="changed what was said before; expected one conversation that grows"):
        played_by(tmp_path / "run", "", lambda text, u: "fine", [{"task": 0}, {"task": 0}], options=options)
    with pytest.raises(ConfigError, match=r"row 0: reset failed: .*task 1 shows other tools than task 0"):
        played_by(tmp_path / "other", "", lambda text, u: "fine", [{"task": 1}], options=options)


WRONG = {
    "env.agent.model is set; the policy draws its turns": {"env": {"agent": {"model": "m"}}},
    "expected the agent that is trained, one of agent": {"policy": "judge"},
    "env.user needs a client and a model of its own: the policy plays assistant": {
        "policy": "assistant",
        "env": {"id": "user-sim"},
    },
    "taskset 'no_tasks' not found": {"env": {"taskset": {"id": "no_tasks"}}},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_run_is_named(message: str, tmp_path: Path) -> None:
    changes = WRONG[message]
    options = {"env": {"taskset": {"id": "sum_tasks"}} | changes.get("env", {})} | {
        k: v for k, v in changes.items() if k != "env"
    }
    with pytest.raises(ConfigError, match=message):
        played_by(tmp_path / "run", "sum_tasks", lambda text, u: "1", options=options)


def test_rows_are_written_with_and_without_prompts(tmp_path: Path) -> None:
    for name, extra in (("bare", []), ("whole", ["--prompts"])):
        command = [sys.executable, ENVIRONMENT, "sum_tasks", str(tmp_path / name), "--limit", "3", *extra]
        subprocess.run(command, check=True, cwd=ROOT / "examples" / "verifiers", timeout=100)
    bare, whole = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in ("bare", "whole")
    )
    assert bare == [{"task": 0}, {"task": 1}, {"task": 2}]
    assert whole[2] == {"task": 2, "prompt": [{"role": "user", "content": "0+2="}]}
    policies = [
        played_by(tmp_path / f"run_{i}", "sum_tasks", lambda text, u: "1" if u < 0.5 else "22", rows)[0]
        for i, rows in enumerate((bare, whole))
    ]
    np.testing.assert_array_equal(policies[0].weights, policies[1].weights)

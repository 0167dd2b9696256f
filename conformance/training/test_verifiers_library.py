"""Traces that `verifiers` 0.4 itself builds and writes become groups in which every drawn token is scored once."""

import json
import sys
from pathlib import Path

import pytest
from places import ROOT
from required import require

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

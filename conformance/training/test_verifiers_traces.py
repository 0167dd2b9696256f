"""Traces of `verifiers` become groups in which every drawn token is scored once, in the context it was drawn in."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_run
from places import ROOT

sys.path.append(str(ROOT / "examples" / "verifiers"))
from groups import TraceError, groups_of, main

pytestmark = pytest.mark.core


def node(parent: int | None, role: str, ids: list[int], drawn: int = 0) -> dict:
    """A message whose last `drawn` tokens the policy drew."""
    message = {"role": role, "content": "" if drawn else "hello"}
    mask = [False] * (len(ids) - drawn) + [True] * drawn
    return {"parent": parent, "message": message, "sampled": bool(drawn), "token_ids": ids, "mask": mask}


def trace(nodes: list[dict], score: float = 1.0, **changes) -> dict:
    rewards = {"right": {"score": score, "weight": 2.0}, "unasked": None}
    task = {"type": "Task", "data": {}, "hash": "h"}
    return {"id": "t", "agent": {"name": "a"}, "task": task, "nodes": nodes, "rewards": rewards, "ok": True} | changes


ASKED, SAID = node(None, "user", [1, 2, 3]), node(0, "assistant", [4, 5, 0], 2)
LINE = [ASKED, SAID, node(1, "user", [6]), node(2, "assistant", [4, 7, 0], 2)]
# The second answer's context was rewritten: the user's first message, another rendering of what came then, an answer.
ANEW = [node(0, "assistant", [4, 8]), node(2, "user", [6]), node(3, "assistant", [4, 9, 0], 2)]
TREE = [ASKED, SAID, *ANEW, node(1, "tool", [10])]
# Two continuations of one answer.
FORK = [*LINE, node(1, "user", [11]), node(4, "assistant", [4, 12, 0], 2)]


def test_a_conversation_is_one_response_with_a_mask() -> None:
    [group] = groups_of([{"traces": [trace(LINE)]}, {"traces": [trace(LINE[:2], 0.25)]}])
    assert group["prompt_ids"] == [1, 2, 3, 4] and group["prompt"] == [{"role": "user", "content": "hello"}]
    assert group["responses"] == [[5, 0, 6, 4, 7, 0], [5, 0]]
    assert group["response_mask"] == [[1, 1, 0, 0, 1, 1], [1, 1]]
    assert group["rewards"] == [2.0, 0.5] and group["finished"] == [None, None]
    assert group["response_segments"] == [None, None]


def test_a_rewritten_context_is_a_segment_and_a_shared_answer_is_scored_once() -> None:
    [group] = groups_of([{"traces": [trace(TREE), trace(FORK)]}])
    assert group["responses"] == [[5, 0], [5, 0, 6, 4, 7, 0]]
    anew, continued = group["response_segments"]
    assert anew == [{"prompt_ids": [1, 2, 3, 4, 8, 6, 4], "response_ids": [9, 0], "response_mask": [1, 1]}]
    assert continued == [{"prompt_ids": [1, 2, 3, 4, 5, 0, 11, 4], "response_ids": [12, 0], "response_mask": [1, 1]}], (
        "its first answer is context here"
    )


@pytest.mark.parametrize(("nodes", "turns"), [(LINE, 2), (TREE, 2), (FORK, 3)])
def test_every_drawn_token_is_scored_once_after_all_that_was_before_it(nodes, turns) -> None:
    [group] = groups_of([{"traces": [trace(nodes)]}])
    segments = [
        (group["prompt_ids"], group["responses"][0], group["response_mask"][0]),
        *((s["prompt_ids"], s["response_ids"], s["response_mask"]) for s in group["response_segments"][0] or ()),
    ]
    found = []
    for prompt, response, mask in segments:
        assert mask[0] == mask[-1] == 1
        found += [([*prompt, *response[:i]], response[i]) for i, mine in enumerate(mask) if mine]
    right = []
    for one in nodes:
        path, above = [], one["parent"]
        while above is not None:
            path, above = [*nodes[above]["token_ids"], *path], nodes[above]["parent"]
        ids = one["token_ids"]
        right += [([*path, *ids[:i]], ids[i]) for i, mine in enumerate(one["mask"]) if mine]
    assert sorted(found) == sorted(right) and len(found) == 2 * turns


WRONG = {
    "was drawn and has no tokens: run verifiers with its train client": {
        "nodes": [LINE[0], LINE[1] | {"token_ids": [], "mask": []}]
    },
    "has another number of mask entries than of tokens": {"nodes": [LINE[0], LINE[1] | {"mask": [True]}]},
    "responses were rewritten after they were drawn": {"response_rewrites": [{"handler": "f"}]},
    "has tokens of images or video": {"mm_token_type_id_map": {"7": 1}},
    "has no tokens that the policy drew after a prompt": {"nodes": LINE[:1]},
    "begins with other tokens than the first rollout of its task": {"nodes": [node(None, "user", [9]), SAID]},
    "of several agents, a, b: choose one with --agent": {"agent": {"name": "b"}},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_not_exact_is_refused(message: str, tmp_path, monkeypatch, capsys) -> None:
    lines = [{"traces": [trace(LINE), trace(LINE) | WRONG[message]]}]
    with pytest.raises(TraceError) as error:
        groups_of(lines)
    assert message in str(error.value)
    (tmp_path / "traces.jsonl").write_text(json.dumps(lines[0]) + "\n")
    monkeypatch.setattr(sys, "argv", ["groups.py", str(tmp_path / "traces.jsonl"), str(tmp_path / "groups.jsonl")])
    assert main() == 1 and message in capsys.readouterr().err


def test_failed_rollouts_leave_their_group_and_cut_ones_are_not_finished() -> None:
    traces = [trace(LINE), trace(LINE, ok=False), trace(LINE, stop_condition="max_turns")]
    [group] = groups_of([{"traces": [*traces, trace(LINE, calls=[{"finish_reason": "length"}])]}])
    assert group["rewards"] == [2.0, None, 2.0, 2.0] and group["finished"] == [None, None, False, False]


def test_the_groups_are_trained_on(tmp_path: Path, monkeypatch, capsys) -> None:
    lines = [{"traces": [trace(LINE), trace(TREE, 0.0), trace(FORK, 0.5)]}]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["groups.py", str(tmp_path / "traces.jsonl"), str(tmp_path / "groups.jsonl")])
    assert main() == 0 and "3 rollouts in 1 groups" in capsys.readouterr().out
    model = toy_run.write_model(tmp_path / "model")
    settings = {"rollout": {"prompts": 1, "max_tokens": 30}, "data": {"train": str(tmp_path / "groups.jsonl")}}
    trained = toy_run.run(toy_run.config_of(tmp_path / "run", model, 1, **settings), None)
    assert np.abs(trained.weights - trained.reference).max() > 1e-2
    assert toy_run.records(tmp_path / "run")[0]["length/mean"] == pytest.approx((4 + 4 + 6) / 3)

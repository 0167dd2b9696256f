"""Episodes through the trainer: turns, tools, environments in processes, limits, rewards, resume."""

from dataclasses import replace

import numpy as np
import pytest
import toy_run
from engine_server import Server
from places import SUPPORT
from scripted_policy import ScriptedPolicy
from toy_run import records

from gvpo_core.training import ConfigError
from gvpo_core.training.config import Config, EnvironmentConfig
from gvpo_core.training.episodes import EnvironmentFailed, Environments
from gvpo_core.training.episodes.environments import Operation
from gvpo_core.training.rewards import RewardError
from gvpo_core.training.samplers import Engine

pytestmark = pytest.mark.core

GAMES = str(SUPPORT / "episode_games.py")
ROWS = [{"secret": 3}, {"secret": 7}]


def search(text: str, u: float) -> str:
    """Guesses 5 at first, then by what it hears; the last guess is right or not by chance."""
    last = text.rpartition("<user>")[2]
    if "higher" in last:
        return "7" if u < 0.5 else "6"
    if "lower" in last:
        return "3" if u < 0.5 else "2"
    return "5" if u < 0.8 else "8"


def config_of(folder, *, steps: int = 2, rewards=None, **environment) -> Config:
    config = toy_run.config_of(folder, "scripted", steps, rollout={"max_tokens": 60})
    given = {"path": f"{GAMES}:Guess", "max_turns": 4, "workers": 2, "timeout": 5.0, "memory": 0.0} | environment
    return replace(config, environment=EnvironmentConfig(**given))


def run(config: Config, script=search, rows=ROWS, **given) -> ScriptedPolicy:
    policy = ScriptedPolicy(script, updates=config.updates)
    toy_run.run(config, rows, policy, **given)
    return policy


def right_reward(episode: list[dict], secret: int, price: float = 0.1) -> float:
    said = [m["content"] for m in episode if m["role"] == "assistant"]
    return (said[-1] == str(secret)) - price * (len(said) - (said[-1] == str(secret)))


def test_episodes_are_played_scored_and_trained_on(tmp_path) -> None:
    seen = []
    policy = ScriptedPolicy(search, updates=2)
    update = policy.update
    policy.update = lambda batch, *a, **o: seen.append(batch) or update(batch, *a, **o)
    toy_run.run(config_of(tmp_path / "run"), ROWS, policy)
    written, first = records(tmp_path / "run", "completions"), records(tmp_path / "run")[0]
    assert len(written) == 16 and {len(c["episode"]) for c in written} >= {3, 5}, "some found it soon, some later"
    for c in written:
        assert c["reward"] == pytest.approx(right_reward(c["episode"], ROWS[c["row"]]["secret"])), c
        assert c["rewards"] == {"environment": c["reward"]}
    batch = seen[0]
    decode = policy.tokenizer.decode
    for i, c in enumerate(written[:8]):
        own = batch.masks[i]
        turns = decode([t for t, mine in zip(batch.responses[i], own, strict=True) if mine])
        assert turns == "".join(m["content"] + "<end>" for m in c["episode"] if m["role"] == "assistant")
        heard = decode([t for t, mine in zip(batch.responses[i], own, strict=True) if not mine])
        hints = [m["content"] for m in c["episode"] if m["role"] == "user"][: c["turns"] - 1]  # those that were read
        assert heard == "".join(f"<user>{hint}<end><assistant>" for hint in hints)
        assert c["tokens"] == sum(own) and c["finished"] == (c["end"] == "done")
    assert first["turns/mean"] == pytest.approx(np.mean([c["turns"] for c in written[:8]]))
    assert first["episodes/done"] + first["episodes/turns"] == 1
    assert np.abs(policy.weights - policy.reference).max() > 1e-2


def test_an_episode_depends_on_its_seed_alone_and_a_resumed_run_repeats(tmp_path) -> None:
    whole = run(config_of(tmp_path / "whole", steps=3))
    run(config_of(tmp_path / "parts", steps=1))
    resumed = run(config_of(tmp_path / "parts", steps=3))
    np.testing.assert_array_equal(resumed.weights, whole.weights)
    first, second = (records(tmp_path / name, "completions") for name in ("whole", "parts"))
    assert [c["episode"] for c in first] == [c["episode"] for c in second]
    assert len({tuple(m["content"] for m in c["episode"]) for c in first}) > 4, "turns have seeds of their own"


def test_turns_are_drawn_in_one_batch_with_shared_prompts(tmp_path) -> None:
    policy = run(config_of(tmp_path / "run", steps=1, turn_tokens=5))
    assert policy.calls[0] == (1, 8), "both rows begin alike: one conversation"
    assert all(conversations < responses for conversations, responses in policy.calls[:2])
    assert len(policy.calls) <= 4, "no more calls than turns"


def test_a_run_fed_from_its_own_episodes_takes_the_same_steps(tmp_path) -> None:
    played = run(config_of(tmp_path / "a"))
    fed = toy_run.config_of(
        tmp_path / "b", "scripted", rollout={"max_tokens": 60}, data={"train": str(tmp_path / "a/completions.jsonl")}
    )
    again = ScriptedPolicy(search, updates=2)
    toy_run.run(fed, None, again)
    np.testing.assert_array_equal(again.weights, played.weights)


def test_episodes_of_one_turn_that_were_cut_can_be_trained_on_again(tmp_path) -> None:
    played = run(config_of(tmp_path / "a", max_turns=1))
    assert {c["end"] for c in records(tmp_path / "a", "completions")} == {"turns"}
    for name, source in {"b": "a", "c": "b"}.items():
        data = {"train": str(tmp_path / source / "completions.jsonl")}
        fed = toy_run.config_of(tmp_path / name, "scripted", rollout={"max_tokens": 60}, data=data)
        again = ScriptedPolicy(search, updates=2)
        toy_run.run(fed, None, again)
        np.testing.assert_array_equal(again.weights, played.weights)
        assert not any(c["finished"] for c in records(tmp_path / name, "completions"))


def test_limits_are_distinguished(tmp_path) -> None:
    def talk(text: str, u: float) -> str:
        return {0: "5", 1: "x" * 100, 2: "1"}[int(3 * u)] if "<user>guess<end><assistant>" in text[-40:] else "1"

    run(config_of(tmp_path / "run", max_turns=3, turn_tokens=30, cut_reward=-2.0), talk)
    ends = {c["end"]: c for c in records(tmp_path / "run", "completions")}
    assert {*ends} == {"turns", "tokens"}
    assert not ends["turns"]["finished"] and ends["turns"]["turns"] == 3
    assert ends["turns"]["reward"] == pytest.approx(-2.0 - 3 * 0.1)
    assert ends["tokens"]["tokens"] == 30 and ends["tokens"]["reward"] == -2.0, "a turn has at most turn_tokens"
    record = records(tmp_path / "run")[0]
    assert record["truncated"] == 1 and record["episodes/turns"] + record["episodes/tokens"] == 1


def test_an_episode_never_passes_the_token_limit(tmp_path) -> None:
    run(config_of(tmp_path / "run", max_turns=100), lambda text, u: "1" if u < 0.9 else "5")
    written = records(tmp_path / "run", "completions")
    assert {c["end"] for c in written} == {"tokens"} and max(len(c["response_ids"]) for c in written) <= 60


CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": %s}}</tool_call>'


def test_tools_answer_and_rewards_read_the_conversation(tmp_path) -> None:
    def script(text: str, u: float) -> str:
        heard = text.rpartition("<tool>")[2].partition("<end>")[0] if "<tool>" in text else ""
        if not heard:
            return CALL % ("3" if u < 0.5 else '"x"' if u < 0.7 else "{")
        return heard

    def right(prompts, completions, answer):
        assert all(c[0]["role"] == "assistant" and c[1]["role"] == "tool" for c in completions)
        return [float(c[-1]["content"] == a) for c, a in zip(completions, answer, strict=True)]

    config = config_of(tmp_path / "run", path="", tools=(f"{GAMES}:add",), max_turns=3)
    rows = [{"prompt": "2 + 3", "answer": "5"}, {"prompt": "2 + 3 again", "answer": "5"}]
    config = replace(config, rollout=replace(config.rollout, max_tokens=400))
    played = run(config, script, rows, rewards={"right": right})
    written, record = records(tmp_path / "run", "completions"), records(tmp_path / "run")[0]
    good = [c for c in written if c["reward"] == 1]
    bad = [c for c in written if c["reward"] == 0]
    assert good and bad
    assert [m["content"] for m in good[0]["episode"]] == [CALL % 3, "5", "5"]
    assert all("error: " in c["episode"][1]["content"] for c in bad)
    assert written[0]["prompt_ids"], "the tools' schemas stand in the prompt's tokens"
    assert record["tools/calls"] == 1 and 0 < record["tools/failed"] < 1
    data = replace(config.data, train=str(tmp_path / "run/completions.jsonl"))
    fed = replace(config, run=replace(config.run, folder=str(tmp_path / "fed")), data=data)
    again = ScriptedPolicy(script, updates=2)
    toy_run.run(replace(fed, environment=EnvironmentConfig()), None, again)
    np.testing.assert_array_equal(again.weights, played.weights)


def test_tools_of_an_environment_have_its_state(tmp_path) -> None:
    def script(text: str, u: float) -> str:
        asked = text.count("<tool>")
        return '<tool_call>{"name": "buy", "arguments": {"count": 2}}</tool_call>' if asked < 1 + (u < 0.5) else "done"

    config = config_of(tmp_path / "run", path=f"{GAMES}:Shop", steps=1)
    rows = [{"prompt": "buy"}, {"prompt": "buy some"}]
    run(replace(config, rollout=replace(config.rollout, max_tokens=400)), script, rows)
    rewards = {c["reward"] for c in records(tmp_path / "run", "completions")}
    assert rewards <= {2.0, 4.0} and rewards


COUNT = '<tool_call>{"name": "count", "arguments": {"by": 2}}</tool_call>'


def counted(folder, script, **environment) -> list[dict]:
    config = config_of(folder, path=f"{GAMES}:Counter", steps=1, **environment)
    config = replace(config, rollout=replace(config.rollout, max_tokens=400))
    policy = run(config, script, [{"prompt": "count"}, {"prompt": "count"}])
    assert "count" in policy.tokenizer.decode(records(folder, "completions")[0]["prompt_ids"]).partition("<end>")[0]
    return records(folder, "completions")


def test_an_environment_with_schemas_answers_calls_by_its_step(tmp_path) -> None:
    def script(text: str, u: float) -> str:
        return "done" if text.endswith("<tool>2<end><assistant>") else COUNT if u < 0.7 else COUNT[:40]

    written = counted(tmp_path / "run", script)
    answered = [c for c in written if c["turns"] == 2]
    assert answered and all(c["reward"] == 2.0 and c["episode"][1]["content"] == "2" for c in answered)
    assert all(c["reward"] == 0.0 and c["turns"] == 1 for c in written if c not in answered), "unread calls are text"
    record = records(tmp_path / "run")[0]
    assert record["tools/calls"] == 1 and record["tools/failed"] == 1 - len(answered) / 8


def test_an_environment_scores_what_a_limit_cuts(tmp_path) -> None:
    def script(text: str, u: float) -> str:
        if "<tool>" in text:
            return COUNT
        return COUNT if u < 0.4 else "x..." if u < 0.85 else "fail..."

    written = counted(tmp_path / "run", script, max_turns=3, cut_reward=-1.0)
    assert {c["end"] for c in written} == {"turns", "tokens", "failed"}
    for c in written:
        right = {"turns": 99.0 + 6 + 0.5, "tokens": 99.25, "failed": None}[c["end"]]
        assert c["reward"] == right and not c["finished"], c


@pytest.mark.slow_on("hang")
@pytest.mark.parametrize("fault", ["raise", "crash", "hang"])
def test_a_fault_costs_its_episode_alone(fault: str, tmp_path) -> None:
    def script(text: str, u: float) -> str:
        return fault if text.count("lower") == 1 and u < 0.3 else search(text, u)

    run(config_of(tmp_path / "run", steps=1, timeout=1.0, workers=1), script, [{"secret": 3}, {"secret": 2}])
    written, record = records(tmp_path / "run", "completions"), records(tmp_path / "run")[0]
    failed = [c for c in written if c["end"] == "failed"]
    assert 0 < len(failed) <= 4 and record["episodes/failed"] == len(failed) / 8
    assert record["responses/unscored"] == len(failed) == record["reward_errors/environment/none"]
    for c in written:
        right = None if c in failed else pytest.approx(right_reward(c["episode"], [3, 2][c["row"]]))
        assert c["reward"] == right, c


def test_a_restarted_process_replays_its_episodes() -> None:
    for name, repeats in (("Guess", True), ("Random", False)):
        pool = Environments(EnvironmentConfig(path=f"{GAMES}:{name}", workers=1, timeout=1.0, memory=0.0))
        try:
            pool.ask([Operation("reset", i, ({"secret": 3},)) for i in range(2)])
            say = lambda i, text: Operation("step", i, ({"role": "assistant", "content": text},))
            assert "error" not in pool.ask([say(0, "5")])[0]
            assert "exited with status 7" in pool.ask([say(1, "crash")])[0]["error"]
            [found] = pool.ask([say(0, "3")])
            assert (found == {"messages": [], "reward": 1.0, "done": True}) == repeats
            assert ("did not repeat itself" in found.get("error", "")) != repeats
        finally:
            pool.close()


def test_async_environments_wait_side_by_side() -> None:
    pool = Environments(EnvironmentConfig(path=f"{GAMES}:Async", workers=1, timeout=1.0, memory=0.0))
    try:
        pool.ask([Operation("reset", i, ({"secret": 3},)) for i in range(3)])
        said = ("5", "hang", "3")
        results = pool.ask([Operation("step", i, ({"content": text},)) for i, text in enumerate(said)])
        assert results[1]["error"] == "no result within 1 s"
        assert results[0]["messages"] == [{"role": "user", "content": "lower"}] and results[2]["done"]
    finally:
        pool.close()


WRONG = {
    "environment.path = 'none.py:Game': there is no file none.py": {"path": "none.py:Game"},
    "has no method reset": {"path": f"{GAMES}:add"},
    "the tool untold has no docstring": {"tools": (f"{GAMES}:untold",)},
    "two tools are named buy; rename one": {"path": f"{GAMES}:Shop", "tools": (f"{GAMES}:buy",)},
    "environment.max_turns = 0; expected 1 to 10,000": {"max_turns": 0},
    "reset gave other messages than the prompt": {"path": f"{GAMES}:Unlike"},
    "has tool_schemas, whose calls step answers, beside the tools add": {
        "path": f"{GAMES}:Counter",
        "tools": (f"{GAMES}:add",),
    },
    "TypeError: tool_schemas returned": {"path": f"{GAMES}:Counter", "options": {"name": None}},
    "step returned 'higher', None": {},
}


@pytest.mark.parametrize("message", [m for m in WRONG if "step" not in m])
def test_what_cannot_run_is_named(message: str, tmp_path) -> None:
    with pytest.raises((ConfigError, EnvironmentFailed)) as error:
        run(config_of(tmp_path / "run", **WRONG[message]))
    assert message in str(error.value)


def test_a_step_of_another_form_ends_the_run(tmp_path) -> None:
    with pytest.raises(
        RewardError, match=r"failed for 8 of 8 episodes: TypeError: step returned .*expected \(messages"
    ):
        run(config_of(tmp_path / "run", path=f"{GAMES}:Wrong"))


class Losing:
    """A sampler that says the script's words and loses every fifth answer."""

    def __init__(self) -> None:
        self.policy, self.asked = ScriptedPolicy(search), 0

    def generate(self, prompts, seeds, sampling):
        drawn = self.policy.generate(prompts, seeds, sampling)
        return [[r for r in many if self._comes()] for many in drawn]

    def _comes(self) -> bool:
        self.asked += 1
        return self.asked % 5 != 0


def test_a_sampler_draws_the_turns_and_what_it_loses_leaves_the_group(tmp_path) -> None:
    sampler = Losing()
    policy = run(config_of(tmp_path / "run", steps=1), sampler=sampler)
    assert policy.calls == [] and sampler.policy.calls
    record, written = records(tmp_path / "run")[0], records(tmp_path / "run", "completions")
    assert 1 <= record["responses/lost"] == 8 - len(written)
    assert all(c["reward"] == pytest.approx(right_reward(c["episode"], ROWS[c["row"]]["secret"])) for c in written)


class Served(Server):
    """Keeps what it answered."""

    def answer(self, body):
        answer = super().answer(body)
        self.seen.append((body["prompt"], [choice["token_ids"] for choice in answer["choices"]]))
        return answer


@pytest.mark.slow
def test_an_engine_gets_token_ids_that_begin_with_all_of_the_turn_before(tmp_path) -> None:
    """So that a server's cache of prefixes holds all but what is new."""
    with Served(ScriptedPolicy(search)) as server:
        server.seen = []
        run(config_of(tmp_path / "run", steps=1), sampler=Engine(server.url, "tiny"))
        seen = server.seen
    opening = seen[0][0]
    before = [(*prompt, *ids) for prompt, drawn in seen for ids in drawn]
    later = [prompt for prompt, _ in seen if prompt != opening]
    assert len(later) >= 4 and {c["turns"] for c in records(tmp_path / "run", "completions")} >= {2, 3}
    for prompt in later:
        assert all(isinstance(token, int) for token in prompt)
        whole = max((ids for ids in before if tuple(prompt[: len(ids)]) == ids), key=len, default=())
        new = ScriptedPolicy(search).tokenizer.decode(prompt[len(whole) :])
        assert whole and new in ("<user>higher<end><assistant>", "<user>lower<end><assistant>"), "what was heard alone"


def test_held_out_rows_are_played_too(tmp_path) -> None:
    config = config_of(tmp_path / "run", steps=1)
    config = replace(config, evaluation=replace(config.evaluation, responses=2, temperature=1.0))
    run(config, evaluation_rows=[{"secret": 7}])
    first = records(tmp_path / "run", kind="eval")[0]
    assert -0.5 < first["eval/reward"] <= 0.9 and first["eval/prompts"] == 1

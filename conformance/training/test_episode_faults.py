"""Careless tools and environments: a fault costs its episode or is told to the model, and never more."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import toy_run
from places import SUPPORT
from ranks import RankedTable, run_ranks
from scripted_policy import ScriptedPolicy
from toy_run import records

from gvpo_core.training import ConfigError, rollout
from gvpo_core.training.config import Config, EnvironmentConfig, OptimizerConfig
from gvpo_core.training.episodes import (
    EnvironmentFailed,
    Environments,
    Episode,
    EpisodePrompts,
    environment_reward,
)
from gvpo_core.training.episodes.calls import parse_calls
from gvpo_core.training.episodes.environments import Operation
from gvpo_core.training.episodes.play import play
from gvpo_core.training.rewards import RewardLog
from gvpo_core.training.rewards.worker.tools import schema_of
from gvpo_core.training.sampling import Sampling

pytestmark = pytest.mark.core

ODD = str(SUPPORT / "odd_environments.py")


@pytest.fixture
def pool_of():
    """Starts a pool of one process; it ends with the test."""
    pools = []

    def start(**settings) -> Environments:
        pools.append(Environments(EnvironmentConfig(**{"workers": 1, "timeout": 20.0, "memory": 0.0} | settings)))
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()


def called(pool: Environments, *calls: tuple[str, dict]) -> list[dict]:
    """The messages that answer these calls of one message."""
    asked = [{"name": name, "arguments": arguments} for name, arguments in calls]
    _, [result] = pool.ask([Operation("reset", 0, ({},))]), pool.ask([Operation("tools", 0, (asked,))])
    assert "error" not in result, result
    return result["messages"]


def test_results_of_tools_are_text_that_every_tokenizer_takes(pool_of) -> None:
    pool = pool_of(tools=(f"{ODD}:give", f"{ODD}:defaults"))
    found = {what: called(pool, ("give", {"what": what}))[0]["content"] for what in ("none", "text", "dict", "date")}
    assert found == {"none": "null", "text": "é\n", "dict": '{"größe": [1, 2.5]}', "date": '"2024-02-29"'}
    half, large, ended, raised, defaults = called(
        pool, *(("give", {"what": what}) for what in ("half", "long", "exit", "raise")), ("defaults", {"a": 2})
    )
    assert half["content"] == "a\\ud800" and len(large["content"]) == 16_384 and defaults["content"] == "6"
    assert ended["content"] == "error: SystemExit: 3" and raised["content"] == "error: KeyError: '\\ud800'"


def test_an_unknown_tool_call_adds_only_a_short_text(pool_of) -> None:
    pool = pool_of(tools=(f"{ODD}:defaults",))
    name = "\ud800" * 20_000
    unknown, wrong = called(pool, (name, {}), ("defaults", {"a": 1, "\ud800": 2}))
    assert "name" not in unknown and len(unknown["content"]) < 200 and "there are: defaults" in unknown["content"]
    assert wrong["content"].startswith("error: defaults: ") and wrong["name"] == "defaults"
    json.dumps([unknown, wrong], ensure_ascii=False).encode()


def test_methods_of_all_kinds_are_tools(pool_of) -> None:
    pool = pool_of(path=f"{ODD}:Kinds")
    required = {tool["function"]["name"]: tool["function"]["parameters"]["required"] for tool in pool.tools}
    assert required == {"static": ["a"], "of_class": ["a"], "own": ["a"], "defaults": ["a"]}
    answers = called(pool, *((name, {"a": 3}) for name in ("static", "of_class", "own", "defaults")), ("own", {"a": 4}))
    assert [m["content"] for m in answers] == ["3", "Kinds 3", "3", "7", "7"]


def test_async_tools_of_several_episodes_wait_side_by_side(pool_of) -> None:
    pool = pool_of(tools=(f"{ODD}:together",))
    pool.ask([Operation("reset", i, ({},)) for i in range(3)])
    call = [{"name": "together", "arguments": {"count": 3}}]
    results = pool.ask([Operation("tools", i, (call,)) for i in range(3)])
    assert [r["messages"][0]["content"] for r in results] == ["3", "3", "3"]


def test_a_deeply_nested_call_is_a_failed_call_not_a_failed_episode() -> None:
    deep = '{"a": ' * 120 + "1" + "}" * 120
    parsed = parse_calls(f'<tool_call>{{"name": "add", "arguments": {deep}}}</tool_call>')
    assert parsed.calls == [] and "it nests deeper than 100 levels" in parsed.errors[0]


def test_an_unsendable_value_fails_only_its_own_episode(pool_of) -> None:
    pool = pool_of(path=f"{ODD}:Patient")
    good, bad = pool.ask([Operation("reset", 0, ({},)), Operation("reset", 1, ({"column": object()},))])
    assert "error" not in good and "cannot be sent to the environment's process: it holds a" in bad["error"]


STEPS = {
    "nan": "step returned reward = nan; expected a finite number or None",
    "-1e308": "step returned reward = -1e+308; expected a number within 3.4e+38 or None",
    "half": "step returned a message that cannot be sent as JSON: UnicodeEncodeError",
    "object": "step returned a message that cannot be sent as JSON: TypeError: Object of type date is not JSON",
    "parts": "expected a text role and a text content",
    "mute": "step returned None (NoneType); expected (messages, reward, done)",
    "large": "step returned messages of 5,242,911 bytes; expected at most 3,145,728",
}


@pytest.mark.parametrize("name", ["Says", "Patient"])
def test_a_step_of_another_form_fails_its_episode_by_name_and_leaves_the_others(name, pool_of) -> None:
    pool = pool_of(path=f"{ODD}:{name}")
    said = [*STEPS, "numpy", "hello"]
    pool.ask([Operation("reset", i, ({},)) for i in range(len(said))])
    results = pool.ask([Operation("step", i, ({"content": text},)) for i, text in enumerate(said)])
    for text, result in zip(STEPS, results, strict=False):
        assert STEPS[text] in result["error"], text
        assert "status" not in result["error"], "the process goes on"
    assert results[-2] == {"messages": [], "reward": 0.5, "done": True}
    assert results[-1]["messages"] == [{"role": "user", "content": "é 🂡"}]


WRONG = {
    "environment.options are not the arguments of the class: missing a required argument: 'size'": {
        "path": f"{ODD}:Sized"
    },
    "has no class Nothing": {"path": f"{ODD}:Nothing"},
    "'odd_environments.py': expected package.module:class or file.py:class": {"path": "odd_environments.py"},
    "the attribute tools of .*:OneName is 'own' \\(str\\); expected a list": {"path": f"{ODD}:OneName"},
    "the parameter a of the tool bare has no type; add one, as in x: int": {"tools": (f"{ODD}:bare",)},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_a_tool_is_named(message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Environments(EnvironmentConfig(workers=1, memory=0.0, **WRONG[message]))


def test_a_process_that_dies_is_not_called_one_of_a_reward(pool_of) -> None:
    pool = pool_of(path=f"{SUPPORT / 'episode_games.py'}:Guess")
    pool.ask([Operation("reset", 0, ({"secret": 3},))])
    [result] = pool.ask([Operation("step", 0, ({"content": "crash"},))])
    assert result["error"].startswith("its process exited with status 7")


def test_an_option_that_an_episode_changes_is_the_same_in_the_next_one(pool_of, tmp_path) -> None:
    (tmp_path / "cards.py").write_text(
        "class Cards:\n"
        "    def __init__(self, deck):\n        self.deck = deck\n"
        "    def reset(self, row):\n        pass\n"
        "    def step(self, message):\n        return [], float(self.deck.pop()), True\n"
    )
    pool = pool_of(path=f"{tmp_path}/cards.py:Cards", options={"deck": [1, 2]})
    pool.ask([Operation("reset", i, ({},)) for i in range(3)])
    results = pool.ask([Operation("step", i, ({"content": ""},)) for i in range(3)])
    assert [result.get("reward") for result in results] == [2.0] * 3


def test_a_schema_takes_what_a_function_allows() -> None:
    def search(words: list[str], most: int | None = None) -> str:
        """Searches."""
        return ""

    assert schema_of(search)["function"]["parameters"] == {
        "type": "object",
        "properties": {"words": {"type": "array", "items": {"type": "string"}}, "most": {"type": "integer"}},
        "required": ["words"],
    }


# -- through the trainer


def config_of(folder, *, steps: int = 1, max_tokens: int = 200, **environment) -> Config:
    config = toy_run.config_of(folder, "scripted", steps, rollout={"max_tokens": max_tokens})
    given = {"path": f"{ODD}:Says", "max_turns": 3, "workers": 1, "timeout": 20.0, "memory": 0.0} | environment
    return replace(config, environment=EnvironmentConfig(**given))


def run(config: Config, script, rows) -> ScriptedPolicy:
    policy = ScriptedPolicy(script, updates=config.updates)
    toy_run.run(config, rows, policy)
    return policy


ROWS = [{"prompt": "one"}, {"prompt": "two"}]


def test_the_log_has_why_episodes_failed(tmp_path, caplog) -> None:
    with caplog.at_level(logging.INFO, "gvpo"):
        run(config_of(tmp_path / "run"), lambda text, u: "raise" if u < 0.3 else "numpy", ROWS)
    failed = sum(c["end"] == "failed" for c in records(tmp_path / "run", "completions"))
    assert 0 < failed <= 4
    seen = f"the environment failed for {failed} of 8 episodes; the first: ValueError: silent"
    [told] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and seen in r.getMessage()]
    assert "\n" not in told and any(f"{seen}" in r.getMessage() and 'File "' in r.getMessage() for r in caplog.records)


def test_an_error_of_the_protocol_has_no_traceback_of_ours(pool_of) -> None:
    pool = pool_of(path=f"{ODD}:Says")
    pool.ask([Operation("reset", 0, ({},)), Operation("reset", 1, ({},))])
    ours, theirs = pool.ask([Operation("step", i, ({"content": said},)) for i, said in enumerate(("mute", "raise"))])
    assert ours["traceback"] == "" and "odd_environments.py" in theirs["traceback"]


def test_an_error_of_close_is_logged_and_harmless(tmp_path, caplog) -> None:
    run(config_of(tmp_path / "run", path=f"{ODD}:Open"), lambda text, u: "numpy", ROWS)
    assert [c["reward"] for c in records(tmp_path / "run", "completions")] == [0.5] * 8
    assert "close failed for 8 of 8 episodes; the first: OSError: still open" in caplog.text


def test_a_row_whose_reset_fails_is_lost_and_counted(tmp_path, caplog) -> None:
    rows = [{"prompt": "one", "secret": "unborn"}, {"prompt": "two", "secret": "x"}]
    run(config_of(tmp_path / "run"), lambda text, u: "numpy" if u < 0.5 else "on", rows)
    [record] = records(tmp_path / "run")
    assert record["responses/lost"] == 4 and record["responses/total"] == 4
    assert {c["row"] for c in records(tmp_path / "run", "completions")} == {1}
    assert "the environment failed for 4 of 8 episodes; the first: OSError: no such game" in caplog.text


def test_a_system_prompt_precedes_the_messages_of_reset(tmp_path) -> None:
    seen = []
    config = config_of(tmp_path / "run", path=f"{SUPPORT / 'episode_games.py'}:Guess", max_turns=1)
    config = replace(config, data=replace(config.data, system_prompt="be short"))
    run(config, lambda text, u: seen.append(text) or f"{u:.1f}", [{"secret": 3}, {"secret": 7}])
    assert {*seen} == {"<system>be short<end><user>guess<end><assistant>"}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("empty", "step gave no messages and done = False; expected messages for the next turn"),
        ("mute", "the environment failed for 8 of 8 episodes: TypeError: step returned None"),
    ],
)
def test_an_environment_that_breaks_the_protocol_ends_the_run(said, message, tmp_path) -> None:
    with pytest.raises(EnvironmentFailed) as error:
        run(config_of(tmp_path / "run"), lambda text, u: said, ROWS)
    assert message in str(error.value)


def test_an_environment_that_never_ends_is_cut_at_the_limits(tmp_path) -> None:
    run(config_of(tmp_path / "turns", path=f"{ODD}:Patient", max_turns=3), lambda text, u: "on", ROWS)
    assert {(c["end"], c["turns"]) for c in records(tmp_path / "turns", "completions")} == {("turns", 3)}


def test_a_turn_that_is_cut_within_a_call_calls_nothing(tmp_path) -> None:
    call = '<tool_call>{"name": "give", "arguments": {"what": "text"}}</tool_call>'
    config = config_of(tmp_path / "run", path="", tools=(f"{ODD}:defaults",), turn_tokens=30)
    policy = ScriptedPolicy(lambda text, u: call, updates=1)
    toy_run.run(config, ROWS, policy, rewards={"long": lambda completions: [len(c[0]["content"]) for c in completions]})
    written = records(tmp_path / "run", "completions")
    assert {(c["end"], c["turns"], c["tokens"]) for c in written} == {("tokens", 1, 30)}
    assert all(len(c["episode"]) == 1 for c in written) and records(tmp_path / "run")[0]["tools/calls"] == 0


class Played(EpisodePrompts):
    """Episodes of one token, each with its own number as its message and its reward; the first rank loses one."""

    def play(self, policy, rows, seeds, sampling, draw):
        numbers = iter(range(10 * policy.rank, 100))
        made = [[self._episode(next(numbers)) for _ in own] for own in seeds]
        return [made[0][1:], *made[1:]] if policy.rank == 0 else made

    def _episode(self, number: int) -> Episode:
        said = [{"role": "assistant", "content": str(number)}]
        return Episode((1,), True, messages=said, reward=float(number))


def test_episodes_keep_their_rewards_where_a_rank_before_lost_one() -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    prompts = Played(["a", "b"], [(0,), (0,)], rows, chat=SimpleNamespace(tools=None))
    found = {}

    def work(policy: RankedTable) -> None:
        policy.decode = lambda tokens: "x"
        reward = environment_reward(1.0, RewardLog())
        found[policy.rank] = rollout.collect(policy, prompts, [0, 1], 3, Sampling(5), [reward], (0,))

    run_ranks(2, work, {"a": {"x": 1.0}}, OptimizerConfig())
    for drawn in found.values():
        assert [c["reward"] for c in drawn.completions] == drawn.rewards.tolist() == [1.0, 2.0, 10.0, 11.0, 12.0]
        assert [c["response"] for c in drawn.completions] == [f"assistant: {n}" for n in (1, 2, 10, 11, 12)]
        assert drawn.details["responses/lost"] == 1.0
    assert (found[0].start, found[1].start) == (0, 2)


def test_an_environment_that_fails_on_one_rank_ends_every_rank() -> None:
    """The others waited for its episodes and ended with an error of the connection."""
    broken = SimpleNamespace(
        config=EnvironmentConfig(), tools=[], ask=lambda asked: [{"error": "no game"}] * len(asked)
    )
    chat, errors = SimpleNamespace(text=lambda messages: "a"), []
    prompts = [([{"role": "user", "content": "a"}], (0,), {})]

    def work(policy: RankedTable) -> None:
        try:
            play(policy, broken, chat, prompts, [[1, 2]] if policy.rank else [[]], Sampling(5), lambda *asked: [])
        except EnvironmentFailed as e:
            errors.append(str(e))

    run_ranks(2, work, {"a": {"x": 1.0}}, OptimizerConfig())
    assert len(errors) == 2 and all("the environment failed for 2 of 2 episodes: no game" in text for text in errors)

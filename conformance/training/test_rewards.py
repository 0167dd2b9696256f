"""Rewards: TRL's convention, and that a bad one costs a response and never the run."""

import asyncio
import logging
import threading

import numpy as np
import pytest

from gvpo_core.training.config import ConfigError, RewardConfig
from gvpo_core.training.rewards import Reward, RewardError, close_rewards, load_rewards, score
from gvpo_core.training.rewards.builtin import exact_match, math_verify, regex_match
from gvpo_core.training.rewards.calls import Threads
from gvpo_core.training.rewards.log import RewardLog

pytestmark = pytest.mark.core

PROMPTS = ["p0", "p1", "p2", "p3"]
TEXTS = ["0", "1", "2", "3"]


def given(name, function, weight=1.0, timeout=5.0, max_failures=1.0, failure_value=None, **options):
    return Reward(name, Threads(name, function, options, log=RewardLog()), weight, timeout, max_failures, failure_value)


def scores(function, columns=None, prompts=PROMPTS, **settings):
    return score([given("r", function, **settings)], prompts, TEXTS[: len(prompts)], columns or {})


def test_plain_and_async_functions_with_weights_at_the_same_time():
    both = threading.Barrier(2, timeout=10)  # passed when both functions are inside it

    async def slow(completions, **_):
        await asyncio.to_thread(both.wait)
        return [float(c) for c in completions]

    def plain(prompts, completions, bonus, **_):
        both.wait()
        return [b + (p == "p1") for p, b in zip(prompts, bonus, strict=True)]

    got = score([given("a", slow, 2.0), given("b", plain, -1.0)], PROMPTS, TEXTS, {"bonus": [10, 20, 30, 40]})
    np.testing.assert_array_equal(got.parts["a"], [0, 1, 2, 3])
    np.testing.assert_array_equal(got.parts["b"], [10, 21, 30, 40])
    np.testing.assert_array_equal(got.total, [-10, -19, -26, -34])


def test_a_chat_prompt_gets_a_chat_completion_and_only_asked_columns():
    seen = {}

    def reward(prompts, completions, answer):
        seen.update(prompts=prompts, completions=completions, answer=answer)
        return [1.0]

    chat = [{"role": "user", "content": "hi"}]
    scores(reward, prompts=[chat], columns={"answer": ["x"], "other": ["y"]})
    assert seen == {"prompts": [chat], "completions": [[{"role": "assistant", "content": "0"}]], "answer": ["x"]}


def test_one_that_raises_costs_its_response_alone(caplog):
    def reward(completions, **_):
        return [1 / (int(c) - 2) for c in completions]

    with caplog.at_level(logging.WARNING, "gvpo.rewards"):
        got = scores(reward)
    np.testing.assert_array_equal(got.total, [-0.5, -1.0, np.nan, 1.0])
    assert got.errors == {"r": {"error": 1, "timeout": 0, "none": 0}}
    assert "p2" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_one_that_hangs_costs_its_response_alone():
    released = threading.Event()

    def reward(completions, **_):
        if "3" in completions:
            released.wait(600)
        return [1.0] * len(completions)

    got = scores(reward, timeout=0.5)
    assert not released.is_set()  # the call still hangs
    released.set()
    np.testing.assert_array_equal(np.isnan(got.total), [False, False, False, True])
    assert got.errors["r"]["timeout"] == 1


def test_an_async_one_that_hangs():
    async def reward(completions, **_):
        if completions[0] == "1":
            await asyncio.sleep(60)
        elif len(completions) > 1:
            raise OSError("no batches here")
        return [1.0]

    assert np.isnan(scores(reward, timeout=0.5).total).tolist() == [False, True, False, False]


def test_none_and_nan_leave_the_response_without_a_score():
    got = scores(lambda completions, **_: [1, None, float("nan"), np.float32(2)])
    np.testing.assert_array_equal(got.total, [1, np.nan, np.nan, 2])
    assert got.errors["r"]["none"] == 2


def test_exiting_and_interrupting_are_errors_of_the_response():
    def reward(completions, **_):
        if "1" in completions:
            raise SystemExit("leave")
        if "2" in completions:
            raise KeyboardInterrupt
        return [1.0]

    got = scores(reward)
    np.testing.assert_array_equal(got.total, [1, np.nan, np.nan, 1])
    assert got.errors["r"]["error"] == 2


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], "reward r returned 2 values for 4 completions"),
        ([1.0] * 5, "reward r returned 5 values for 4 completions"),
        (["good", 1, 1, 1], r"reward r returned 'good' \(str\) for completion 0; expected a number or None"),
        (["1.0", 1, 1, 1], r"reward r returned '1.0' \(str\) for completion 0"),
        ([[1], 1, 1, 1], r"reward r returned '\[1\]' \(list\) for completion 0"),
        ([1, float("inf"), 1, 1], "reward r returned inf for completion 1; expected a finite number"),
        ([1, -1.7e308, 1, 1], r"reward r returned -1.7e\+308 for completion 1; expected a number within 3.4e\+38"),
        ([1, 1, 10**60, 1], r"reward r returned 1e\+60 for completion 2"),
        (None, "reward r returned 'None'; expected a list of 4 numbers"),
        (0.5, "reward r returned '0.5'; expected a list of 4 numbers"),
        ("1111", "reward r returned '1111'; expected a list"),
        ({"a": 1}, "expected a list of 4 numbers"),
        ({1.0, 2.0, 3.0, 4.0}, "expected a list of 4 numbers"),
    ],
)
def test_what_is_not_one_number_each_is_refused_by_name(returned, message):
    with pytest.raises(RewardError, match=message):
        scores(lambda completions, **_: returned)


def test_no_score_at_all_is_an_error_with_the_first_reason():
    def reward(completions, **_):
        raise ValueError("no verifier here")

    with pytest.raises(RewardError, match=r"gave no score to any of 4 responses; .*'p0': ValueError: no verifier here"):
        scores(reward)


def test_too_many_failures_stop_with_the_first_traceback():
    def reward(completions, **_):
        return [1 / (int(c) % 2) for c in completions]

    assert scores(reward, max_failures=0.5).errors["r"]["error"] == 2
    with pytest.raises(RewardError, match=r"failed for 2 of 4 responses, above rewards.r.max_failures = 0.4") as caught:
        scores(reward, max_failures=0.4)
    assert "test_rewards.py" in str(caught.value)
    assert "ZeroDivisionError" in str(caught.value)


def test_a_failure_can_have_a_value_of_its_own():
    got = scores(lambda completions, **_: [1 / int(c) for c in completions], failure_value=-1.0)
    np.testing.assert_allclose(got.total, [-1, 1, 0.5, 1 / 3])
    assert got.errors["r"]["error"] == 1


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_finding_functions(isolation, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def good(completions, **_):\n    return [1.0] * len(completions)\nnumber = 3\n")
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name\n")
    loaded = load_rewards({"a": RewardConfig(f"{file}:good", 2.0, isolation=isolation)})
    np.testing.assert_array_equal(score(loaded, PROMPTS, TEXTS, {}).total, [2.0] * 4)
    close_rewards(loaded)
    for spec, message in (
        ("exact_mach", "expected one of exact_match"),
        (f"{file}:bad", "has no function bad"),
        (f"{file}:number", "has no function number"),
        (f"{tmp_path}/none.py:f", "there is no file"),
        (f"{broken}:f", "importing .* failed: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("no_such_package.x:f", "importing no_such_package.x failed"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            load_rewards({"a": RewardConfig(spec, isolation=isolation)})
        assert "rewards.a.function" in str(caught.value)


def test_a_module_beside_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_here.py").write_text("def f(completions, **_):\n    return [2] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    loaded = load_rewards({"a": RewardConfig("my_rewards_here:f")})
    assert score(loaded, PROMPTS, TEXTS, {}).total.tolist() == [2] * 4
    close_rewards(loaded)


def test_code_is_not_run_without_a_stated_sandbox(tmp_path):
    file = tmp_path / "runs.py"
    file.write_text("def f(completions, **_):\n    return [1] * len(completions)\nf.runs_code = True\n")
    for isolation in ("process", "thread"):
        with pytest.raises(ConfigError, match=r"runs code from responses.*rewards.a.sandbox"):
            load_rewards({"a": RewardConfig(f"{file}:f", isolation=isolation)})
    close_rewards(load_rewards({"a": RewardConfig(f"{file}:f", sandbox="a container without network")}))


def test_built_in_rewards():
    chat = [{"role": "assistant", "content": " 7 "}]
    assert exact_match([chat, "8"], answer=["7", 7]) == [1.0, 0.0]
    assert regex_match(["3 + 4 = 7.", "none", "7 or 8"], answer=[7, 7, 7]) == [1.0, 0.0, 0.0]
    assert regex_match(["<a>x</a>"], pattern="<a>(.*?)</a>", column="want", want=["x"]) == [1.0]
    with pytest.raises(KeyError, match=r"no column 'answer' \(it has: target\)"):
        exact_match(["a"], target=["a"])


def test_math_verify_away_from_the_main_thread():
    pytest.importorskip("math_verify", reason="the rewards extra is not installed")
    columns = {"answer": ["1/2", "2", r"$\frac{4}{2}$", "7"]}
    got = score([given("m", math_verify)], PROMPTS, ["0.5", "it is 2", "$2$", "8"], columns)
    np.testing.assert_array_equal(got.total, [1, 1, 1, 0])


@pytest.mark.parametrize(
    ("function", "options", "named"),
    [
        (lambda responses: [0.0], {}, "rewards.r: the function takes (responses) and no responses"),
        (lambda: [0.0], {}, "rewards.r: the function takes () and no responses"),
        (lambda completions: [0.0], {"target": 5}, "rewards.r.options"),
    ],
    ids=["other name", "no arguments", "an option that it does not take"],
)
def test_a_signature_that_cannot_be_called_is_found_with_the_settings(function, options, named):
    with pytest.raises(ConfigError) as refused:
        load_rewards({"r": RewardConfig(function="given", options=options)}, {"r": function})
    assert named in str(refused.value) and "\n" not in str(refused.value)

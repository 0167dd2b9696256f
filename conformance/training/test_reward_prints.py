"""Rewards in threads of the run: what they print goes to rewards.log, and everything else where it went before."""

import asyncio
import sys
import threading

import pytest

from gvpo_core.training import RewardConfig
from gvpo_core.training.rewards import close_rewards, load_rewards, score
from gvpo_core.training.rewards.log import RewardLog

pytestmark = pytest.mark.core


def quiet(completions):
    print("judged", len(completions), "responses")
    print("half a ", end="")
    print("line", file=sys.stderr)
    sys.stdout.write("no line break")
    return [1.0] * len(completions)


async def awaited(completions):
    print("before")
    await asyncio.sleep(0)
    print("after")
    return [1.0] * len(completions)


def loud(completions):
    print("so far")
    raise ValueError("no")


def written_by(function, tmp_path) -> str:
    log = RewardLog()
    rewards = load_rewards({"r": RewardConfig(function="given")}, {"r": function}, log=log)
    log.open(tmp_path)
    try:
        score(rewards, ["p"] * 2, ["a", "b"], {})
    finally:
        close_rewards(rewards)
        log.close()
    return (tmp_path / "rewards.log").read_text()


@pytest.mark.parametrize(
    ("function", "lines"),
    [
        (quiet, ["judged 2 responses", "half a line", "no line break"]),
        (awaited, ["before", "after"]),
    ],
    ids=["sync", "async"],
)
def test_prints_of_a_function_go_to_rewards_log(function, lines, tmp_path, capfd):
    before = sys.stdout, sys.stderr
    written = written_by(function, tmp_path)
    assert all(f"r: {line}" in written or line in written for line in lines)
    assert [line for line in lines if written.count(line) != 1] == []
    assert capfd.readouterr() == ("", "")
    assert (sys.stdout, sys.stderr) == before, "the standard streams are put back"


def test_prints_of_a_function_that_fails_are_kept(tmp_path, capfd):
    with pytest.raises(RuntimeError, match="ValueError: no"):
        written_by(loud, tmp_path)
    assert (tmp_path / "rewards.log").read_text().count("r: so far\n") == 3  # together, then each alone
    assert "so far" not in capfd.readouterr().out


def test_prints_of_a_file_that_is_imported_into_this_process_go_to_rewards_log(tmp_path, capfd):
    (tmp_path / "mine.py").write_text(
        "print('imported')\ndef reward(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    log = RewardLog()
    config = RewardConfig(function=f"{tmp_path / 'mine.py'}:reward", isolation="thread")
    close_rewards(load_rewards({"r": config}, log=log))
    log.open(tmp_path)
    log.close()
    assert "r: imported\n" in (tmp_path / "rewards.log").read_text()
    assert capfd.readouterr() == ("", "")


def test_other_threads_print_where_they_did(tmp_path, capfd):
    called, printed = threading.Event(), threading.Event()

    def waiting(completions):
        called.set()
        assert printed.wait(60)
        print("mine")
        return [1.0] * len(completions)

    def other():
        assert called.wait(60)
        print("the run's own")
        printed.set()

    thread = threading.Thread(target=other)
    thread.start()
    written = written_by(waiting, tmp_path)
    thread.join()
    assert written == "r: mine\n"
    assert capfd.readouterr().out == "the run's own\n"


@pytest.mark.parametrize("stream", [None, object()], ids=["none", "without-methods"])
def test_a_program_without_standard_output_keeps_the_prints(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    assert written_by(awaited, tmp_path) == "r: before\nr: after\n"
    assert sys.stdout is stream

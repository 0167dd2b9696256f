"""Rewards in separate processes: nothing that one does keeps a step from ending, or is left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from gvpo_core.training.config import RewardConfig
from gvpo_core.training.rewards import RewardError, close_rewards, load_rewards, score
from gvpo_core.training.rewards import scores as rewards_module

pytestmark = pytest.mark.core

PROMPTS = ["p"] * 6
TEXTS = ["good", "1", "2", "bad", "3", "4"]

HARM = {
    "sleep": ("timeout", "time.sleep(600)"),
    "regex": ("timeout", "re.match(r'(a+)+$', 'a' * 40 + 'b')"),
    "c loop": ("timeout", "pow(3, 10**9)"),
    "swallowed": ("timeout", "swallow()"),
    "exit": ("error", "os._exit(3)"),
    "sys.exit": ("error", "sys.exit(3)"),
    "segfault": ("error", "ctypes.string_at(0)"),
    "killed": ("error", "os.kill(os.getpid(), signal.SIGKILL)"),
    "forked children": ("timeout", "fork(); time.sleep(600)"),
    "forked, then gone": ("error", "fork(); os._exit(0)"),
    "allocation": ("error", "bytearray(10 * 2**30)"),
    "flood": ("timeout", "flood()"),
    "recursion": ("error", "(lambda f: f(f))(lambda f: f(f))"),
}
CODE = """
import ctypes, os, re, signal, sys, time

def swallow():
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass

def fork():
    for _ in range(3):
        if os.fork() == 0:
            time.sleep(600)
            os._exit(0)

def flood():
    while True:
        os.write(1, b"x" * 65536)
        os.write(2, b"y" * 65536)

def reward(prompts, completions, **_):
    for text in completions:
        if text == "bad":
            HARM
    return [float(len(text)) for text in completions]
"""


MARK = f"GVPO_TEST_OF_REWARDS={os.getpid()}"


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    monkeypatch.setenv(*MARK.split("="))
    started = []

    def start(harm: str, **settings):
        file = tmp_path / "reward.py"
        file.write_text(CODE.replace("HARM", harm))
        loaded = load_rewards({"r": RewardConfig(f"{file}:reward", **({"timeout": 1.0, "memory": 2.0} | settings))})
        started.extend(loaded)
        return loaded

    yield start
    close_rewards(started)


def children() -> set[int]:
    """Processes that this one started, and theirs, living or zombie: told from others by a mark in the environment."""
    listing = subprocess.run(["ps", "axeww", "-o", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()[1:]]
    return {int(pid) for pid, parent, command in rows if MARK in command or parent == str(os.getpid())} - {
        int(pid) for pid, _, command in rows if command.startswith("ps ")
    }


@pytest.mark.parametrize("name", HARM)
def test_harm_costs_its_response_alone_within_one_budget(name, rewards):
    kind, harm = HARM[name]
    before = children()
    loaded = rewards(harm)
    handler = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    got = score(loaded, PROMPTS, TEXTS, {})
    assert time.monotonic() - start < 300  # the call itself takes 600 s
    np.testing.assert_array_equal(got.total, [4, 1, 1, np.nan, 1, 1])
    assert got.errors["r"][kind] == 1, got.errors
    again = score(loaded, PROMPTS, ["fine"] * 6, {})  # the pool is whole again
    np.testing.assert_array_equal(again.total, [4] * 6)
    assert signal.getsignal(signal.SIGALRM) is handler
    close_rewards(loaded)
    assert children() <= before


@pytest.mark.slow
def test_the_same_from_a_thread_and_from_asyncio(rewards):
    loaded = rewards("time.sleep(600)")
    results = [score(loaded, PROMPTS, TEXTS, {}).total]
    thread = threading.Thread(target=lambda: results.append(score(loaded, PROMPTS, TEXTS, {}).total))
    thread.start()
    thread.join()

    async def inside() -> None:
        results.append(score(loaded, PROMPTS, TEXTS, {}).total)
        results.append(await asyncio.to_thread(lambda: score(loaded, PROMPTS, TEXTS, {}).total))

    asyncio.run(inside())
    for result in results:
        np.testing.assert_array_equal(result, [4, 1, 1, np.nan, 1, 1])


@pytest.mark.slow
def test_many_timeouts_leave_nothing_behind(rewards):
    """50 x (a call for all five, then five alone): 300 processes killed and replaced."""
    before = children()
    loaded = rewards("time.sleep(600)", timeout=0.02, workers=4, max_failures=1.0, failure_value=-1.0)
    for _ in range(50):
        got = score(loaded, ["p"] * 5, ["bad"] * 5, {})
        np.testing.assert_array_equal(got.total, [-1] * 5)
    close_rewards(loaded)
    assert children() <= before
    assert len(os.listdir("/proc/self/fd")) < 100


SLOW = """
import os, time
open(os.path.join(os.path.dirname(__file__), f"start-{os.getpid()}"), "x").close()
time.sleep(IMPORT)

def reward(prompts, completions, **_):
    if "bad" in completions:
        time.sleep(600)
    return [1.0 for _ in completions]
"""


@pytest.fixture
def slow(tmp_path):
    """A reward that takes its time to import; every start leaves a file."""
    started = []

    def start(seconds: float, **settings):
        file = tmp_path / "slow.py"
        file.write_text(SLOW.replace("IMPORT", str(seconds)))
        started.extend(load_rewards({"r": RewardConfig(f"{file}:reward", max_failures=1.0, **settings)}))
        return started

    yield start
    close_rewards(started)


@pytest.mark.slow
def test_restarting_processes_lengthen_a_step_by_a_bound(slow, tmp_path, monkeypatch):
    """32 hung responses would start 32 processes of 1.5 s, two at a time: 24 s and more beside the two limits."""
    monkeypatch.setattr(rewards_module, "_STARTS", 0.0)
    loaded = slow(1.5, timeout=0.5, failure_value=-1.0)
    got = score(loaded, ["p"] * 32, ["bad"] * 32, {})
    assert got.errors["r"] == {"error": 0, "timeout": 32, "none": 0}
    assert len(list(tmp_path.glob("start-*"))) < 16  # what came too late was not tried
    again = score(loaded, ["p"] * 4, ["good"] * 4, {})  # the processes that were starting are of use
    np.testing.assert_array_equal(again.total, [1] * 4)


def test_a_process_restarts_in_parallel_with_the_others(slow, tmp_path):
    """After a call past its limit the next process is there without being asked for."""
    loaded = slow(0.1, timeout=0.5, workers=1, failure_value=-1.0)
    score(loaded, ["p"], ["bad"], {})
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("start-*"))) < 2:
        assert time.monotonic() < deadline, "no process started"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_slow_start_costs_no_good_response(slow):
    """One hung response among eight; a start takes four limits."""
    loaded = slow(2.0, timeout=0.5, workers=2, failure_value=-1.0)
    got = score(loaded, ["p"] * 8, ["bad"] + ["good"] * 7, {})
    np.testing.assert_array_equal(got.total, [-1] + [1] * 7)


def test_a_worker_that_does_not_read_holds_up_no_step(tmp_path):
    """A thread of the reward keeps the interpreter, so that a request beyond the pipe's room is never read."""
    file = tmp_path / "reward.py"
    file.write_text(
        "import re, threading, time\n"
        "def reward(prompts, completions, **_):\n"
        "    if completions[0] == 'bad':\n"
        "        threading.Thread(target=lambda: (time.sleep(0.2), re.match(r'(a+)+$', 'a' * 60 + 'b'))).start()\n"
        "    return [1.0 for _ in completions]\n"
    )
    loaded = load_rewards({"r": RewardConfig(f"{file}:reward", timeout=1.0, workers=1, failure_value=-1.0)})
    assert score(loaded, ["p"], ["bad"], {}).total == [1]
    time.sleep(1.0)  # the thread has it by now
    got = []
    large = ["x" * 2**20] * 2
    thread = threading.Thread(target=lambda: got.append(score(loaded, ["p"] * 2, large, {})), daemon=True)
    thread.start()
    thread.join(60)
    assert got, "the step hangs"
    np.testing.assert_array_equal(got[0].total, [1, 1])  # by the process that took its place
    close_rewards(loaded)


def test_a_worker_does_not_outlive_a_killed_run(tmp_path):
    """The watchdog in C ends a worker that holds its interpreter when nobody is left to kill it."""
    file, at = tmp_path / "reward.py", tmp_path / "worker"
    file.write_text(CODE.replace("HARM", f"open({str(at)!r}, 'w').write(str(os.getpid())); pow(3, 10**9)"))
    script = (
        "import os, signal, threading, time\n"
        "from pathlib import Path\n"
        "from gvpo_core.training.config import RewardConfig\n"
        "from gvpo_core.training.rewards import load_rewards, score\n"
        f"loaded = load_rewards({{'r': RewardConfig({str(file) + ':reward'!r}, timeout=3.0)}})\n"
        "threading.Thread(target=lambda: score(loaded, ['p'], ['bad'], {}), daemon=True).start()\n"
        f"at = Path({str(at)!r})\n"
        "while not (at.exists() and at.read_text()):\n"
        "    time.sleep(0.01)\n"
        "os.kill(int(at.read_text()), 0)\n"  # an error if it is not alive
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == -signal.SIGKILL
    deadline = time.monotonic() + 120
    command = ["ps", "-o", "stat=", "-p", at.read_text()]
    while (state := subprocess.run(command, capture_output=True, text=True).stdout.strip()) and state[0] != "Z":
        assert time.monotonic() < deadline, f"the worker still stands in state {state}"
        time.sleep(0.1)


def test_what_a_column_cannot_be_is_named(rewards):
    loaded = rewards("pass")
    with pytest.raises(RewardError, match=r"column 'when' .*JSON.*isolation = 'thread'"):
        score(loaded, ["p"], ["a"], {"when": [time.gmtime, 3]})


def test_options_columns_and_chats_arrive_as_in_a_thread(tmp_path):
    file = tmp_path / "reward.py"
    file.write_text(
        "def f(prompts, completions, answer, scale='1'):\n"
        "    return [float(scale) * (c[0]['content'] == a) + (p[0]['role'] == 'user')\n"
        "            for p, c, a in zip(prompts, completions, answer)]\n"
    )
    chat = [{"role": "user", "content": "é"}]
    for isolation in ("process", "thread"):
        config = {"r": RewardConfig(f"{file}:f", isolation=isolation, options={"scale": "3"})}
        loaded = load_rewards(config)
        got = score(loaded, [chat, chat], ["ü", "y"], {"answer": ["ü", "x"], "unused": [1, 2]})
        assert got.total.tolist() == [4.0, 1.0]
        close_rewards(loaded)


@pytest.mark.slow
def test_math_verify_that_does_not_end_costs_its_response_alone():
    """A power tower that its parser evaluates: past the limit the process is killed, and the others are scored."""
    pytest.importorskip("math_verify", reason="the rewards extra is not installed")
    before = children()
    loaded = load_rewards({"m": RewardConfig("math_verify", timeout=4.0)})
    handler = signal.getsignal(signal.SIGALRM)
    texts = ["$\\frac{1}{2}$", "$" + "9^{" * 4 + "9" + "}" * 4 + "$", "it is $3$"]
    got = score(loaded, ["p"] * 3, texts, {"answer": ["0.5", "$" + "8^{" * 4 + "8" + "}" * 4 + "$", "3"]})
    assert got.total[0] == 1 and got.total[2] == 1, got
    assert sum(got.errors["m"].values()) <= 1 and got.total[1] != 1, got
    assert signal.getsignal(signal.SIGALRM) is handler
    close_rewards(loaded)
    assert children() <= before

"""What a reward's process offers to the code in it, and what it tells of it."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gvpo_core.training.config import ConfigError, RewardConfig
from gvpo_core.training.rewards import RewardLog, check_columns, close_rewards, load_rewards, score
from gvpo_core.training.rewards.clock import Clock
from gvpo_core.training.rewards.total import total_rewards
from gvpo_core.training.rewards.worker import guard

pytestmark = pytest.mark.core


@pytest.fixture
def load(tmp_path):
    started = []

    def start(body: str, name: str = "mine.py", *, log=None, **settings):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(body)
        settings = {"timeout": 10.0, "workers": 1, "max_failures": 1.0, **settings}
        loaded = load_rewards({"r": RewardConfig(f"{file}:r", **settings)}, log=log)
        started.extend(loaded)
        return loaded

    yield start
    close_rewards(started)


SHARED = """
import asyncio
limit, loops = asyncio.Semaphore(1), set()
async def r(completions):
    async def one():
        async with limit:
            await asyncio.sleep(0.001)
            loops.add(asyncio.get_running_loop())
    await asyncio.gather(*(one() for _ in completions))
    return [float(len(loops))] * len(completions)
"""


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_all_calls_share_one_event_loop(isolation, load):
    """A client or a lock kept between calls belongs to one loop."""
    loaded = load(SHARED, isolation=isolation)
    for _ in range(3):
        np.testing.assert_array_equal(score(loaded, ["p"] * 3, ["a", "b", "c"], {}).total, [1.0] * 3)


def test_python_functions_share_the_loop_and_survive_a_blocking_one():
    lock = asyncio.Lock()

    async def judge(completions):
        async with lock:
            await asyncio.sleep(0)
        return [1.0] * len(completions)

    async def blocks(completions):
        time.sleep(3.0)
        return [1.0] * len(completions)

    config = {n: RewardConfig("given", timeout=0.5, failure_value=0.0, max_failures=1.0) for n in ("a", "b", "bad")}
    loaded = load_rewards(config, {"a": judge, "b": judge, "bad": blocks})
    try:
        np.testing.assert_array_equal(score(loaded[:2], ["p"] * 2, ["x", "y"], {}).total, [2.0, 2.0])
        assert score(loaded[2:], ["p"], ["x"], {}).errors["bad"]["timeout"] == 1
        fresh = load_rewards({"c": config["a"]}, {"c": lambda completions: blocksless(completions)})
        np.testing.assert_array_equal(score(fresh, ["p"], ["x"], {}).total, [3.0])
    finally:
        close_rewards(loaded)


async def blocksless(completions):
    return [3.0] * len(completions)


def test_a_forked_child_that_returns_answers_nothing(load):
    """Two answers to one request would give later steps another step's scores."""
    loaded = load("import os\ndef r(completions):\n    os.fork()\n    return [float(c) for c in completions]\n")
    for step in range(4):
        texts = [str(10 * step + i) for i in range(3)]
        assert score(loaded, ["p"] * 3, texts, {}).total.tolist() == [float(t) for t in texts]


def test_an_answer_too_many_is_reported_by_its_number(load):
    write = (
        "import os, sys\n"
        "def r(completions):\n"
        "    from gvpo_reward_worker.messages import write_message\n"
        "    if completions[0] == 'twice':\n"
        "        write_message(int(sys.argv[2]), {'id': 1, 'values': [7.0]})\n"
        "    if completions[0] == 'nonsense':\n"
        "        os.write(int(sys.argv[2]), b'x' * 64)\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    loaded = load(write)
    assert score(loaded, ["p"], ["twice"], {}).total.tolist() == [7.0]  # the first with its number
    assert score(loaded, ["p"], ["four"], {}).total.tolist() == [4.0]  # not the one left over
    got = score(loaded, ["p", "q"], ["nonsense", "ab"], {})
    assert got.errors["r"]["error"] == 1 and got.total[1] == 2.0


def test_a_huge_result_does_not_make_a_huge_answer(load):
    with pytest.raises(RuntimeError, match="returned 3000000 values for 2 completions; expected one each"):
        score(load("def r(completions): return [1.0] * 3_000_000\n"), ["p"] * 2, ["a", "b"], {})


def test_the_last_words_of_a_process_that_died_are_in_the_error(load):
    body = "import os, sys\ndef r(completions):\n    sys.stderr.write('CUDA: no memöry\\n'); os._exit(3)\n"
    with pytest.raises(RuntimeError, match="exited with status 3; its last output: CUDA: no memöry"):
        score(load(body), ["p"], ["a"], {})
    with pytest.raises(RuntimeError, match="was killed by SIGSEGV; its last output: "):
        score(load("import ctypes\ndef r(completions): ctypes.string_at(0)\n"), ["p"], ["a"], {})


def test_print_goes_to_rewards_log_and_tracebacks_to_run_log(load, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JUDGE_TOKEN", "canary-4711")
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    log = RewardLog({})
    body = (
        "import os\nprint('importing')\n"
        "def r(completions):\n    print('seen ünï', os.environ['JUDGE_TOKEN'], flush=True)\n"
        "    return [1 / (c != 'bad') for c in completions]\n"
    )
    loaded = load(body, log=log)
    (tmp_path / "run").mkdir()
    log.open(tmp_path / "run")
    score(loaded, ["p"] * 3, ["a", "bad", "b"], {})
    close_rewards(loaded)
    log.close()
    written = (tmp_path / "run" / "rewards.log").read_text(encoding="utf-8")
    assert written.startswith("r: importing\n") and written.count("r: seen ünï ***\n") == 4
    errors = (tmp_path / "run" / "run.log").read_text(encoding="utf-8")
    assert errors.count("ZeroDivisionError: division by zero") == 1 and "mine.py" in errors
    assert "canary" not in written + errors
    assert capfd.readouterr().out == ""


def test_one_warning_a_step_shows_question_and_response(load, caplog):
    loaded = load("def r(completions): return [1 / int(c) for c in completions]\n")
    score(loaded, ["q0", "q1", "q2", "q3"], ["0", "1", "0", "0"], {})
    (record,) = [r for r in caplog.records if r.name == "gvpo.rewards"]
    text = record.getMessage()
    assert "3 of 4 responses failed (3 error)" in text and "'0' to 'q0'" in text and "ZeroDivisionError" in text


MODULE = """
from __future__ import annotations
import dataclasses, os
from concurrent.futures import ProcessPoolExecutor
from helpers_here import double

@dataclasses.dataclass
class Point:
    x: "int" = 1
    y: dataclasses.InitVar[int] = 2

def work(text): return Point(double(len(text))).x

def r(completions):
    import beside
    with ProcessPoolExecutor(2) as pool:
        return [float(v + beside.ONE) for v in pool.map(work, completions)]
"""


@pytest.mark.parametrize("isolation", ["process", "thread"])
@pytest.mark.parametrize("name", ["rewards_here.py", "random.py"])
def test_a_module_imports_its_neighbours_by_name(name, isolation, load, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in ("helpers_here", "beside", "rewards_here"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "helpers_here.py").write_text(
        "import random\ndef double(n): return 2 * n + random.randint(0, 0)\n"
    )
    (tmp_path / "sub" / "beside.py").write_text("ONE = 1\n")
    loaded = load(MODULE, f"sub/{name}", isolation=isolation)
    assert score(loaded, ["p", "q"], ["a", "bb"], {}).total.tolist() == [3.0, 5.0]
    for module in ("helpers_here", "beside"):
        sys.modules.pop(module, None)


def test_the_memory_limit_stays_within_a_hard_limit(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import resource\ndef r(completions): return [resource.getrlimit(resource.RLIMIT_AS)[0] / 2**20]\n")
    script = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))\n"
        "from gvpo_core.training.config import RewardConfig\n"
        "from gvpo_core.training.rewards import close_rewards, load_rewards, score\n"
        f"loaded = load_rewards({{'r': RewardConfig('{file}:r', memory=8.0)}})\n"
        "print(score(loaded, ['p'], ['a'], {}).total.tolist())\n"
        "close_rewards(loaded)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[3072.0]\n", done.stderr


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="processes in sessions of their own are found through /proc")
def test_a_process_within_exec_is_waited_for(monkeypatch):
    """While a process replaces its program it has no environment, so no mark: the guard left it behind."""
    worker, child = (subprocess.Popen(["sleep", "600"], start_new_session=True) for _ in range(2))
    scans = [([], True), ([], True), ([child.pid], False), ([], False)]
    monkeypatch.setenv(guard.MARK, "this-test")
    monkeypatch.setattr(guard, "_marked", lambda mark: scans.pop(0))
    try:
        guard._end_all(worker.pid)
        assert child.wait(10) == worker.wait(10) == -signal.SIGKILL
        assert not scans
    finally:
        child.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="processes in sessions of their own are found through /proc")
def test_only_a_program_without_an_environment_may_be_within_exec():
    bare = subprocess.Popen(["sleep", "600"], env={})
    try:
        deadline = time.monotonic() + 10
        while Path(f"/proc/{bare.pid}/comm").read_text() != "sleep\n":
            assert time.monotonic() < deadline
        assert guard._marked(b"GVPO_REWARD_WORKER=none") == ([], True)
        assert guard._runs_a_program(str(bare.pid))
        bare.kill()
        while alive(bare.pid):
            assert time.monotonic() < deadline
        assert not guard._runs_a_program(str(bare.pid))  # a zombie
    finally:
        bare.kill()
        bare.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="processes in sessions of their own are found through /proc")
@pytest.mark.parametrize("end", ["time.sleep(600)", "os._exit(1)", "os.kill(os.getpid(), 9)", "close", "run killed"])
def test_what_a_worker_started_dies_with_it_in_its_own_session_too(end, load, tmp_path):
    at = tmp_path / "pid"
    after = end if "(" in end else "pass" if end == "close" else "time.sleep(600)"
    body = (
        "import os, subprocess, time\n"
        "def r(completions):\n"
        f"    p = subprocess.Popen(['sh', '-c', 'sleep 600 & echo $! > {at}.new; mv {at}.new {at}; wait'],"
        " start_new_session=True)\n"
        f"    while not os.path.exists({str(at)!r}): time.sleep(0.01)\n"
        f"    {after}\n"
        "    return [1.0 for _ in completions]\n"
    )
    if end == "run killed":
        (tmp_path / "mine.py").write_text(body)
        script = (
            "import os, threading, time\n"
            "from gvpo_core.training.config import RewardConfig\n"
            "from gvpo_core.training.rewards import load_rewards, score\n"
            f"loaded = load_rewards({{'r': RewardConfig({str(tmp_path / 'mine.py') + ':r'!r})}})\n"
            "threading.Thread(target=lambda: score(loaded, ['p'], ['x'], {}), daemon=True).start()\n"
            f"while not os.path.exists({str(at)!r}): time.sleep(0.01)\n"
            "os.kill(os.getpid(), 9)\n"
        )
        assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == -signal.SIGKILL
    else:
        loaded = load(body, timeout=1.0, failure_value=0.0)
        score(loaded, ["p"], ["x"], {})
        assert at.exists()
        close_rewards(loaded)
    deadline = time.monotonic() + 10
    while alive(int(at.read_text())):
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.02)


def test_a_worker_that_died_of_a_signal_has_one_more_try(load, tmp_path):
    mark = tmp_path / "once"
    body = (
        "import os\ndef r(completions):\n"
        f"    if not os.path.exists({str(mark)!r}):\n        open({str(mark)!r}, 'x').close()\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return [float(len(completions))] * len(completions)\n"
    )
    got = score(load(body), ["p"] * 3, ["a", "b", "c"], {})
    assert mark.exists()
    assert got.total.tolist() == [3.0] * 3 and got.errors["r"]["error"] == 0  # all in one call again


def test_the_clock_of_deadlines_stops_in_a_pause(monkeypatch):
    seconds = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    clock = Clock()
    begin = clock()
    for step in (0.05, 0.05, 3600.0, 0.05):
        seconds[0] += step
        clock()
    assert clock() - begin == pytest.approx(0.15)


@pytest.mark.slow
def test_a_pause_of_the_whole_machine_costs_no_score(tmp_path):
    """Run and worker are stopped for longer than the limit, then go on."""
    file, ready = tmp_path / "mine.py", tmp_path / "ready"
    file.write_text(
        f"import os, time\ndef r(completions):\n    open({str(ready)!r}, 'w').write(str(os.getpid()))\n"
        "    time.sleep(0.8)\n    return [1.0]\n"
    )
    script = (
        "from gvpo_core.training.config import RewardConfig\n"
        "from gvpo_core.training.rewards import close_rewards, load_rewards, score\n"
        f"loaded = load_rewards({{'r': RewardConfig('{file}:r', timeout=1.5, failure_value=-1.0, max_failures=1.0)}})\n"
        "print(score(loaded, ['p'], ['a'], {}).total.tolist())\n"
        "close_rewards(loaded)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    while not (ready.exists() and ready.read_text()):
        time.sleep(0.01)
    pids = run.pid, int(ready.read_text())
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2.5)
    for pid in reversed(pids):
        os.kill(pid, signal.SIGCONT)
    assert run.communicate(timeout=60)[0] == "[1.0]\n"


WRONG = {
    "a column that is not there": ("(completions, anser)", {}, "argument 'anser', and the data has no column .*answer"),
    "no responses": ("(prompts, answer)", {}, "no responses; expected reward"),
    "TRL's old names": ("(prompt, completion)", {}, "no responses; expected reward"),
    "an option that nobody takes": ("(completions)", {"target": 50}, r"options.target: .* takes no argument target"),
    "an option of gvpo's": ("(completions, **k)", {"prompts": 1}, r"options.prompts: gvpo passes prompts itself"),
}


@pytest.mark.parametrize("isolation", ["process", "thread"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_found_before_any_call(name, isolation, load):
    arguments, options, message = WRONG[name]
    with pytest.raises(ConfigError, match=f"rewards.r.*{message}"):
        loaded = load(f"def r{arguments}: return [1.0]\n", options=options, isolation=isolation)
        check_columns(loaded, ["answer", "task"], "data.train")


@pytest.mark.parametrize(
    "arguments",
    ["completions", "completions, answer", "completions, /, **k", "completions, *args, answer", "*, completions", "**k",
     "prompts, completions, completion_ids, answer, trainer_state=None", "completions, missing=3", "completion_ids"],
)  # fmt: skip
def test_arguments_are_chosen_by_signature(arguments, load):
    loaded = load(f"def r({arguments}): return [2.0, 3.0]\n")
    columns = {"answer": ["x", "y"], "self": [1, 2], "prompts": [1, 2], "a b": [1, 2], "completion_ids": [[1], [1]]}
    check_columns(loaded, columns, "data.train")
    assert score(loaded, ["p", "q"], ["a", "b"], columns).total.tolist() == [2.0, 3.0]


NAN = float("nan")


@pytest.mark.parametrize(
    ("parts", "failed", "total"),
    [
        ([[1, 2, NAN, NAN], [NAN, NAN, 3, 4]], [], [2, 4, -3, -4]),  # two tasks
        ([[1, 2, 5, 6], [NAN, 1, 3, 4]], [], [NAN, 3, 7, 8]),  # a gap in a function that scored the group
        ([[NAN] * 4, [NAN, NAN, 3, 4]], [], [NAN, NAN, -3, -4]),  # nobody scored the first group
        ([[1, 2, NAN, NAN], [1, 1, 3, 4]], [(0, 2)], [1, 3, NAN, NAN]),  # failed is not another task
    ],
)
def test_a_function_that_scored_nothing_of_a_group_is_not_part_of_its_total(parts, failed, total):
    mask = np.zeros((2, 4), bool)
    for place in failed:
        mask[place] = True
    np.testing.assert_array_equal(
        total_rewards(np.array(parts, float), mask, [2.0, -1.0], np.array([7, 7, 3, 3])), total
    )


def test_two_tasks_in_one_step_have_no_failures():
    one = lambda completions, task: [
        float(len(c)) if t == "a" else None for c, t in zip(completions, task, strict=True)
    ]
    two = lambda completions, task: [9.0 if t == "b" else None for t in task]
    loaded = load_rewards({"x": RewardConfig("x"), "y": RewardConfig("y")}, {"x": one, "y": two})
    got = score(loaded, ["p", "p", "q", "q"], ["a", "bb", "a", "bb"], {"task": ["a", "a", "b", "b"]})
    assert got.total.tolist() == [1.0, 2.0, 9.0, 9.0]
    assert got.errors == {n: {"error": 0, "timeout": 0, "none": 0} for n in "xy"}

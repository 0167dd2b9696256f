"""`gvpo` as a person meets it: what works, and what each bad input is answered with."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import types

import pytest
import table_run

from gvpo_core.training import cli
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.terminal.output import Forgiving

pytestmark = pytest.mark.core

pytest.importorskip("tyro", reason="the command line's extra is not installed")

GOOD_REWARD = """
def reward(prompts, completions, answer, **_):
    scores = [float(c == a) for c, a in zip(completions, answer)]
"""


def gvpo(capfd, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(a) for a in arguments])
    return status, *capfd.readouterr()


def with_reward(tmp_path, body: str, steps: int = 2, timeout: float = 5.0):
    """A run whose reward is GOOD_REWARD, then `body`, then `return scores`."""
    code = (
        "import time, math\n"
        + GOOD_REWARD
        + "".join(f"    {line}\n" for line in body.splitlines())
        + "    return scores\n"
    )
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "mine.py").write_text(code)
    reward = f'function = "{tmp_path / "mine.py"}:reward"\ntimeout = {timeout}\nmax_failures = 1.0'
    return table_run.make(tmp_path, steps=steps, reward=reward)


def records(tmp_path, kind="train"):
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return [r for line in lines if (r := json.loads(line))["kind"] == kind]


def test_a_whole_run_then_eval_export_report(tmp_path, capfd):
    config = table_run.make(tmp_path, steps=6)
    status, out, _ = gvpo(capfd, "train", config)
    assert status == 0
    assert str(tmp_path / "run") in out
    assert "\x1b" not in out
    assert (tmp_path / "run" / "report.html").exists()
    status, out, _ = gvpo(capfd, "eval", tmp_path / "run", "--json")
    assert status == 0
    assert json.loads(out)["eval/reward"] == records(tmp_path, "eval")[-1]["eval/reward"]
    status, out, _ = gvpo(capfd, "eval", tmp_path / "run", "--checkpoint", "initial", "--prompts", "2", "--json")
    assert json.loads(out)["eval/prompts"] == 2
    status, out, _ = gvpo(capfd, "export", tmp_path / "run", tmp_path / "out")
    assert (status, json.loads((tmp_path / "out" / "table.json").read_text()).keys()) == (0, {"p0", "p1", "p2"})
    assert gvpo(capfd, "report", tmp_path / "run")[0] == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), SystemExit()])
def test_an_export_that_is_cut_short_leaves_nothing_behind(error, tmp_path, capfd, monkeypatch):
    """Half of a model stayed, and the same command refused the folder as not empty."""

    def cut_short(policy, folder):
        (folder / "part").mkdir()
        (folder / "part" / "model.safetensors").write_bytes(b"half")
        if isinstance(error, SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        raise error

    config = table_run.make(tmp_path, steps=1)
    with monkeypatch.context() as patched:
        patched.setattr(TablePolicy, "export", cut_short)
        try:
            status, _, _ = gvpo(capfd, "export", config, tmp_path / "out")
        except SystemExit as ended:
            status = ended.code
    assert status == {KeyboardInterrupt: 130, OSError: 1, SystemExit: 143}[type(error)]
    assert not list((tmp_path / "out").iterdir())
    assert gvpo(capfd, "export", config, tmp_path / "out")[0] == 0


def test_a_finished_run_is_not_run_again(tmp_path, capfd):
    config = table_run.make(tmp_path, steps=4)
    gvpo(capfd, "train", config)
    before = (tmp_path / "run" / "completions.jsonl").read_bytes()
    status, _, _ = gvpo(capfd, "train", config)
    assert status == 0
    assert (tmp_path / "run" / "completions.jsonl").read_bytes() == before


def test_usage_and_unknown_commands(capfd):
    assert gvpo(capfd, "--help")[0] == 0
    assert gvpo(capfd)[0] == 2
    status, _, err = gvpo(capfd, "trane")
    assert status == 2
    assert "there is no command 'trane'" in err
    assert gvpo(capfd, "--version")[1].startswith("gvpo ")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("scores = scores[:-1]", "reward right returned 11 values for 12 completions"),
        ("scores[3] = 'good'", "reward right returned 'good' (str) for completion 3; expected a number or None"),
        (
            "raise KeyError('x')",
            "reward right gave no score to any of 3 responses; the first (error), to the prompt 'p0'",
        ),
        (
            "return [None] * len(scores)",
            "gave no score to any of 3 responses; the first (none), to the prompt 'p0': None or NaN; what the reward"
            " printed is in rewards.log",
        ),
        ("return None", "reward right returned 'None'; expected a list of 3 numbers"),
    ],
)
def test_rewards_that_stop_a_run(body, message, tmp_path, capfd):
    guard = "if len(scores) == 12:\n    " if "scores[" in body else ""
    status, _, err = gvpo(capfd, "train", with_reward(tmp_path, guard + body))
    assert status == 1
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("if 'b' in completions: raise ValueError('no b')", "error"),
        pytest.param("if 'b' in completions: time.sleep(30)", "timeout", marks=pytest.mark.slow),
        ("scores = [math.nan if c == 'b' else s for c, s in zip(completions, scores)]", "none"),
    ],
)
def test_rewards_that_cost_a_response_and_not_the_run(body, kind, tmp_path, capfd, caplog):
    timeout = 4.0 if kind == "timeout" else 30.0  # a short limit is passed on a busy machine by a good reward, too
    status, _, _ = gvpo(capfd, "train", with_reward(tmp_path, body, timeout=timeout))
    assert status == 0
    assert sum(r[f"reward_errors/right/{kind}"] for r in records(tmp_path)) > 0
    assert sum(r["responses/unscored"] for r in records(tmp_path)) > 0
    assert all(value is not None for r in records(tmp_path) for key, value in r.items())
    assert "not_finite" not in {a["key"] for r in records(tmp_path) for a in r["alerts"]}
    assert "reward right" in caplog.text
    completions = [json.loads(x) for x in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert all((c["reward"] is None) == (c["response"] == "b") for c in completions)


def test_failures_under_a_failure_value_are_reported_as_counted(tmp_path, capfd, caplog):
    config = with_reward(tmp_path, "if 'b' in completions: raise ValueError('no b')")
    change(config, "max_failures = 1.0", "max_failures = 1.0\nfailure_value = 0.0")
    assert gvpo(capfd, "train", config)[0] == 0
    assert sum(r["reward_errors/right/error"] for r in records(tmp_path)) > 0
    assert sum(r["responses/unscored"] for r in records(tmp_path)) == 0
    assert "errors and timeouts count as 0, its failure_value" in caplog.text
    assert "without a score" not in caplog.text
    report = (tmp_path / "run" / "report.html").read_text()
    assert "count as the failure_value: 0 (right)" in report and "do not count as zero" not in report


def test_a_group_with_one_response_left_is_counted_out(tmp_path, capfd):
    body = "for i, p in enumerate(prompts):\n    if p == 'p1' and i != prompts.index('p1'): scores[i] = None"
    status, _, _ = gvpo(capfd, "train", with_reward(tmp_path, body, steps=4))
    assert status == 0
    dropped = [r["groups/dropped_unscored"] for r in records(tmp_path)]
    assert sum(dropped) >= 2
    assert all(r["groups/counted"] + d == 2 for r, d in zip(records(tmp_path), dropped, strict=True))


def test_no_group_with_two_scored_responses(tmp_path, capfd):
    body = "scores = [s if prompts.index(p) == i else None for i, (p, s) in enumerate(zip(prompts, scores))]"
    status, _, err = gvpo(capfd, "train", with_reward(tmp_path, body))
    assert status == 1
    assert "no group has 2 scored responses: 2 of the 12 responses in 2 groups were scored" in err


def test_groups_without_signal_are_reported_once_with_advice(tmp_path, capfd):
    config = with_reward(tmp_path, "scores = [0.5] * len(scores)", steps=6)
    status, out, _ = gvpo(capfd, "train", config)
    assert status == 0
    assert out.count("dead groups") == 1
    assert "all rewards so far are equal" in " ".join(out.split())
    assert all(r["groups/all_equal"] == 2 for r in records(tmp_path))


def change(config, old, new):
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("beta = 0.5", "betta = 0.5", "config.toml:21: unknown field objective.betta; did you mean objective.beta?"),
        ('backend = "table"', 'backend = "tabel"', "did you mean 'table'?"),
        ("responses = 6", "responses = 1", "rollout.responses = 1; expected at least 2 for gvpo"),
        ('"exact_match"', '"exact_mach"', "expected one of exact_match, regex_match, math_verify"),
        ("train.jsonl", "none.jsonl", "there is no such file or folder"),
        ("[data]", '[data]\nprompt = "question"', "has no column 'question'; it has prompt, answer"),
        ("[data]", "[data]\nmax_prompt_tokens = 0", "data.max_prompt_tokens = 0; expected at least 1"),
    ],
)
def test_bad_settings(old, new, message, tmp_path, capfd):
    config = table_run.make(tmp_path)
    change(config, old, new)
    status, _, err = gvpo(capfd, "train", config)
    assert status == 2
    assert message in err
    assert not (tmp_path / "run").exists()


def test_an_empty_dataset(tmp_path, capfd):
    config = table_run.make(tmp_path)
    (tmp_path / "train.jsonl").write_text("\n")
    status, _, err = gvpo(capfd, "train", config)
    assert status == 2
    assert "has no rows; expected at least one prompt" in err


def test_a_folder_that_is_not_a_run(tmp_path, capfd):
    for command in ("eval", "report"):
        status, _, err = gvpo(capfd, command, tmp_path)
        assert status == 2
        assert "is not a run folder" in err
    config = table_run.make(tmp_path, steps=2)
    gvpo(capfd, "train", config)
    status, _, err = gvpo(capfd, "eval", tmp_path / "run", "--checkpoint", "7")
    assert status == 2
    assert "has no checkpoint '7'; saved steps: 2" in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    status, _, err = gvpo(capfd, "export", tmp_path / "run", tmp_path / "full")
    assert status == 2
    assert "is not empty" in err


def test_a_run_folder_that_cannot_be_written(tmp_path, capfd):
    config = table_run.make(tmp_path)
    (tmp_path / "run").write_text("a file stands here")
    status, _, err = gvpo(capfd, "train", config)
    assert status == 1
    assert "is not a folder; give another" in err


def run_into(stdout, *arguments) -> tuple[int, str]:
    """The status and standard error of `gvpo`, in a separate process, with its standard output there."""
    command = [sys.executable, "-m", "gvpo_core.training.cli", *map(str, arguments)]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    return done.returncode, done.stderr


@pytest.fixture
def unread():
    """The end of a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.fixture
def full():
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as stream:
        yield stream


@pytest.mark.parametrize("name", ["unread", "full"])
def test_a_run_ends_well_when_nobody_can_read_it(name, tmp_path, request):
    status, said = run_into(request.getfixturevalue(name), "train", table_run.make(tmp_path, steps=2))
    assert (status, "rror" in said, len(records(tmp_path))) == (0, False, 2), said


@pytest.mark.parametrize(("name", "number"), [("unread", 2), ("unread", 15), ("full", 15)])
def test_a_signal_saves_and_leaves_when_nobody_can_read_it(name, number, tmp_path, request):
    mark = tmp_path / "sent"  # once, in the first step: the second would end the run at once
    first = f"if len(completions) == 12 and not os.path.exists({str(mark)!r}):"
    body = f"import os\n{first}\n    open({str(mark)!r}, 'x').close()\n    os.kill(os.getppid(), {number})"
    config = with_reward(tmp_path, body, steps=50)
    status, said = run_into(request.getfixturevalue(name), "train", config)
    assert status == 128 + number, said
    assert "rror" not in said
    assert [r["step"] for r in records(tmp_path)] == [1]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_result_that_cannot_be_printed_is_an_error_in_a_line(tmp_path, capfd, full):
    gvpo(capfd, "train", table_run.make(tmp_path, steps=2))
    status, said = run_into(full, "report", tmp_path / "run")
    assert (status, said) == (1, "gvpo: cannot write to standard output: No space left on device\n")


class Fails:
    """A stream on which everything fails."""

    encoding = "utf-8"

    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(5, "a terminal that is gone"), ValueError("closed"), RuntimeError("reentrant")]
)
def test_a_stream_that_fails_costs_its_text_alone(error):
    stream = Forgiving(Fails(error))
    assert (stream.write("text"), stream.flush(), stream.encoding) == (4, None, "utf-8")


def test_a_second_signal_is_not_forgiven():
    with pytest.raises(KeyboardInterrupt):
        Forgiving(Fails(KeyboardInterrupt())).write("text")


def test_a_tracker_that_is_not_installed_is_named_before_the_model_loads(tmp_path, capfd, monkeypatch):
    from gvpo_core.training.policy import load as backend

    config = table_run.make(tmp_path)
    change(config, "steps = 12", 'steps = 12\ntrackers = ["wandb"]')
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(backend, "load_policy", lambda config: pytest.fail("the model was loaded"))
    status, _, err = gvpo(capfd, "train", config)
    assert (status, "Traceback" in err) == (2, False), err
    assert "tracker 'wandb' cannot be imported" in err and "pip install wandb" in err


def test_a_tracker_that_does_not_start_is_an_error_in_a_line(tmp_path, capfd, monkeypatch):
    config = table_run.make(tmp_path)
    change(config, "steps = 12", 'steps = 12\ntrackers = ["wandb"]')
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # it has no init
    status, _, err = gvpo(capfd, "train", config)
    assert (status, "Traceback" in err) == (1, False), err
    assert "gvpo: tracker 'wandb' did not start (AttributeError" in err


def test_places_that_cannot_be_written_to(tmp_path, capfd):
    gvpo(capfd, "train", table_run.make(tmp_path, steps=2))
    run, file = tmp_path / "run", tmp_path / "file"
    file.write_text("mine")
    for target in (file, file / "below"):
        status, _, err = gvpo(capfd, "export", run, target)
        assert (status, "Traceback" in err) == (2, False), err
        assert f"cannot export to {target}" in err
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    status, _, err = gvpo(capfd, "report", run)
    assert (status, "Traceback" in err) == (1, False), err
    assert f"gvpo: cannot write {run / 'report.html'}: " in err


def test_lines_that_are_no_records_do_not_stop_a_resume(tmp_path, capfd):
    config = table_run.make(tmp_path, steps=4)
    gvpo(capfd, "train", config, "--run.steps", "2", "--optimizer.schedule", "constant")
    for line in ('{"kind": "train"}', "[1]", '{"step": "2"}', "7", "null"):
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write(line + "\n")
    status, _, err = gvpo(capfd, "train", config, "--optimizer.schedule", "constant")
    assert status == 0, err
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_run_with_closed_standard_descriptors_ends_well(closed, tmp_path):
    """Else the pipes of a reward's process would take the numbers 0 to 2."""
    config = table_run.make(tmp_path, steps=2, reward='function = "exact_match"')
    command = shlex.join([sys.executable, "-m", "gvpo_core.training.cli", "train", str(config)])
    done = subprocess.run(["sh", "-c", f"{command} {closed}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2]
    assert all(r["responses/unscored"] == 0 for r in records if r["kind"] == "train")

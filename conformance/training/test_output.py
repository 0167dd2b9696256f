"""Runs without a usable standard output: none at all, replaced by few methods, closed, or its descriptor closed."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys

import pytest
import table_run

from gvpo_core.training import cli
from gvpo_core.training.watch.console import Console

pytestmark = pytest.mark.core


class Bare:
    """As a tracker's or a cluster's redirection: write and flush alone."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [lambda: None, Bare, closed, object], ids=["none", "bare", "closed", "object"])
def test_a_console_prints_to_any_standard_output(make, monkeypatch):
    stream = make()
    monkeypatch.setattr(sys, "stdout", stream)
    console = Console(2)
    console.header({"model": "Ünïcödé 你好"})
    console.event("said")
    console.close({})
    if isinstance(stream, Bare):
        assert "Ünïcödé 你好" in stream.text and "said" in stream.text


@pytest.mark.parametrize("closing", ["<&-", "<&- >&- 2>&-"])
def test_a_run_with_closed_standard_descriptors_scores_and_trains(closing, tmp_path):
    (tmp_path / "reward.py").write_text(
        "def right(completions, answer, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    config = table_run.make(tmp_path, steps=2, reward=f'function = "{tmp_path}/reward.py:right"\nworkers = 1')
    run = f'"{sys.executable}" -m gvpo_core.training.cli train "{config}" {closing}'
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().split("\n") if line]
    assert [r["reward/mean"] for r in records if r["kind"] == "train"] == [1.0, 1.0]


def ran(redirection, *arguments, **environment):
    """A command with its standard streams redirected by the shell: (exit status, stdout, stderr)."""
    command = shlex.join([sys.executable, "-m", "gvpo_core.training.cli", *map(str, arguments)])
    done = subprocess.run(
        ["bash", "-c", f"{command} {redirection}"], capture_output=True, timeout=120, env=os.environ | environment
    )
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


@pytest.mark.parametrize("redirection", ["2</dev/null", "2>/dev/full", "2>&-"])
@pytest.mark.parametrize("arguments", [("train", "nowhere.toml"), ("nothing",)])
def test_unwritable_stderr_keeps_the_exit_status_and_stdout_clean(redirection, arguments):
    """Before, the message could not be written, which was an error of another kind; without a stderr it was printed."""
    if "full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    assert ran(redirection, *arguments) == (2, "", "")


def test_a_collection_goes_on_where_its_progress_cannot_be_written(tmp_path):
    """It ended at its first step: a full disk behind a log file, say."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    config = table_run.make(tmp_path, steps=3)
    status, _, err = ran(">/dev/full", "collect", config, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 6
    assert status == 1 and err.endswith("cannot write to standard output: No space left on device\n")  # the result


@pytest.mark.parametrize("arguments", [("train", "--help"), ("--version",), ("--help",)])
def test_closed_output_drops_a_result_and_failed_writes_are_one_line(arguments):
    if arguments == ("train", "--help"):
        pytest.importorskip("tyro", reason="the command line's extra is not installed")
    assert ran(">&-", *arguments)[0] == 0
    status, _, err = ran("1</dev/null", *arguments)  # open for reading alone
    assert (status, err) == (1, "gvpo: cannot write to standard output: Bad file descriptor\n")


@pytest.mark.parametrize("arguments", [("train", "--help"), ("--help",), ("doctor",)])
def test_a_reader_that_has_seen_enough_is_no_error(arguments):
    """As in `gvpo --help | head -1`: the reader has ended when a command writes."""
    if arguments == ("train", "--help"):
        pytest.importorskip("tyro", reason="the command line's extra is not installed")
    status, _, err = ran("| true; exit ${PIPESTATUS[0]}", *arguments)
    assert (status, err) == (0, "")


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", r"n\xe4u"), ("latin-1", "n\ufffdu"), ("utf-8", "näu")])
def test_a_result_is_printed_in_any_encoding(encoding, shown, tmp_path):
    status, out, err = ran("", "init", tmp_path / "näu", PYTHONIOENCODING=encoding)
    assert status == 0 and "Traceback" not in err, err
    assert shown in out


@pytest.mark.parametrize("command", ["init", "doctor", "export", "eval", "report", "train", "collect", "train-reward"])
def test_an_argument_that_commands_a_terminal_is_printed_as_escapes(command, tmp_path, monkeypatch, capfd):
    pytest.importorskip("tyro", reason="the command line's extra is not installed")
    monkeypatch.chdir(tmp_path)
    odd = "a\x1b]52;c;aGk=\x07\u202e"
    with contextlib.suppress(SystemExit):
        cli.main([command, odd])
    with contextlib.suppress(SystemExit):
        cli.main([command, odd, odd, "--model", odd, "--" + odd])
    out, err = capfd.readouterr()
    assert r"a\x1b]52" in out + err
    assert not set("\x1b\x07\u202e") & set(out + err)

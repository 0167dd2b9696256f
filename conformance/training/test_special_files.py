"""A pipe, a socket, a device or a folder instead of a file is named in one line: nothing waits for it."""

import os
import shutil
import signal
import socket

import pytest
import table_run

from gvpo_core.training import cli

pytestmark = pytest.mark.core
pytest.importorskip("tyro", reason="the command line's extra is not installed")


@pytest.fixture(autouse=True)
def _ends(capfd):
    """A read that waits for a pipe for ever is ended after minutes, as an error."""

    def waited(*_):
        raise AssertionError("the command waits for a pipe")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path):
    os.mkfifo(path)


def a_socket(path):
    os.chdir(path.parent)  # a socket's path is at most 107 bytes long
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


def device(path):
    path.symlink_to("/dev/null")


def folder(path):
    path.mkdir()


KINDS = {"pipe": pipe, "socket": a_socket, "device": device, "folder": folder}


def stands(path, kind):
    path.unlink(missing_ok=True)
    KINDS[kind](path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.toml", "train.jsonl", "mine.py", "table.json"])
def test_an_input_that_is_not_a_file_is_named(name, kind, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def reward(completions): return [0.0 for _ in completions]")
    config = table_run.make(tmp_path, reward=f'function = "{tmp_path / "mine.py"}:reward"\nisolation = "thread"')
    stands(tmp_path / name, kind)
    assert cli.main(["train", str(config)]) == 2
    said = capfd.readouterr().err
    assert name in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


FILES = [
    "config.toml",
    "metrics.jsonl",
    "completions.jsonl",
    "environment.json",
    "rewards.log",
    "run.log",
    "lock",
    "trackers.json",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    made = tmp_path_factory.mktemp("finished")
    config = table_run.make(made, steps=2)
    assert cli.main(["train", str(config)]) == 0
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_run_that_is_none_is_named_and_nothing_is_changed(
    name, kind, finished, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(finished / "run", tmp_path / "run")
    stands(run / name, kind)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and not p.is_symlink()}
    assert cli.main(["train", str(finished / "config.toml"), "--run.folder", str(run), "--run.steps", "4"]) in (1, 2)
    said = capfd.readouterr().err
    assert str(run / name) in said and "Traceback" not in said
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and not p.is_symlink()} == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["config.toml", "metrics.jsonl", "completions.jsonl", "environment.json", "report.html"]
)
@pytest.mark.parametrize("command", ["report", "eval"])
def test_eval_and_report_of_such_a_run_end(command, name, kind, finished, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(finished / "run", tmp_path / "run")
    stands(run / name, kind)
    status = cli.main([command, str(run)])
    said = capfd.readouterr().err
    assert status in (0, 2) or str(run / name) in said
    assert "Traceback" not in said


@pytest.mark.parametrize("kind", KINDS)
def test_a_started_collection_that_is_not_a_file_is_named(kind, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, out = table_run.make(tmp_path, steps=1), tmp_path / "groups.jsonl"
    stands(tmp_path / "groups.jsonl.partial", kind)
    assert cli.main(["collect", str(config), str(out)]) in (1, 2)
    said = capfd.readouterr().err
    assert f"cannot write {out}.partial: " in said and "Traceback" not in said
    assert not out.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_cache_that_is_not_a_file_is_named_and_the_run_continues(kind, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, cache, groups = table_run.make(tmp_path, steps=1), tmp_path / "cache", tmp_path / "groups.jsonl"
    assert cli.main(["collect", str(config), str(groups)]) == 0
    cache.mkdir()
    stands(cache / "reference_scores.jsonl", kind)
    fed = ["--data.train", str(groups), "--data.reference-cache", str(cache)]
    assert cli.main(["train", str(config), *fed]) == 0
    assert f"{cache}/reference_scores.jsonl cannot be used" in caplog.text and "memory only" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_init_reads_no_tokenizer_settings_that_are_no_file(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    stands(tmp_path / "model" / "tokenizer_config.json", kind)
    assert cli.main(["init", str(tmp_path / "mine"), "--model", str(tmp_path / "model")]) == 0
    assert (tmp_path / "mine" / "config.toml").is_file()


def test_settings_of_a_shell_substitution_are_read(tmp_path, capfd):
    """`gvpo train <(sed ... config.toml)` gives a pipe that has its content."""
    config = table_run.make(tmp_path, steps=1)
    reading, writing = os.pipe()
    os.write(writing, config.read_bytes())
    os.close(writing)
    try:
        assert cli.main(["train", f"/dev/fd/{reading}"]) == 0
    finally:
        os.close(reading)

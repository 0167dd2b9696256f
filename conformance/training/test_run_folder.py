"""A run folder is left alone by whatever cannot read it, lock it or find it, and by a resume that is refused."""

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import killing
import numpy as np
import pytest
import run_folders
from table_problem import PROMPTS, reward

from gvpo_core.training.config import ConfigError, RewardConfig
from gvpo_core.training.files import disk
from gvpo_core.training.rewards import RewardError
from gvpo_core.training.run.checkpoint import (
    CheckpointError,
    begin_checkpoint,
    checkpoint_at,
    commit_checkpoint,
    newest_checkpoint,
    steps_saved,
)
from gvpo_core.training.run.folder import RunFolderError

pytestmark = pytest.mark.core
pytest.importorskip("tomli_w", reason="the command line's extra is not installed")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch, capsys):
    monkeypatch.setattr(disk, "RETRY_SECONDS", (0.0, 0.0))


def failing(monkeypatch, part: str, number: int, times: int, *, skipped: int = 0) -> list[str]:
    """Makes the next `times` opens, stats and listings of a path with `part` in it fail; the paths are listed.

    Opens to write are left alone.

    Args:
      skipped: calls that succeed before.
    """
    failed: list[str] = []
    seen = 0

    def wrapped(real):
        def call(path, *args, **options):
            nonlocal seen
            writes = real is opened and bool(set("wax+") & set(args[0] if args else options.get("mode", "r")))
            if isinstance(path, int) or part not in str(path) or writes:
                return real(path, *args, **options)
            seen += 1
            if seen > skipped and len(failed) < times:
                failed.append(str(path))
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *args, **options)

        return call

    opened = io.open
    for module, name in ((io, "open"), (os, "open"), (os, "stat"), (os, "listdir"), (os, "scandir")):
        monkeypatch.setattr(module, name, wrapped(getattr(module, name)))
    return failed


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize(
    "part", ["00000003/manifest.json", "00000003/policy/table.npz", "step-00000003", "checkpoints"]
)
def test_a_read_that_fails_once_is_tried_again(part, number, tmp_path, monkeypatch):
    run_folders.go(run_folders.config(tmp_path))
    before = run_folders.content(tmp_path)
    with monkeypatch.context() as patched:
        failed = failing(patched, part, number, 1)
        assert newest_checkpoint(tmp_path / "checkpoints").step == 3
    assert len(failed) == 1 and run_folders.content(tmp_path) == before


RESUME_READS = ["metrics.jsonl", "environment.json", "00000003/source.json", "00000003/policy/table.npz", "config.toml"]
REMOTE = [errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO, errno.EHOSTDOWN, errno.EMFILE]


@pytest.mark.parametrize("skipped", range(4))
@pytest.mark.parametrize("part", RESUME_READS)
def test_no_single_failed_read_stops_a_resume(part, skipped, tmp_path, monkeypatch):
    """Reads that were not tried again: the saved settings, the source's state, the policy's file."""
    run_folders.go(run_folders.config(tmp_path))
    with monkeypatch.context() as patched:
        failed = failing(patched, part, REMOTE[skipped], 1, skipped=skipped)
        assert run_folders.go(run_folders.config(tmp_path, steps=4))[0].step == 4
    assert len(failed) <= 1 and (failed or skipped), "the first read of each file failed"


@pytest.mark.parametrize("skipped", range(3))
@pytest.mark.parametrize("part", [*RESUME_READS, "checkpoints"])
def test_reads_that_begin_to_fail_during_a_start_are_one_line(part, skipped, tmp_path, monkeypatch):
    run_folders.go(run_folders.config(tmp_path))
    with monkeypatch.context() as patched:
        failed = failing(patched, part, REMOTE[skipped], 10**6, skipped=skipped)
        with contextlib.suppress(CheckpointError, RunFolderError, ConfigError):  # and no other kind
            run_folders.go(run_folders.config(tmp_path, steps=4))
    assert failed or skipped
    assert not any("damaged" in name for name in os.listdir(tmp_path / "checkpoints"))
    assert run_folders.go(run_folders.config(tmp_path, steps=4))[0].step == 4


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_listed_leaves_no_file_out_of_a_checkpoint(number, tmp_path, monkeypatch):
    """`Path.rglob` passes over what it may not list: the checkpoint counted, without its files."""
    partial = begin_checkpoint(tmp_path, 1)
    (partial.policy / "weights.bin").write_bytes(b"weights")
    with monkeypatch.context() as patched:
        failed = failing(patched, "policy", number, 1)
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            commit_checkpoint(tmp_path, 1, keep=1)
    assert failed and not steps_saved(tmp_path)
    commit_checkpoint(tmp_path, 1, keep=1)
    manifest = json.loads((checkpoint_at(tmp_path, 1).directory / "manifest.json").read_text())
    assert [*manifest["files"]] == ["policy/weights.bin"]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("part", ["00000003/manifest.json", "00000003/policy/table.npz", "checkpoints", "config.toml"])
def test_a_read_that_keeps_failing_stops_the_start_and_changes_nothing(part, number, tmp_path, monkeypatch):
    """A manifest that could not be read was called damaged and set aside; a folder that could not be listed was new."""
    run_folders.go(run_folders.config(tmp_path))
    before = run_folders.content(tmp_path)
    with monkeypatch.context() as patched:
        failed = failing(patched, part, number, 10**6)
        with pytest.raises((CheckpointError, RunFolderError), match=r"cannot (be )?read") as caught:
            run_folders.go(run_folders.config(tmp_path, steps=4))
    assert failed and os.strerror(number) in str(caught.value) and "changed" in str(caught.value)
    assert run_folders.content(tmp_path) == before
    assert run_folders.go(run_folders.config(tmp_path, steps=4))[0].step == 4


def test_when_every_checkpoint_is_damaged_none_is_moved(tmp_path):
    run_folders.go(run_folders.config(tmp_path))
    for path in (tmp_path / "checkpoints").glob("*/policy/table.npz"):
        path.write_bytes(path.read_bytes()[:-1])
    before = run_folders.content(tmp_path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is valid: .*00000003.*00000002"):
            run_folders.go(run_folders.config(tmp_path, steps=4))
    assert run_folders.content(tmp_path) == before


@pytest.mark.parametrize("then", ["a second run", "nothing", "a removed lock", "a copy by hard links"])
def test_a_run_whose_folder_is_moved_stops_and_writes_nothing_more(then, tmp_path):
    """The same command started anew: the first run wrote into the second's files, at the same path."""
    folder, moved = tmp_path / "run", tmp_path / "moved"
    seen: dict[str, dict[str, bytes]] = {}
    calls = []

    def moving(prompts, completions, **columns):
        calls.append(1)
        if len(calls) == 2:  # in the second step
            if then == "a removed lock":
                (folder / "lock").unlink()
            else:
                folder.rename(moved)
            if then == "a copy by hard links":  # as of a backup: its lock file is the same
                shutil.copytree(moved, folder, copy_function=os.link)
            if then == "a second run":
                run_folders.go(run_folders.config(folder))
            seen.update({str(p): run_folders.content(p) for p in (folder, moved) if p.exists()})
        return reward(prompts, completions, **columns)

    with pytest.raises(RunFolderError, match="was moved or replaced during the run"):
        run_folders.go(run_folders.config(folder), rewards={"value": moving})
    assert {str(p): run_folders.content(p) for p in (folder, moved) if p.exists()} == seen
    if then == "a second run":
        assert [r["step"] for r in killing.lasting(folder)] == [1, 2, 3]
    if then != "a removed lock":
        assert run_folders.go(run_folders.config(moved))[0].step == 3


@pytest.mark.parametrize("name", ["run.log", "rewards.log"])
def test_a_reward_of_a_moved_run_writes_to_no_other_runs_log(name, tmp_path, caplog):
    """run.log and rewards.log were opened by their path, in the first run's and the second run's folder alike."""
    folder = tmp_path / "run"
    calls = []

    def moving(prompts, completions, **columns):
        calls.append(1)
        if len(calls) == 2:
            folder.rename(tmp_path / "moved")
            shutil.copytree(tmp_path / "moved", folder)
        if len(calls) >= 2 and name == "run.log":
            raise ValueError("of the first run")
        if len(calls) >= 2:
            print("of the first run")
        return reward(prompts, completions, **columns)

    with pytest.raises((RunFolderError, RewardError)):
        config = run_folders.config(folder)
        forgiven = RewardConfig(function="given", failure_value=0.0, max_failures=1.0)
        run_folders.go(replace(config, rewards={"value": forgiven}), rewards={"value": moving})
    assert not {"run.log", "rewards.log"} & {p.name for p in folder.iterdir()}
    assert f"{name} cannot be written: the run folder was moved or replaced" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(number, tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", flock)
        with pytest.raises(RunFolderError, match="without file locks") as caught:
            run_folders.go(run_folders.config(tmp_path))
    assert os.strerror(number) in str(caught.value) and "in use" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 512, b"\xff\xfe", b"[run\n"])
def test_an_empty_or_unreadable_saved_config_is_named(content, tmp_path):
    run_folders.go(run_folders.config(tmp_path))
    (tmp_path / "config.toml").write_bytes(content)
    before = run_folders.content(tmp_path)
    with pytest.raises(ConfigError, match=r"run\.allow_changes = true") as caught:
        run_folders.go(run_folders.config(tmp_path, steps=4))
    assert str(tmp_path / "config.toml") in str(caught.value) and "\n" not in str(caught.value).strip()
    assert run_folders.content(tmp_path) == before
    assert run_folders.go(run_folders.config(tmp_path, steps=4, allow_changes=True))[0].step == 4


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"[]", b'{"data": 3'])
def test_a_damaged_environment_is_named(content, tmp_path):
    run_folders.go(run_folders.config(tmp_path))
    (tmp_path / "environment.json").write_bytes(content)
    before = run_folders.content(tmp_path)
    with pytest.raises(ConfigError, match=r"environment.json is damaged .*run.allow_changes = true"):
        run_folders.go(run_folders.config(tmp_path, steps=4))
    assert run_folders.content(tmp_path) == before


@pytest.mark.parametrize("missing", ["config.toml", "environment.json"])
def test_a_missing_file_of_a_run_with_checkpoints_is_named(missing, tmp_path, caplog):
    run_folders.go(run_folders.config(tmp_path))
    (tmp_path / missing).unlink()
    if missing == "config.toml":
        with pytest.raises(ConfigError, match=r"config\.toml is missing"):
            run_folders.go(run_folders.config(tmp_path, steps=4))
    else:
        run_folders.go(run_folders.config(tmp_path, steps=4))
        assert "environment.json is missing" in caplog.text


@pytest.mark.parametrize("why", ["settings", "data", "damaged", "reward", "policy"])
def test_a_refused_resume_leaves_the_folder_as_it_was(why, tmp_path):
    """With settings that were changed with leave, too: they are saved once the run has really begun with them."""
    run_folders.go(run_folders.config(tmp_path))
    if why == "damaged":
        for path in (tmp_path / "checkpoints").glob("*/policy/table.npz"):
            path.write_bytes(path.read_bytes()[:-1])
    before = run_folders.content(tmp_path)
    config, given = run_folders.config(tmp_path, steps=4), {}
    if why != "data":
        config = replace(config, optimizer=replace(config.optimizer, learning_rate=0.25))
    if why not in ("data", "settings"):
        config = replace(config, run=replace(config.run, allow_changes=True))
    if why == "data":
        given = {"train_rows": run_folders.ROWS[::-1]}
    if why == "reward":
        config = replace(config, rewards={"value": replace(config.rewards["value"], function="nowhere.py:f")})
        given = {"rewards": None}
    if why == "policy":
        from gvpo_core.training.policy.table import TablePolicy

        given = {"policy": TablePolicy({p: {"a": 0.5, "b": 0.5} for p in PROMPTS}, config.optimizer)}
    with pytest.raises((ConfigError, CheckpointError, ValueError)):
        run_folders.go(config, **given)
    assert run_folders.content(tmp_path) == before


def test_the_lock_file_of_a_copied_folder_is_its_own(tmp_path):
    run_folders.go(run_folders.config(tmp_path / "a", steps=2))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    ends = [run_folders.go(run_folders.config(tmp_path / x, steps=4))[1].logits for x in ("a", "b")]
    np.testing.assert_array_equal(*ends)
    assert steps_saved(tmp_path / "b" / "checkpoints") == [4, 3]


def test_starts_are_kept_with_what_changed(tmp_path):
    run_folders.go(run_folders.config(tmp_path, steps=2))
    path = tmp_path / "environment.json"
    known = json.loads(path.read_text())
    assert [s["step"] for s in known["starts"]] == [0] and known["starts"][0]["changed"] == []
    path.write_text(json.dumps(known | {"gvpo": "0.0.1"}))
    run_folders.go(run_folders.config(tmp_path, steps=3))
    first, second = json.loads(path.read_text())["starts"]
    assert first == known["starts"][0] and second["step"] == 2
    assert any(line.startswith("gvpo: 0.0.1 -> ") for line in second["changed"])
    assert "run.steps: 2 -> 3" in second["changed"]
    assert Path(tmp_path / "config.toml").read_text().count("steps = 3") == 1


@pytest.mark.parametrize("what", ["file", "link to nothing", "below a file", "long name", "empty", "folder as metrics"])
def test_a_path_that_can_be_no_run_folder_is_named_without_advice_to_wait(what, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "x")
    path = {
        "link to nothing": tmp_path / "link", "below a file": tmp_path / "file" / "run",
        "long name": tmp_path / ("a" * 300), "folder as metrics": tmp_path / "run",
    }.get(what, tmp_path / "file")  # fmt: skip
    config = run_folders.config(path, steps=1)
    if what == "folder as metrics":
        run_folders.go(config)
        (path / "metrics.jsonl").unlink()
        (path / "metrics.jsonl").mkdir()
        config = run_folders.config(path, steps=2)
    if what == "empty":
        config = replace(config, run=replace(config.run, folder=""))
    with pytest.raises((RunFolderError, ConfigError)) as error:
        run_folders.go(config)
    assert ("metrics.jsonl is a folder" if what == "folder as metrics" else "run.folder = ") in str(error.value)
    assert "Errno" not in str(error.value) and "Run again" not in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_error_that_quotes_invalid_unicode_is_reported_as_itself(tmp_path):
    def bad(completions):
        raise ValueError("no \ud800 here")

    with pytest.raises(RewardError, match="gave no score"):
        run_folders.go(run_folders.config(tmp_path), rewards={"value": bad})

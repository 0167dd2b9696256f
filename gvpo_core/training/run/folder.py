"""The folder of a run: settings, environment, metrics, completions, and a lock so that only one process uses it."""

import contextlib
import errno
import json
import logging
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from gvpo_core.training.config import Config, ConfigError
from gvpo_core.training.config.file import config_text, differences, read_saved
from gvpo_core.training.files.disk import is_at, is_folder, lock, make_synced, retried, without_locks, write_synced
from gvpo_core.training.files.records import Kept, append_synced, cut, encoded, records
from gvpo_core.training.fingerprint import INPUTS, changes, dtypes
from gvpo_core.training.run.checkpoint import steps_saved

_log = logging.getLogger("gvpo")
# Settings that do not change the numbers of later steps.
_FREE = ("run.folder", "run.steps", "run.checkpoint_every", "run.keep_checkpoints", "run.keep_best", "run.trackers",
         "run.show_every", "run.allow_changes", "evaluation.", "data.reference_cache", "engine.url", "engine.folder",
         "engine.gap_tolerance", "engine.gap_every", "engine.dtype", "engine.concurrency", "engine.deadline",
         "engine.tries", "engine.pause", "engine.api_key", "engine.transfer", "engine.listen",
         "engine.sleep", "rollout.ahead_device")  # fmt: skip
_FILES = ("config.toml", "environment.json", "metrics.jsonl", "completions.jsonl", "rewards.log", "run.log", "lock",
          "report.html", "trackers.json")  # fmt: skip
_NO_FOLDER = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)  # errors of the path itself: a retry does not help
_ALLOW = "another run.folder, or run.allow_changes = true to continue with"


class RunFolderError(RuntimeError):
    """A run folder cannot be used."""


class RunFolder:
    """Files of one run. Whole lines are appended and synced once a step; `cut` removes steps that will run again."""

    def __init__(self, path: Path) -> None:
        self.shown = path = Path(os.path.expanduser(path))  # the path in messages and commands
        self.path = path = path.absolute()  # a reward in a thread may change the working directory
        self.metrics = path / "metrics.jsonl"
        self.completions = path / "completions.jsonl"
        self.checkpoints = path / "checkpoints"
        self._settings = path / "config.toml"
        self._environment = path / "environment.json"
        self._lock: IO[str] | None = None
        self._opened: int | None = None  # the folder's descriptor: a copy by hard links has the same lock file
        self._changed: list[str] = []

    def open(self, config: Config, inputs: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Locks the folder and compares `config` with the run in it. Changes no file of that run.

        Args:
          inputs: name of INPUTS -> name -> fingerprint; see fingerprint.py.
        Raises: RunFolderError: another process uses the folder, or it cannot be read or written. ConfigError: it holds
          a run with other settings, data or model.
        """
        with self._reading():
            exists = is_folder(self.checkpoints)
            self._refuse_other_files()
        with self._writing():
            if not exists:
                make_synced(self.checkpoints)
            self._lock = (self.path / "lock").open("a")
            self._opened = os.open(self.path, os.O_RDONLY)
        self._take_lock()
        self.confirm()
        with self._reading():
            begun = bool(steps_saved(self.checkpoints))
            saved_environment = self._saved_environment(begun, config.run.allow_changes)
            self._same_settings(config, begun, dtypes(saved_environment))
        changed, refused = changes(saved_environment, dict(inputs or {}))
        if begun and refused and not config.run.allow_changes:
            raise ConfigError(
                f"{self.shown} holds a run on other data, on another model or in another dtype:\n  "
                + "\n  ".join(refused)
                + f"\nuse the original ones, or set {_ALLOW} these"
            )
        self._changed += refused + changed if begun else []

    def refuse_changes(self, config: Config) -> None:
        """Compares the settings with those of the run in the folder. `open` repeats this with the folder locked.

        Raises: ConfigError: they differ. RunFolderError: the folder cannot be read.
        """
        with self._reading():
            self._refuse_other_files()
            if is_folder(self.checkpoints):
                self._same_settings(config, bool(steps_saved(self.checkpoints)))

    def _refuse_other_files(self) -> None:
        """Raises RunFolderError: the folder holds something that the run must not read or replace.

        That is a pipe, device or folder with the name of a run file, or a config.toml that is not of a run.
        """
        for name in _FILES:
            try:
                mode = retried(lambda name=name: os.stat(self.path / name)).st_mode  # type: ignore[misc]
            except OSError:
                continue  # missing, or the later open reports the error
            if not stat.S_ISREG(mode):
                kind = "folder" if stat.S_ISDIR(mode) else "pipe, socket or device"
                raise RunFolderError(f"{self.path / name} is a {kind}; expected a file of the run. Nothing was changed")

        is_run = is_folder(self.checkpoints) or (self.path / "lock").exists()
        if not is_run and self._settings.exists():
            raise RunFolderError(
                f"{self.shown / self._settings.name} does not belong to a run, and the run's settings would replace"
                " it; give another run.folder"
            )

    def _same_settings(self, config: Config, begun: bool, dtype_sections: Iterable[str] = ("model", "teacher")) -> None:
        """Compares the settings with the saved ones, and notes what changed.

        Args:
          dtype_sections: sections whose dtype is compared after the model is loaded if the setting is "auto".
        """
        by_device = tuple(f"{name}.dtype: " for name in dtype_sections)
        allowed = config.run.allow_changes
        try:
            content = retried(self._settings.read_bytes)
            if not content.strip(b"\0\r\n\t "):
                raise ConfigError(f"{self._settings} is empty, as after a power loss: its settings are lost")
            saved = read_saved(self._settings)
        except FileNotFoundError:
            if begun and not allowed:
                raise ConfigError(
                    f"{self._settings} is missing, and the run has checkpoints. {_recovery(self.shown)}"
                ) from None
            return
        except ConfigError as e:
            if begun and not allowed:
                raise ConfigError(f"{e}. {_recovery(self.shown)}") from e
            _log.warning("%s; written again", e)
            return
        changed = [d for d in differences(saved, config) if not (d.startswith(by_device) and "'auto'" in d)]
        refused = [d for d in changed if not d.startswith(_FREE) or _changes_later_steps(d, config)]
        if refused and not allowed:
            raise ConfigError(
                f"{self.shown} holds a run with other settings:\n  "
                + "\n  ".join(refused)
                + f"\nset {_ALLOW} the new settings"
            )
        self._changed += changed

    def _saved_environment(self, begun: bool, allowed: bool) -> dict[str, Any]:
        """The content of environment.json; empty if it does not exist."""
        try:
            environment = json.loads(retried(self._environment.read_bytes))
            if not isinstance(environment, dict):
                raise ValueError("no JSON object")
        except FileNotFoundError:
            if begun:
                _log.warning(
                    "%s is missing: changes of data, model and rewards since the last start cannot be detected",
                    self._environment,
                )
            return {}
        except (ValueError, RecursionError) as e:
            damaged = f"{self._environment} is damaged ({e}): it records the data and model of the run"
            if begun and not allowed:
                raise ConfigError(f"{damaged}. {_recovery(self.shown)}") from e
            _log.warning("%s; written again", damaged)
            return {}
        return environment

    def begin(self, config: Config, facts: Mapping[str, Any], step: int) -> list[str]:
        """Saves the settings and the environment of this start. Called after all checks have passed.

        Args:
          facts: content of environment.json, including the inputs given to `open`.
          step: steps done.
        Returns: the changes since the last start, one line each.
        """
        self.confirm()
        with self._reading():
            saved_environment = self._saved_environment(begun=False, allowed=True)
        before = {k: v for k, v in saved_environment.items() if k not in INPUTS}
        all_changes = self._changed + (changes(before, facts)[0] if step > 0 else [])
        starts = saved_environment.get("starts")
        start = {"time": time.time(), "step": step, "changed": all_changes}
        start |= {k: facts[k] for k in ("command", "gvpo", "python", "platform", "ranks") if k in facts}
        policy = facts.get("policy")
        start |= {k: policy[k] for k in ("versions", "device_name") if isinstance(policy, Mapping) and k in policy}
        history = [*(starts if isinstance(starts, list) else []), start]
        with self._writing():
            write_synced(self._settings, config_text(config).encode("utf-8", "backslashreplace"))
            text = json.dumps({**facts, "starts": history}, indent=1, default=str)
            write_synced(self._environment, text.encode("utf-8", "backslashreplace"))
        return all_changes

    def confirm(self) -> None:
        """Raises RunFolderError: the folder at this path is no longer the one that `open` opened."""
        if self._lock is None or self._opened is None:
            return
        try:
            unchanged = is_at(self._lock, self.path / "lock") and is_at(self._opened, self.path)
        except OSError as e:
            raise RunFolderError(f"cannot read the run folder {self.shown}: {e}; the checkpoints are intact") from e
        if not unchanged:
            raise RunFolderError(
                f"the run folder {self.shown} was moved or replaced during the run (another lock file or folder);"
                " the run stops and writes nothing more. Resume from the moved folder: gvpo train"
                " MOVED/config.toml"
            )

    def close(self) -> None:
        """Releases the folder's lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._opened is not None:
            os.close(self._opened)
            self._opened = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except FileExistsError as e:
            raise RunFolderError(f"run.folder = {str(self.shown)!r}: {e.filename} is not a folder; give another") from e
        except OSError as e:
            raise RunFolderError(f"cannot write the run folder {self.shown}: {e.strerror or e}") from e

    def records(self) -> Iterator[dict[str, Any]]:
        """The steps and evaluations of metrics.jsonl. Raises: RunFolderError: it cannot be read now."""
        with self._reading():
            yield from records(self.metrics, metrics=True)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            if e.errno in _NO_FOLDER:
                raise RunFolderError(f"run.folder = {str(self.shown)!r} cannot be used: {e.strerror}") from e
            if isinstance(e, IsADirectoryError):
                raise RunFolderError(
                    f"{e.filename} is a folder; expected a file of the run. Nothing was changed"
                ) from e
            raise RunFolderError(
                f"cannot read the run folder {self.shown} now: {e}; nothing in it was changed. Run again when the file"
                " system answers"
            ) from e

    def _take_lock(self) -> None:
        assert self._lock is not None
        try:
            lock(self._lock)
        except BlockingIOError as e:
            self.close()
            raise RunFolderError(f"{self.shown} is in use by another process; give another run.folder") from e
        except OSError as e:
            self.close()
            raise RunFolderError(f"run.folder: {without_locks(self.shown, e)}") from e

    def append(self, path: Path, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends records as JSON lines. NaN and infinities become null."""
        self.confirm()
        try:
            append_synced(path, encoded(records))
        except OSError as e:
            raise RunFolderError(f"cannot write {path}: {e.strerror or e}; the checkpoints are intact") from e

    def cut(self, step: int) -> int:
        """Drops the records after `step` (-1: all). Logs a warning for everything unexpected in the files.

        Returns: the last step that had a record.
        """
        self.confirm()
        last = 0
        for path, parse in ((self.metrics, True), (self.completions, False)):
            try:
                with self._reading():
                    kept = cut(path, step, parse=parse)
            except RunFolderError as e:
                if not isinstance(e.__cause__, FileNotFoundError):
                    raise
                lost = "verdicts start over, and the report lacks them" if parse else "the report shows none of them"
                kept = Kept(odd=[f"{path} is missing, and {step} steps are done: {lost}"] if step > 0 else [])
            if step < 0 and kept.last > 0 and parse:
                kept.odd.append(
                    f"{path}: no checkpoint is left, so the run starts over; the records of its"
                    f" {kept.last} steps are dropped"
                )
            last = max(last, kept.last)
            for text in kept.odd:
                _log.warning("%s", text)
        return last


def _changes_later_steps(difference: str, config: Config) -> bool:
    """Whether a difference of run.steps changes later steps: schedules and sampling ahead depend on the last step."""
    depends_on_end = config.optimizer.schedule != "constant" or config.rollout.ahead > 0
    return difference.startswith("run.steps:") and depends_on_end


def _recovery(path: Path) -> str:
    return f"Restore it, or set run.allow_changes = true to continue in {path} with the current settings and data"

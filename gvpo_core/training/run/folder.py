"""The folder of a run: settings, environment, metrics, completions, and the lock that keeps it to one process."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from gvpo_core.training.config import Config, ConfigError
from gvpo_core.training.config.file import differences, read_saved, write_config
from gvpo_core.training.run.checkpoint import steps_saved, write_synced

# Settings that change nothing about the numbers of the steps still to come.
_FREE = ("run.folder", "run.steps", "run.checkpoint_every", "run.keep_checkpoints", "run.trackers", "run.show_every",
         "run.allow_changes", "evaluation.")  # fmt: skip


class RunFolderError(RuntimeError):
    """A run folder that cannot be used."""


class RunFolder:
    """Files of one run. Lines are appended whole and synced once a step; `cut` takes back steps to be run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.completions = path / "completions.jsonl"
        self.checkpoints = path / "checkpoints"
        self._lock: IO[str] | None = None

    def open(self, config: Config, data: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Creates or continues the folder for `config`.

        Args:
          data: "train" and "evaluation" -> fingerprint of the rows, which are to be those of the steps done.
        Raises: RunFolderError: another process has it, or it cannot be written. ConfigError: its settings or its data
          differ.
        """
        with self._writing():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("a")
        self._take_lock()
        saved = self.path / "config.toml"
        if saved.exists() and not config.run.allow_changes:
            changed = [
                d
                for d in differences(read_saved(saved), config)
                if not d.startswith(_FREE) or (d.startswith("run.steps:") and config.optimizer.schedule != "constant")
            ]
            if changed:
                raise ConfigError(
                    f"{self.path} holds a run with other settings:\n  "
                    + "\n  ".join(changed)
                    + "\ngive another run.folder, or run.allow_changes = true to go on with the new settings"
                )
        if data is not None and not config.run.allow_changes and steps_saved(self.checkpoints):
            self._same_data(data)
        with self._writing():
            aside = self.path / ".config.toml.new"
            write_config(config, aside)
            aside.rename(saved)

    def _same_data(self, data: Mapping[str, Mapping[str, Any]]) -> None:
        try:
            known = json.loads((self.path / "environment.json").read_bytes())["data"]
            changed = [
                f"data.{name}: {_told(known.get(name))} -> {_told(data.get(name))}"
                for name in ("train", "evaluation")
                if known.get(name) != data.get(name)
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # a run of before they were kept, or the file is gone: nothing to compare with
        if changed:
            raise ConfigError(
                f"{self.path} holds a run on other data:\n  "
                + "\n  ".join(changed)
                + "\ngive the data as it was, another run.folder, or run.allow_changes = true to go on with this one"
            )

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise RunFolderError(f"cannot write the run folder {self.path}: {e}") from e

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no advisory locks on this system
            return
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self.close()
            raise RunFolderError(f"{self.path} is in use by another process; give another run.folder") from e

    def write_environment(self, facts: Mapping[str, Any]) -> None:
        with self._writing():
            write_synced(self.path / "environment.json", json.dumps(facts, indent=1, default=str).encode())

    def append(self, path: Path, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends records as JSON lines; NaN and infinities become null."""
        text = "".join(json.dumps(_finite(r), ensure_ascii=False, allow_nan=False) + "\n" for r in records)
        try:
            with path.open("a", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            raise RunFolderError(f"cannot write {path}: {e.strerror or e}; the checkpoints are intact") from e

    def cut(self, step: int | None) -> None:
        """Drops the records after `step` (all, when None), and a last line that a kill left incomplete."""
        for path in (self.metrics, self.completions):
            if not path.exists():
                continue
            kept = []
            with self._writing():
                with path.open(encoding="utf-8", errors="replace") as f:
                    for line in f:
                        with contextlib.suppress(ValueError, KeyError, TypeError):  # cut by a kill, or not ours
                            if step is not None and json.loads(line)["step"] <= step and line.endswith("\n"):
                                kept.append(line)
                write_synced(path, "".join(kept).encode())


def _told(data: Mapping[str, Any] | None) -> str:
    return f"{data['rows']:,} rows, SHA-256 {data['sha256'][:12]}" if data else "none"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Checkpoints. Each is written to a temporary folder, checksummed, synced and renamed, so that a kill cannot damage it.

checkpoints/step-00000010/manifest.json    step, sizes and SHA-256 of all other files, and its own SHA-256
                          policy/...       files written by `Policy.save`
                          source.json      state of the source of groups, if it has any
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gvpo_core.training.files.disk import is_folder, names_in, retried, sync_folder, tree, unwritable, write_synced
from gvpo_core.training.policy.tensor_file import Digest

_log = logging.getLogger("gvpo.checkpoint")
_MANIFEST = "manifest.json"
_STATE = "source.json"
_PREFIX = "step-"
_PARTIAL = ".partial-"
_DAMAGED = "damaged-"
_CHECKPOINT_NAME = re.compile(rf"{_PREFIX}([0-9]{{8,}})")
_LEFT_OVER = re.compile(rf"{re.escape(_PARTIAL)}(old-)?{_PREFIX}[0-9]{{8,}}")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, is damaged, or does not exist."""


@dataclass(frozen=True)
class Checkpoint:
    """The folder of one checkpoint."""

    step: int
    directory: Path

    @property
    def policy(self) -> Path:
        """Folder of the policy's own files."""
        return self.directory / "policy"


def write_state(checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
    """Writes the state of the source of groups, if it is not empty."""
    if state:
        (checkpoint.directory / _STATE).write_text(json.dumps(state), encoding="utf-8")


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the state that `write_state` wrote; empty if it wrote none.

    Raises: CheckpointError: the file holds something else, or cannot be read now.
    """
    path = checkpoint.directory / _STATE
    try:
        state = json.loads(retried(lambda: path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise unreadable(checkpoint.directory.parent, e) from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}") from e
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} does not hold the state of a source of groups")
    return state


def checkpoint_at(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of a step, which may not exist."""
    return Checkpoint(step, folder / _name(step))


def begin_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Creates an empty folder for `Policy.save`. It becomes a checkpoint with `commit_checkpoint`."""
    partial = partial_checkpoint(folder, step)
    shutil.rmtree(partial.directory, ignore_errors=True)
    partial.policy.mkdir(parents=True)
    return partial


def read_back(directory: Path, written: Mapping[str, Digest]) -> None:
    """Reads the written files again. Raises: CheckpointError: a file does not hold what was written into it."""
    for name, digest in written.items():
        if (directory / name).stat().st_size != digest.bytes or _sha256(directory / name) != digest.sha256:
            raise CheckpointError(f"{directory / name} does not hold what was written into it")


def commit_checkpoint(
    folder: Path, step: int, keep: int, also: Collection[int] = (), written: Mapping[str, Digest] | None = None
) -> Checkpoint:
    """Checksums, syncs and renames the folder that `begin_checkpoint` created; then removes old checkpoints.

    Args:
      keep: number of newest checkpoints to keep.
      also: further steps to keep. A checkpoint that `gvpo eval` or `gvpo export` is reading is kept too.
      written: files, by their path in the checkpoint, that were hashed while they were written and passed `read_back`.
        They are not read again. All other files are read once to hash them.
    Raises: OSError: a write failed, for example on a full disk. Earlier checkpoints are unchanged.
    """
    partial, hashed = partial_checkpoint(folder, step).directory, written or {}
    files, directories = tree(partial)
    entries = {}
    for path in files:
        with path.open("rb") as f:
            os.fsync(f.fileno())
        name, size = path.relative_to(partial).as_posix(), path.stat().st_size
        entries[name] = {"bytes": size, "sha256": hashed[name].sha256 if name in hashed else _sha256(path)}
    missing = sorted(hashed.keys() - entries.keys())
    if missing:
        raise CheckpointError(f"{partial / missing[0]} was written and is missing now")
    write_synced(partial / _MANIFEST, _manifest({"step": step, "files": entries}))
    for directory in directories:
        sync_folder(directory)
    final = folder / _name(step)
    if is_folder(final):  # damaged, otherwise the run would have resumed from it
        _set_aside(final)
    partial.rename(final)
    sync_folder(folder)
    reason = damage(final, but=entries)  # each file was read after it was written
    if reason:
        raise CheckpointError(f"the new checkpoint is not valid: {reason}")
    try:
        for old in steps_saved(folder)[keep:]:
            if old not in also and not _is_read(folder / _name(old)):
                _remove(folder, old)
    except OSError as e:  # the new checkpoint is complete
        _log.warning("old checkpoints in %s are kept: %s", folder, e.strerror or e)
    return Checkpoint(step, final)


def save_failed(folder: Path, step: int, error: Exception) -> CheckpointError:
    """Removes an incomplete save; returns the error, which says which checkpoint is left."""
    shutil.rmtree(partial_checkpoint(folder, step).directory, ignore_errors=True)
    try:
        steps = steps_saved(folder)
        left = f"the checkpoint of step {steps[0]} is intact" if steps else "there is no earlier checkpoint"
    except OSError as e:
        left = f"earlier checkpoints cannot be listed now: {e.strerror or e}"
    what = unwritable(error) or f"{type(error).__name__}: {error}"
    return CheckpointError(f"could not save step {step} in {folder} ({left}): {what}")


def newest_checkpoint(folder: Path, at: int | None = None) -> Checkpoint | None:
    """The newest checkpoint that passes verification; None if nothing was saved yet.

    Damaged checkpoints are logged and renamed, but only after a good one is found: an error changes nothing.

    Args:
      at: use the checkpoint of this step instead of the newest.
    Raises: CheckpointError: every checkpoint is damaged, one cannot be read, or step `at` has none.
    """
    try:
        return _newest(folder, at)
    except OSError as e:
        raise unreadable(folder, e) from e


def unreadable(folder: Path, error: OSError) -> CheckpointError:
    """The error for a checkpoint that cannot be read now. Its content may be intact."""
    where = error.filename or folder
    return CheckpointError(
        f"{where} cannot be read now ({error.strerror or error}); nothing in {folder} was changed. Run again when the"
        " file system answers. If that file is lost, move its checkpoint away to continue from the one before"
    )


def _newest(folder: Path, at: int | None) -> Checkpoint | None:
    newest: int | None = None
    damaged: dict[Path, str] = {}
    steps = steps_saved(folder)
    if at is not None and at not in steps:
        raise CheckpointError(f"{folder} has no checkpoint of step {at}; saved steps: {_listed(steps)}")
    for step in [at] if at is not None else steps:
        reason = damage(folder / _name(step))
        if reason is None:
            newest = step
            break
        damaged[folder / _name(step)] = reason
    if newest is None:
        damaged_names = [name for name in names_in(folder) if name.startswith(_DAMAGED)]
        if damaged or damaged_names:
            why = "; ".join(damaged.values()) or "all were set aside as damaged"
            which = f"no checkpoint in {folder} is valid" if at is None else f"the checkpoint of step {at} is damaged"
            raise CheckpointError(
                f"{which}: {why}. "
                + ("Move the run folder away to start over." if at is None else f"Saved steps: {_listed(steps)}")
            )
    for directory, reason in damaged.items():
        _log.warning("damaged checkpoint, not used: %s", reason)
        _set_aside(directory)
    _clean(folder)
    return None if newest is None else checkpoint_at(folder, newest)


def _clean(folder: Path) -> None:
    """Removes folders that a kill left incomplete, and logs names that are not checkpoints."""
    for name in names_in(folder):
        path = folder / name
        if _LEFT_OVER.fullmatch(name) and path.is_dir() and not path.is_symlink():
            _clear(path, "left by a kill")
        elif name.startswith((_PREFIX, _PARTIAL)) and (_step_of(name) is None or not is_folder(path)):
            _log.warning("%s is not a checkpoint of this run (expected a folder %s): not used", path, _name(0))


def go_back(folder: Path, step: int) -> list[int]:
    """Removes the checkpoints after `step`, newest first; returns their steps."""
    later = [s for s in steps_saved(folder) if s > step]
    for s in later:
        _remove(folder, s)
    return later


def damage(directory: Path, but: Collection[str] = ()) -> str | None:
    """Describes the damage of a checkpoint, with the file's name; None if there is none.

    Args:
      but: files whose content is not read.
    Raises: OSError: a file exists but cannot be read; it may be intact.
    """
    manifest = directory / _MANIFEST
    try:
        content = retried(manifest.read_bytes)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
        return f"{manifest} is missing ({e.strerror})"
    try:
        manifest_content: dict[str, Any] = json.loads(content)
        if content != _manifest({"step": manifest_content["step"], "files": manifest_content["files"]}):
            return f"{manifest} does not match its own SHA-256"
        entries = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest_content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        return f"{manifest} is not a checkpoint's manifest ({_manifest_problem(e)})"
    if _step_of(directory.name) not in (None, manifest_content["step"]):
        return f"{manifest} belongs to step {manifest_content['step']}"
    for name, (size, digest) in entries.items():
        path = directory / name
        try:
            file_stat = retried(lambda path=path: os.stat(path))  # type: ignore[misc]
        except (FileNotFoundError, NotADirectoryError):
            return f"{path} is missing"
        if not stat.S_ISREG(file_stat.st_mode):
            return f"{path} is not a file"
        if file_stat.st_size != size:
            return f"{path} has {file_stat.st_size} bytes instead of {size}"
        if name not in but and retried(lambda path=path: _sha256(path)) != digest:  # type: ignore[misc]
            return f"{path} does not match the SHA-256 in its manifest"
    return None


def _manifest_problem(error: Exception) -> str:
    """Describes what is wrong with a manifest."""
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]!r}"
    return "its values have other types" if isinstance(error, TypeError | AttributeError) else f"not JSON: {error}"


def refuse_unsaved(folder: Path, step: int) -> None:
    """Raises CheckpointError: `step` is not 0 and has no checkpoint. The message lists the saved steps."""
    try:
        steps = steps_saved(folder)
    except OSError as e:
        raise unreadable(folder, e) from e
    if step and step not in steps:
        raise CheckpointError(f"{folder} has no checkpoint of step {step}; saved steps: {_listed(steps)}")


@contextlib.contextmanager
def reading(checkpoint: Checkpoint) -> Iterator[None]:
    """Inside `with`, a run in progress does not remove this checkpoint.

    Raises: FileNotFoundError: the checkpoint was removed before.
    """
    with (checkpoint.directory / _MANIFEST).open("rb") as manifest:
        with contextlib.suppress(ImportError, OSError):  # without locks it may be removed; restore reports that
            import fcntl

            fcntl.flock(manifest, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.stat(checkpoint.directory / _MANIFEST)  # fails if the run removed it between open and lock
        yield


def _is_read(directory: Path) -> bool:
    try:
        import fcntl

        with (directory / _MANIFEST).open("r+b") as manifest:  # on NFS, LOCK_EX needs write access
            fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return False
    return False


def _manifest(facts: dict[str, Any]) -> bytes:
    """A manifest with its own checksum, so that changes in the manifest are detected too."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return json.dumps(facts | {"sha256": digest}, indent=1).encode()


def partial_checkpoint(folder: Path, step: int) -> Checkpoint:
    """The temporary folder that a checkpoint is written into."""
    return Checkpoint(step, folder / f"{_PARTIAL}{_name(step)}")


def _name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def steps_saved(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder, newest first. Raises: OSError: the folder cannot be listed."""
    steps = (_step_of(name) for name in names_in(folder))
    return sorted((step for step in steps if step is not None and is_folder(folder / _name(step))), reverse=True)


def _step_of(name: str) -> int | None:
    """The step in the name of a checkpoint's folder; None if the name does not have the form of `_name`."""
    match = _CHECKPOINT_NAME.fullmatch(name)
    return int(match[1]) if match and name == _name(int(match[1])) else None


def _listed(steps: Collection[int]) -> str:
    return ", ".join(map(str, sorted(steps))) or "none"


def _remove(folder: Path, step: int) -> None:
    aside = folder / f"{_PARTIAL}old-{_name(step)}"  # rename first: a kill leaves no incomplete checkpoint
    (folder / _name(step)).rename(aside)
    sync_folder(folder)
    if aside.is_symlink():  # the checkpoint itself is stored elsewhere
        aside.unlink()
    else:
        _clear(aside, "an old checkpoint")


def _clear(folder: Path, what: str) -> None:
    """Removes a folder that is no longer used. Only warns if it cannot be removed."""
    try:
        shutil.rmtree(folder)
    except OSError as e:  # for example a file that another process has open on NFS
        _log.warning("%s, %s, cannot be removed: %s", folder, what, e.strerror or e)


def _set_aside(directory: Path) -> None:
    target = directory.with_name(_DAMAGED + directory.name)
    shutil.rmtree(target, ignore_errors=True)
    directory.rename(target)
    sync_folder(directory.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

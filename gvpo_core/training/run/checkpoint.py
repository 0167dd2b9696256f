"""Checkpoints: written aside, checksummed, synced and renamed, so that a kill at any moment leaves a good one.

checkpoints/step-00000010/manifest.json    step, sizes and SHA-256 of every other file, and its own
                          policy/...       what `Policy.save` wrote
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_log = logging.getLogger("gvpo.checkpoint")
_MANIFEST = "manifest.json"
_PREFIX = "step-"
_PARTIAL = ".partial-"
_DAMAGED = "damaged-"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or none that can be trusted."""


@dataclass(frozen=True)
class Checkpoint:
    """The folder of one checkpoint."""

    step: int
    directory: Path

    @property
    def policy(self) -> Path:
        return self.directory / "policy"


def checkpoint_at(folder: Path, step: int) -> Checkpoint:
    """Where the checkpoint of a step lies, whether or not it does."""
    return Checkpoint(step, folder / _name(step))


def begin_checkpoint(folder: Path, step: int) -> Checkpoint:
    """An empty folder for `Policy.save` to write into; `commit_checkpoint` makes it count."""
    partial = partial_checkpoint(folder, step)
    shutil.rmtree(partial.directory, ignore_errors=True)
    partial.policy.mkdir(parents=True)
    return partial


def commit_checkpoint(folder: Path, step: int, keep: int) -> Checkpoint:
    """Checksums, syncs and renames what `begin_checkpoint` opened; then drops all but the newest `keep`.

    Raises: OSError: the disk is full, say; nothing saved before is touched.
    """
    partial = partial_checkpoint(folder, step).directory
    files = sorted(p for p in partial.rglob("*") if p.is_file())
    entries = {}
    for path in files:
        with path.open("rb") as f:
            os.fsync(f.fileno())
        entries[path.relative_to(partial).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    write_synced(partial / _MANIFEST, _manifest({"step": step, "files": entries}))
    for directory in {p.parent for p in files} | {partial}:
        sync_folder(directory)
    final = folder / _name(step)
    if final.exists():  # an older, damaged one; a good one would have been resumed from
        _set_aside(final)
    partial.rename(final)
    sync_folder(folder)
    reason = damage(final)
    if reason:
        raise CheckpointError(f"the checkpoint just written does not verify: {reason}")
    for old in steps_saved(folder)[keep:]:
        leaving = folder / f"{_PARTIAL}old-{_name(old)}"  # a kill half way leaves no half checkpoint under its name
        (folder / _name(old)).rename(leaving)
        shutil.rmtree(leaving)
    return Checkpoint(step, final)


def save_failed(folder: Path, step: int, error: Exception) -> CheckpointError:
    """Removes a half-written save and says what is left."""
    shutil.rmtree(partial_checkpoint(folder, step).directory, ignore_errors=True)
    steps = steps_saved(folder)
    left = f"the checkpoint of step {steps[0]} is intact" if steps else "there is no earlier checkpoint"
    number, said = getattr(error, "errno", None), str(error)  # writers in other languages give the text alone
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in said or "Disk quota exceeded" in said:
        what = "the disk is full; free space and run again"
    elif number == errno.EFBIG or "File too large" in said:
        what = "a file may not grow this large here: look at ulimit -f and at the file system, then run again"
    else:
        what = f"{type(error).__name__}: {said}"
    return CheckpointError(f"could not save step {step} in {folder} ({left}): {what}")


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged ones are named in the log and set aside. None: nothing saved yet.

    Raises: CheckpointError: there are checkpoints, and every one is damaged.
    """
    for left_over in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(left_over)
    reasons = []
    for step in steps_saved(folder):
        directory = folder / _name(step)
        reason = damage(directory)
        if reason is None:
            return Checkpoint(step, directory)
        _log.warning("damaged checkpoint, not used: %s", reason)
        reasons.append(reason)
        _set_aside(directory)
    if reasons or any(folder.glob(f"{_DAMAGED}*")):
        raise CheckpointError(
            f"no checkpoint in {folder} verifies: {'; '.join(reasons) or 'all were set aside as damaged'}."
            " Move the run folder away to start over."
        )
    return None


def damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is whole."""
    manifest = directory / _MANIFEST
    try:
        content = manifest.read_bytes()
        said: dict[str, Any] = json.loads(content)
        if content != _manifest({"step": said["step"], "files": said["files"]}):
            return f"{manifest} does not have the SHA-256 that it says of itself"
        for name, entry in said["files"].items():
            path = directory / name
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if _sha256(path) != entry["sha256"]:
                return f"{path} does not have the SHA-256 of its manifest"
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"{manifest} cannot be read ({type(e).__name__}: {e})"
    return None


def _manifest(facts: dict[str, Any]) -> bytes:
    """A manifest with its own checksum, so that a byte changed in it is known as well."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return json.dumps(facts | {"sha256": digest}, indent=1).encode()


def write_synced(path: Path, content: bytes) -> None:
    """Replaces a file in one move: written aside, synced, renamed."""
    aside = path.with_name(f".{path.name}.aside")
    with aside.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    aside.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Where a checkpoint is written before it counts."""
    return Checkpoint(step, folder / f"{_PARTIAL}{_name(step)}")


def _name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def steps_saved(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder, newest first."""
    names = (p.name.removeprefix(_PREFIX) for p in folder.glob(f"{_PREFIX}*"))
    return sorted((int(n) for n in names if n.isdigit()), reverse=True)


def _set_aside(directory: Path) -> None:
    target = directory.with_name(_DAMAGED + directory.name)
    shutil.rmtree(target, ignore_errors=True)
    directory.rename(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

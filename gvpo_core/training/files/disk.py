"""Writes that survive a power loss, and reads that are retried when a file system fails briefly."""

import errno
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

T = TypeVar("T")
RETRY_SECONDS = (0.1, 0.5, 2.0)
"""Seconds to wait before each retry of a read: a network file system may return ESTALE or EIO briefly."""
_SPECIAL = {stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket", stat.S_ISCHR: "device", stat.S_ISBLK: "device"}
_FINAL = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)  # a retry would not help


def retried(read: Callable[[], T]) -> T:
    """Returns the result of `read`; on an error, tries again after each of RETRY_SECONDS.

    Raises: OSError: the file does not exist, may not be read, or the last try failed.
    """
    for seconds in RETRY_SECONDS:
        try:
            return read()
        except _FINAL:
            raise
        except OSError:
            time.sleep(seconds)
    return read()


def refuse_special(path: Path) -> None:
    """Rejects files that may block a reader forever. Accepts missing paths and folders: the caller's open reports them.

    Raises: OSError: the path is a pipe, socket or device. The pipe of a shell's process substitution, `<(...)`, is
      accepted.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    kind = next((kind for test, kind in _SPECIAL.items() if test(mode)), None)
    if kind and not (kind == "pipe" and str(path).startswith(("/dev/fd/", "/proc/self/fd/", "/dev/stdin"))):
        raise OSError(errno.EINVAL, f"this is a {kind}; expected a file", str(path))


def is_folder(path: Path) -> bool:
    """Whether the path is a folder. Raises: OSError: it cannot be looked up; `Path.is_dir` would return False."""
    try:
        return stat.S_ISDIR(retried(lambda: os.stat(path)).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def anchored(path: str) -> str:
    """Makes the path of an existing folder absolute. Returns other texts, such as hub names, unchanged.

    The working directory may change during a run: a reward in a thread of this process may set it.
    """
    folder = os.path.expanduser(path)
    return os.path.abspath(folder) if path and os.path.isdir(folder) else path


def names_in(folder: Path) -> list[str]:
    """The sorted names in a folder; empty if it does not exist. Raises: OSError: it cannot be listed."""
    try:
        return sorted(retried(lambda: os.listdir(folder)))
    except FileNotFoundError:
        return []


def tree(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns the sorted files in a folder and its subfolders, and all these folders, with `folder` first.

    Raises: OSError: a folder cannot be listed; `Path.rglob` would leave it out.
    """
    files: list[Path] = []
    folders: list[Path] = []
    for directory, _, names in os.walk(folder, onerror=_raised):
        folders.append(Path(directory))
        files += [Path(directory, name) for name in names]
    return sorted(files), folders


def _raised(error: OSError) -> None:
    raise error


def write_synced(path: Path, content: bytes) -> None:
    """Replaces a file atomically: writes another file, syncs and renames it. A power loss leaves the old or the new."""
    aside = path.with_name(f".{path.name}.aside")
    with aside.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    aside.rename(path)
    sync_folder(path.parent)


def make_synced(folder: Path) -> None:
    """Creates a folder and its missing parents, so that they survive a power loss."""
    if is_folder(folder):
        return
    make_synced(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_tree(folder: Path) -> None:
    """Syncs a folder, its name and everything in it, written by another library, to disk."""
    files, folders = tree(folder)
    for path in files:
        with path.open("rb") as f:
            os.fsync(f.fileno())
    for path in folders:
        sync_folder(path)
    sync_folder(folder.absolute().parent)


def sync_folder(folder: Path) -> None:
    """Syncs the names in a folder to disk. Does nothing if the file system cannot sync folders."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def is_at(file: IO[Any] | int, path: Path) -> bool:
    """Whether an open file or folder (by its descriptor) is still the one at a path: not moved, removed or replaced.

    Raises: OSError: the path cannot be looked up.
    """
    opened = os.fstat(file if isinstance(file, int) else file.fileno())
    try:
        at_path = retried(lambda: os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (at_path.st_dev, at_path.st_ino) == (opened.st_dev, opened.st_ino)


def without_locks(path: Path, error: OSError) -> str:
    """The error message for a file system without locks.

    Args:
      error: raised by `lock`.
    """
    return (
        f"{path} is on a file system without file locks (flock: {error.strerror or error}), so that a second process"
        " could write to it unnoticed; mount it with locks (Lustre: -o flock; NFS: lock service), or choose another"
        " disk"
    )


def lock(file: IO[Any]) -> None:
    """Takes the file's advisory lock until the file is closed. Does nothing on a system without fcntl.

    Raises: BlockingIOError: another process has the lock. OSError: the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(e.errno, e.strerror) from e
        raise


class UnwritableError(RuntimeError):
    """A result cannot be written; the message says where and why."""


_SAYS = re.compile(r"\(os error (\d+)\)|\bcode: (\d+)|\[Errno (\d+)\]")
_TEXTS = {
    number: os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
}


def unwritable(error: Exception) -> str:
    """Why a file could not be written, and what to do; empty if the error is not about writing.

    Writers in other languages, such as that of safetensors, give only the system's error text.
    """
    number, text = getattr(error, "errno", None), str(error)
    if number is None and (match := _SAYS.search(text)):
        number = int(next(filter(None, match.groups())))
    if number is None:
        number = next((number for number, known in _TEXTS.items() if known in text), None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free space and run again"
    if number == errno.EFBIG:
        return "a file may not grow this large here: check ulimit -f and the file system, then run again"
    if isinstance(error, OSError) or number in _TEXTS:
        return os.strerror(number) if number else text
    return ""

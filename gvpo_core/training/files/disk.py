"""Writes that survive a power loss, and reads that are tried again where a file system fails for a moment."""

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
"""Waits before a failed read is tried again: a network file system answers ESTALE or EIO for a moment."""
_SPECIAL = {stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket", stat.S_ISCHR: "device", stat.S_ISBLK: "device"}
_ANSWERS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)  # no failures: nothing to retry


def retried(read: Callable[[], T]) -> T:
    """What `read` returns, tried again after each of RETRY_SECONDS.

    Raises: OSError: the file is not there or may not be read, or the last try failed.
    """
    for seconds in RETRY_SECONDS:
        try:
            return read()
        except _ANSWERS:
            raise
        except OSError:
            time.sleep(seconds)
    return read()


def refuse_special(path: Path) -> None:
    """Rejects files whose reading may never begin or end. Missing paths and folders are left to the caller's open.

    Raises: OSError: the path is a pipe, socket or device. A pipe of a shell's process substitution, `<(...)`, is
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
    """Whether a folder is there. Raises: OSError: unknown; `Path.is_dir` would return False."""
    try:
        return stat.S_ISDIR(retried(lambda: os.stat(path)).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def anchored(path: str) -> str:
    """The absolute path of a folder that is there; other texts, as names of the hub, are unchanged.

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
    """The files in a folder and in those below it, sorted, and all these folders, itself first.

    Raises: OSError: one cannot be listed; `Path.rglob` would leave it out.
    """
    files: list[Path] = []
    folders: list[Path] = []
    for at, _, names in os.walk(folder, onerror=_raised):
        folders.append(Path(at))
        files += [Path(at, name) for name in names]
    return sorted(files), folders


def _raised(error: OSError) -> None:
    raise error


def write_synced(path: Path, content: bytes) -> None:
    """Replaces a file in one move: written aside, synced, renamed. After a power loss it is the old or the new one."""
    aside = path.with_name(f".{path.name}.aside")
    with aside.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    aside.rename(path)
    sync_folder(path.parent)


def make_synced(folder: Path) -> None:
    """Makes a folder and those above it that are missing, so that they outlive a power loss."""
    if is_folder(folder):
        return
    make_synced(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_tree(folder: Path) -> None:
    """Makes all that other libraries wrote into a folder durable, with its own name."""
    files, folders = tree(folder)
    for path in files:
        with path.open("rb") as f:
            os.fsync(f.fileno())
    for path in folders:
        sync_folder(path)
    sync_folder(folder.absolute().parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable; nothing where the file system has no sync of folders."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def is_at(file: IO[Any] | int, path: Path) -> bool:
    """Whether an open file or folder (its descriptor) is the one at a path now: neither moved, removed nor replaced.

    Raises: OSError: unknown, as the path cannot be looked up.
    """
    own = os.fstat(file if isinstance(file, int) else file.fileno())
    try:
        there = retried(lambda: os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)


def without_locks(path: Path, error: OSError) -> str:
    """The message for a file or folder whose file system has no locks, where `lock` raised the error."""
    return (
        f"{path} is on a file system without file locks (flock: {error.strerror or error}), so that a second process"
        " could write to it unnoticed; mount it with locks (Lustre: -o flock; NFS: lock service), or choose another"
        " disk"
    )


def lock(file: IO[Any]) -> None:
    """Takes the file's advisory lock until it is closed; does nothing on a system without such locks.

    Raises: BlockingIOError: another process has it. OSError: the file system has no locks.
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
    """A result that cannot be written; the message says where and why."""


_SAYS = re.compile(r"\(os error (\d+)\)|\bcode: (\d+)|\[Errno (\d+)\]")
_TEXTS = {
    number: os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
}


def unwritable(error: Exception) -> str:
    """Why a file could not be written, and what to do; empty where the error is not about that.

    Writers in other languages, as that of safetensors, give the system's text alone.
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

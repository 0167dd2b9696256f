"""A file system that forgets at a power loss whatever was not synced.

Records a program's syncs, renames, new and removed files in one folder, and keeps before each of them what a power loss
there would leave, in two kinds. Both keep only the synced content of files. "content": names are as they were at that
moment, as on a journalling file system, so that a file renamed without a sync has 0 bytes. "names": a folder has the
names that it had when it was last synced itself.
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

KINDS = ("content", "names")
_EVENTS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
State = Mapping[str, bytes | None]  # relative path -> content; None: a folder


class Disk:
    """What is on the disk under a folder, and the states that power losses leave."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.states: dict[str, list[State]] = {kind: [] for kind in KINDS}
        self._content: dict[int, bytes] = {}  # inode -> content when it was last synced
        self._names: dict[int, dict[str, int]] = {}  # folder's inode -> name -> inode, when it was last synced
        self._folders: set[int] = set()

    @contextmanager
    def recording(self) -> Iterator["Disk"]:
        """Inside `with`, calls of `os` are recorded; what is there before is on the disk."""
        for path, folders, files in os.walk(self.root):
            for name in (".", *folders):
                self._synced(os.stat(os.path.join(path, name)), os.path.join(path, name))
            for name in files:
                self._synced(os.stat(os.path.join(path, name)), os.path.join(path, name))
        real = {name: getattr(os, name) for name in _EVENTS}
        for name in _EVENTS:
            setattr(os, name, self._recorded(real[name], sync=name == "fsync"))
        try:
            yield self
            self._keep()
        finally:
            for name in _EVENTS:
                setattr(os, name, real[name])

    def _recorded(self, call: Callable, *, sync: bool) -> Callable:
        def recorded(first, *args, **options):
            self._keep()
            result = call(first, *args, **options)
            if sync:
                self._synced(os.fstat(first), f"/proc/self/fd/{first}")
            return result

        return recorded

    def _synced(self, known: os.stat_result, path: str) -> None:
        if stat.S_ISDIR(known.st_mode):
            self._names[known.st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
        elif stat.S_ISREG(known.st_mode):
            self._is_file(known.st_ino)
            self._content[known.st_ino] = Path(path).read_bytes()

    def _is_file(self, inode: int) -> None:
        """Forgets a removed folder whose inode a file has now."""
        self._folders.discard(inode)
        self._names.pop(inode, None)

    def _keep(self) -> None:
        found: dict[str, bytes | None] = {}
        for path, folders, files in os.walk(self.root):
            here = os.path.relpath(path, self.root)
            for name in folders:
                self._folders.add(os.stat(os.path.join(path, name)).st_ino)
                found[os.path.normpath(os.path.join(here, name))] = None
            for name in files:
                whole = os.path.join(path, name)
                self._is_file(os.stat(whole).st_ino)
                content, synced = Path(whole).read_bytes(), self._content.get(os.stat(whole).st_ino, b"")
                appended = content.startswith(synced) or synced.startswith(content)
                found[os.path.normpath(os.path.join(here, name))] = (
                    synced if appended else b""
                )  # rewritten in place: nothing is sure
        for kind, state in (("content", found), ("names", self._durable(os.stat(self.root).st_ino, "."))):
            if not self.states[kind] or self.states[kind][-1] != state:
                self.states[kind].append(state)

    def _durable(self, folder: int, here: str) -> dict[str, bytes | None]:
        found: dict[str, bytes | None] = {}
        for name, inode in self._names.get(folder, {}).items():
            path = os.path.normpath(os.path.join(here, name))
            if inode in self._names or inode in self._folders:
                found[path] = None
                found |= self._durable(inode, path)
            else:
                found[path] = self._content.get(inode, b"")
        return found


def files_of(folder: Path) -> State:
    """The state of a folder of which everything is on the disk."""
    found: dict[str, bytes | None] = {}
    for path in folder.rglob("*"):
        found[path.relative_to(folder).as_posix()] = None if path.is_dir() else path.read_bytes()
    return found


def write(state: State, folder: Path) -> None:
    """Makes `folder` what a state says."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in state.items():
        path = folder / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

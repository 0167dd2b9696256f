"""Git LFS pointers: the small text files that replace large ones in a clone without git-lfs."""

from pathlib import Path

_BEGINS = b"version https://git-lfs.github.com/spec/"


def is_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer. False if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(_BEGINS)) == _BEGINS
    except OSError:
        return False


def pointer_message(path: Path) -> str:
    """The error message for a Git LFS pointer."""
    return f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in {path.parent}, or download it"

"""Output that does not stop a run when its reader exits, its disk is full or its terminal is closed."""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

from gvpo_core.training.terminal.text import printable


def open_standard_descriptors() -> None:
    """Opens the descriptors 0, 1 and 2 on the null device if they are closed.

    Otherwise the next file or pipe gets the number of a standard stream: prints would go into it, and new processes
    would start without it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one


NARROW = 80  # columns of lines outside a terminal; the minimum in a terminal


def line_width(stream: Any) -> int:
    """Columns of a line on the stream: in a terminal its width, but at least 80; elsewhere 80."""
    return max(NARROW, shutil.get_terminal_size().columns) if Forgiving(stream).isatty() else NARROW


class Forgiving:
    """Wraps a text stream and drops what the stream cannot write. Other attributes are those of the stream.

    Args:
      stream: anything with `write`; None if the program has no standard output.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """See TextIO.write."""
        with _suppressed():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """See TextIO.writelines."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """See TextIO.flush."""
        with _suppressed():
            self._stream.flush()

    def isatty(self) -> bool:
        """See TextIO.isatty. False if the stream has no such method."""
        with _suppressed():
            return bool(self._stream.isatty())
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_PROGRESS_BAR = re.compile("(\x1b\\[[0-9;]*[AKm]|\r)")
"""Control sequences of progress bars: cursor up, erase to the end of the line, style, and carriage return."""


class Printable(Forgiving):
    """A forgiving stream that also escapes control characters: warnings quote text of files, servers and models."""

    def write(self, text: str) -> int:
        """See TextIO.write. Colors and progress bars are not escaped in a terminal, nor "\\r" in a file."""
        if not isinstance(text, str):
            return super().write(text)
        if self.isatty():
            shown = "".join(
                part if i % 2 else printable(part, keep="\n\t") for i, part in enumerate(_PROGRESS_BAR.split(text))
            )
        else:
            shown = printable(text, keep="\n\t\r")
        super().write(shown)
        return len(text)


def _suppressed() -> contextlib.suppress:
    # RuntimeError: a signal handler writes during another write. ValueError: the stream was closed.
    # AttributeError: the stream lacks a method, or is None. TypeError: a stream of bytes. LookupError: an encoding
    # that Python does not have.
    return contextlib.suppress(AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def forgiving_stderr() -> Iterator[None]:
    """Inside `with`, drops what standard error cannot write, and escapes control characters.

    Python's logging raises if its stream is closed or of another kind.
    """
    original_stream = sys.stderr
    sys.stderr = cast(TextIO, Printable(original_stream))
    try:
        yield
    finally:
        sys.stderr = original_stream


class OutputError(RuntimeError):
    """A result could not be printed."""


def encodable(text: str, stream: Any) -> str:
    r"""The text with characters that the stream's encoding lacks as escapes like \xe4; also lone surrogates."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with contextlib.suppress(LookupError):  # an encoding that Python does not have
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


def say(text: object) -> None:
    """Prints a command's result. Raises: OutputError: standard output cannot be written."""
    with refusing_output():
        print(encodable(printable(str(text), keep="\n\t"), sys.stdout), flush=True)


def show_progress(text: object) -> None:
    """Prints progress. Continues without an error if standard output cannot be written."""
    print(encodable(printable(str(text), keep="\n\t"), sys.stdout), file=Forgiving(sys.stdout), flush=True)


@contextlib.contextmanager
def refusing_output() -> Iterator[None]:
    """Wraps code that only prints. A reader that closes the pipe early, such as `head`, is no error.

    Raises: OutputError: standard output cannot be written.
    """
    try:
        yield
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # otherwise Python's flush at exit fails
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:
        raise OutputError(f"cannot write to standard output: {e.strerror or e}") from e


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Inside `with`, makes the standard streams of a command safe.

    Text for a closed stream is dropped. Standard error also drops what it cannot write, so that an error keeps its
    exit status, and escapes control characters. Afterwards, Python's flush at exit cannot fail.
    """
    original_streams = sys.stdout, sys.stderr
    open_standard_descriptors()
    with open(os.devnull, "w") as null_stream:
        sys.stdout = null_stream if original_streams[0] is None else original_streams[0]
        sys.stderr = cast(TextIO, Printable(null_stream if original_streams[1] is None else original_streams[1]))
        try:
            yield
        finally:
            sys.stdout, sys.stderr = original_streams
            for stream in original_streams:
                _flush_or_drop(stream)


def _flush_or_drop(stream: Any) -> None:
    """Flushes a stream, or drops what it cannot write. Otherwise Python would fail at exit, with its own status."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            null_device = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null_device, stream.fileno())
            os.close(null_device)
    except (ValueError, AttributeError):  # closed, or never there
        pass

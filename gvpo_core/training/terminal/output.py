"""Standard output whose reader may go away, a full disk behind it, or a terminal that is closed: no reason to stop."""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

from gvpo_core.training.terminal.text import printable


def open_standard_descriptors() -> None:
    """Opens the descriptors 0, 1 and 2 on the null device where they are closed.

    Otherwise the next file or pipe that is opened gets the number of a standard stream: prints go into it, and a
    process that starts with it has it closed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one


NARROW = 80  # columns of lines that go to no terminal, and the fewest of those that do


def line_width(stream: Any) -> int:
    """Columns of a line on the stream: the terminal's, at least 80; 80 elsewhere."""
    return max(NARROW, shutil.get_terminal_size().columns) if Forgiving(stream).isatty() else NARROW


class Forgiving:
    """A text stream that drops what it cannot write; everything else is the stream's own.

    Args:
      stream: anything with `write`, or None: a program without standard output.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """See TextIO.write."""
        with _forgiven():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """See TextIO.writelines."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """See TextIO.flush."""
        with _forgiven():
            self._stream.flush()

    def isatty(self) -> bool:
        """See TextIO.isatty. False for a stream that does not say."""
        with _forgiven():
            return bool(self._stream.isatty())
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_BAR = re.compile("(\x1b\\[[0-9;]*[AKm]|\r)")
"""What progress bars write: the line above, the rest of the line erased, a style; and the line from its start."""


class Printable(Forgiving):
    """A text stream that also escapes what commands a terminal: libraries' warnings quote files, servers and models."""

    def write(self, text: str) -> int:
        """See TextIO.write. A terminal gets colors and progress bars as they are, and a file "\\r"."""
        if not isinstance(text, str):
            return super().write(text)
        if self.isatty():
            shown = "".join(part if i % 2 else printable(part, keep="\n\t") for i, part in enumerate(_BAR.split(text)))
        else:
            shown = printable(text, keep="\n\t\r")
        super().write(shown)
        return len(text)


def _forgiven() -> contextlib.suppress:
    # RuntimeError: a signal's handler writes while the stream is being written. ValueError: the stream was closed.
    # AttributeError: a stream with few methods, or none. TypeError: a stream of bytes. LookupError: an encoding that
    # Python does not have.
    return contextlib.suppress(AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def forgiving_stderr() -> Iterator[None]:
    """Drops what standard error cannot take: Python's logging raises where its stream is closed or of another kind.

    What commands a terminal is escaped.
    """
    given = sys.stderr
    sys.stderr = cast(TextIO, Printable(given))
    try:
        yield
    finally:
        sys.stderr = given


class OutputError(RuntimeError):
    """A result that could not be printed."""


def encodable(text: str, stream: Any) -> str:
    r"""The text with what the stream's encoding does not have as escapes, as \xe4; a lone surrogate among them."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with contextlib.suppress(LookupError):  # an encoding that Python does not have
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


def say(text: object) -> None:
    """Prints a command's result. Raises: OutputError: standard output cannot be written."""
    with refusing_output():
        print(encodable(printable(str(text), keep="\n\t"), sys.stdout), flush=True)


def show_progress(text: object) -> None:
    """Prints what work under way has come to; a stream that cannot take it does not stop the work."""
    print(encodable(printable(str(text), keep="\n\t"), sys.stdout), file=Forgiving(sys.stdout), flush=True)


@contextlib.contextmanager
def refusing_output() -> Iterator[None]:
    """Around what prints alone; a reader that has seen enough, as `head`, is no error.

    Raises: OutputError: standard output cannot be written.
    """
    try:
        yield
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # else Python fails to flush what is left, at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:
        raise OutputError(f"cannot write to standard output: {e.strerror or e}") from e


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Inside `with`, the standard streams of a command: text for one that is closed goes nowhere, and standard error
    drops what it cannot take, so that an error keeps its exit status, and escapes what commands a terminal. Afterwards
    nothing is left to fail at the exit.
    """
    before = sys.stdout, sys.stderr
    open_standard_descriptors()
    with open(os.devnull, "w") as nowhere:
        sys.stdout = nowhere if before[0] is None else before[0]
        sys.stderr = cast(TextIO, Printable(nowhere if before[1] is None else before[1]))
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for stream in before:
                _let_go(stream)


def _let_go(stream: Any) -> None:
    """Drops what a stream holds and cannot write: else Python would fail at its exit, with its own status."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
    except (ValueError, AttributeError):  # closed, or never there
        pass

"""`train` from Python where a notebook, a service or a test runner has replaced the standard streams."""

import io
import json
import logging
import subprocess
import sys
import threading
import warnings

import pytest
import table_run

from gvpo_core.training.config.file import read_config
from gvpo_core.training.loop import train
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.terminal.output import Printable, forgiving_stderr, standard_streams

pytestmark = pytest.mark.core

pytest.importorskip("tomli_w")  # the run folder's config.toml is written with it


class Odd:
    """A stream with another encoding than its name says."""

    encoding = "no-such-codec"

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def detached() -> io.TextIOWrapper:
    stream = io.TextIOWrapper(io.BytesIO())
    stream.detach()
    return stream


STREAMS = {
    "none": lambda: None,
    "closed": closed,
    "detached": detached,
    "bytes": io.BytesIO,
    "unknown encoding": Odd,
    "without methods": object,
    "strict ASCII": lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
}


def some_unscored(completions: list[str]) -> list[float | None]:
    return [1.0 if i else None for i, _ in enumerate(completions)]


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_run_trains_and_warns_on_every_stream(name, kind, tmp_path, monkeypatch):
    config = read_config(table_run.make(tmp_path, steps=1))
    policy = TablePolicy(json.loads((tmp_path / "table.json").read_text()), config.optimizer, updates=config.updates)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a program that set up no logging
    stream = STREAMS[kind]()
    monkeypatch.setattr(sys, name, stream)
    rows = [{"prompt": "p0", "answer": "a"}, {"prompt": "p1", "answer": "ünï"}]
    result = train(config, policy, train_rows=rows, rewards={"right": some_unscored})
    assert getattr(sys, name) is stream, "it is put back"
    kinds = [json.loads(line)["kind"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert "train" in kinds


@pytest.mark.parametrize("closed_ones", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_standard_stream(closed_ones, tmp_path):
    code = (
        "import os, sys\n"
        "from gvpo_core.training.terminal.output import open_standard_descriptors\n"
        "open_standard_descriptors()\n"
        f"number = os.open({str(tmp_path / 'opened')!r}, os.O_CREAT | os.O_WRONLY)\n"
        "os.write(number, b'%d' % number)\n"
        "os.system('echo a child says this; echo and this >&2')\n"
    )
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {closed_ones}', sys.executable, code], capture_output=True, timeout=120
    )
    assert done.returncode == 0
    assert int((tmp_path / "opened").read_text()) > 2


ODD = "a\x1b]52;c;aGk=\x07\x9b31m\u202eb"


def fail() -> None:
    raise ValueError(ODD)


class Fails:
    def __del__(self) -> None:
        fail()


def in_a_thread() -> None:
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()


def logged_by_its_own_handler() -> None:
    own = logging.Logger("own")
    own.addHandler(logging.StreamHandler())
    own.warning(ODD)


SAYINGS = {
    "warning": lambda: warnings.warn(ODD, stacklevel=1),
    "thread": in_a_thread,
    "destructor": lambda: bool(Fails()),
    "log": logged_by_its_own_handler,
    "print": lambda: print(ODD, file=sys.stderr),
    "lines": lambda: sys.stderr.writelines([ODD, "\n"]),
}


@pytest.mark.parametrize("during", [standard_streams, forgiving_stderr])
@pytest.mark.parametrize("saying", SAYINGS)
@pytest.mark.filterwarnings("always", "ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nothing_that_a_library_writes_to_stderr_commands_a_terminal(saying, during, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # not the test runner's
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    monkeypatch.setattr(warnings, "showwarning", _showwarning)
    with during():
        SAYINGS[saying]()
    assert r"a\x1b]52;c;aGk=\x07\x9b31m\u202eb" in stream.getvalue()
    assert not set("\x1b\x07\x9b\u202e") & set(stream.getvalue())


def _showwarning(message, category, filename, lineno, file=None, line=None):
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def test_a_progress_bar_on_a_terminal_stays_one():
    stream = io.StringIO()
    stream.isatty = lambda: True
    bar = "\r\x1b[32m 50%\x1b[0m\x1b[K\n\x1b[A"
    Printable(stream).write(bar + "\x1b]52;c;aGk=\x07\x1b[2J")
    assert stream.getvalue() == bar + r"\x1b]52;c;aGk=\x07\x1b[2J"

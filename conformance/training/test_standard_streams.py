"""`train` from Python where a notebook, a service or a test runner has replaced the standard streams."""

import io
import json
import logging
import subprocess
import sys

import pytest
import table_run

from gvpo_core.training.config.file import read_config
from gvpo_core.training.loop import train
from gvpo_core.training.policy.table import TablePolicy

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

"""Writes a run as one self-contained HTML page: `write_report(RUN)`. Also works for runs in progress or crashed ones.

`write_comparison(RUNS, FILE)` compares several runs on one page.
"""

from collections.abc import Sequence
from pathlib import Path

from gvpo_core.training.files.disk import write_synced
from gvpo_core.training.report.compare import comparison
from gvpo_core.training.report.page import page
from gvpo_core.training.report.read import read_run

__all__ = ["write_comparison", "write_report"]


def write_report(run: Path) -> Path:
    """Writes RUN/report.html from the files of the run folder; returns its path.

    Raises: FileNotFoundError: not a run folder. OSError: the page cannot be written.
    """
    path = run / "report.html"
    write_synced(path, page(read_run(run)).encode("utf-8", "replace"))
    return path


def write_comparison(runs: Sequence[Path], path: Path) -> Path:
    """Writes a page that compares several runs to `path`, and returns `path`.

    Raises: FileNotFoundError: a folder is not a run folder. ConfigError: the runs have different rewards. OSError: the
      page cannot be written.
    """
    write_synced(path, comparison([read_run(run) for run in runs]).encode("utf-8", "replace"))
    return path

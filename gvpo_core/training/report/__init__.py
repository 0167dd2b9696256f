"""A run as one self-contained HTML page: `write_report(RUN)`; works on runs that are still going or crashed."""

from pathlib import Path

from gvpo_core.training.files.disk import write_synced
from gvpo_core.training.report.page import page
from gvpo_core.training.report.read import read_run

__all__ = ["write_report"]


def write_report(run: Path) -> Path:
    """Writes RUN/report.html from what the folder holds; returns its path.

    Raises: FileNotFoundError: not a run folder. OSError: the page cannot be written.
    """
    path = run / "report.html"
    write_synced(path, page(read_run(run)).encode("utf-8", "replace"))
    return path

"""`gvpo report`: writes the page of one run, or one page that compares several."""

from pathlib import Path

from gvpo_core.training.cli.parser import Parser
from gvpo_core.training.config import ConfigError
from gvpo_core.training.report import write_comparison, write_report
from gvpo_core.training.report.compare import MOST
from gvpo_core.training.terminal.output import OutputError, say


def report(arguments: list[str]) -> int:
    """Writes the page and prints its path; returns the exit status.

    Raises: ConfigError: a folder that is not a run, a folder given twice, too many folders. OutputError: the page
      cannot be written.
    """
    parser = Parser(
        prog="gvpo report", description="Writes RUN/report.html; of several runs, one page that compares them."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, help="file of the comparison. Default: comparison.html")
    options = parser.parse_args(arguments)
    runs: list[Path] = options.runs
    if wrong := [run for run in runs if not (run / "metrics.jsonl").is_file()]:
        problems = [f"{run} is not a run folder: it has no metrics.jsonl" for run in wrong]
        raise ConfigError("; ".join(problems))
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError(f"a run is given twice: {', '.join(map(str, runs))}; give each one once")
    if len(runs) > MOST:
        raise ConfigError(f"{len(runs)} runs; a page compares at most {MOST}")
    if options.out and len(runs) == 1:
        raise ConfigError("--out is for a comparison; the report of one run is RUN/report.html")
    path = runs[0] / "report.html" if len(runs) == 1 else options.out or Path("comparison.html")
    try:
        say(write_report(runs[0]) if len(runs) == 1 else write_comparison(runs, path))
    except OSError as e:
        raise OutputError(f"cannot write {path}: {e.strerror or e}") from e
    return 0

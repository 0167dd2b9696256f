"""A count with its bound, the modules that count, and the table of all counts."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.scale import jobs

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.json"
PAGE = FOLDER.parents[1] / "docs" / "scaling.md"


@dataclass(frozen=True)
class Count:
    """One count.

    Attributes:
      name: what is counted, for example "parameter gathers per sampled token". A ratio reads "a / b".
      job: J1 to J4 of docs/scaling.md, or the model and ranks used, for example "tiny llama, 4 ranks".
      unit: for example "GiB", or "" for a ratio or a plain number.
      before: the value without the optimization that the count protects; None if there is none.
      now: the value of this run.
      bound: the largest allowed value of `now`.
    """

    name: str
    job: str
    unit: str
    before: float | None
    now: float
    bound: float

    @property
    def within(self) -> bool:
        return self.now <= self.bound  # False for NaN


def modules(backend: str) -> list[str]:
    """Returns the names of a backend's counting modules."""
    return sorted(path.stem for path in FOLDER.glob(f"{backend}_*.py"))


def read_results() -> dict[str, list[Count]]:
    """Returns module -> the counts of its last run."""
    saved = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return {module: [Count(**count) for count in counts] for module, counts in saved.items()}


def write_results(results: dict[str, list[Count]]) -> None:
    """Saves the counts of existing modules, one count per line, and writes the tables of docs/scaling.md."""
    kept = {module: results[module] for module in sorted(results) if (FOLDER / f"{module}.py").exists()}
    parts = []
    for module, counts in kept.items():
        lines = ",\n".join(f"  {json.dumps(asdict(count))}" for count in counts)
        parts.append(f" {json.dumps(module)}: [\n{lines}\n ]")
    RESULTS.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), kept), encoding="utf-8")


def page(text: str, results: dict[str, list[Count]]) -> str:
    """Returns the page with new tables of jobs and counts. The rest is unchanged."""
    counts = [(module.partition("_")[0], count) for module in sorted(results) for count in results[module]]
    for name, table in (("jobs", jobs.table()), ("counts", markdown(counts))):
        begin, end = f"<!-- {name}: written by nox -s scale -->", f"<!-- end of {name} -->"
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"
    return text


def markdown(counts: Iterable[tuple[str, Count]]) -> str:
    """Returns a Markdown table of (backend, count)."""
    return "\n".join(_rows(counts))


def _rows(counts: Iterable[tuple[str, Count]]) -> Iterator[str]:
    yield "| backend | count | counted on | before | now | bound |"
    yield "|---|---|---|---:|---:|---:|"
    for backend, count in counts:
        before = "" if count.before is None else f"{count.before:.4g}"
        now = f"{count.now:.4g}" if count.within else f"**{count.now:.4g}**"
        name = f"{count.name}, {count.unit}" if count.unit else count.name
        yield f"| {backend} | {name} | {count.job} | {before} | {now} | {count.bound:.4g} |"

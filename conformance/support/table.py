"""Merges the results of the subject sessions into one table, subject x capability, in docs/conformance.md.

    GVPO_CONFORMANCE_RESULTS=conformance/results pytest conformance   # in each subject's environment
    python conformance/support/table.py

A cell is the number of checks that passed, or "n of m" where some failed, or empty where the subject has none.
"""

import json
import sys
from pathlib import Path
from typing import Any

from places import ROOT

START, END = "<!-- conformance:start -->", "<!-- conformance:end -->"
COLUMNS = (
    "values",
    "values compiled",
    "gradients",
    "gradients compiled",
    "float64",
    "float32",
    "bfloat16",
    "float16",
    "ragged groups",
    "padding",
    "unscored rows leave",
    "response weights (GVPO++)",
    "NaN stays in its group",
    "N = 65,536",
    "properties",
)
JOINED = ("ragged groups", "padding", "unscored rows leave", "NaN stays in its group", "N = 65,536")
ORDER = ("numpy", "array-api-strict", "torch", "jax", "mlx", "cupy")


def cell(capabilities: dict[str, dict[str, int]], column: str) -> str:
    """One subject's cell; the columns of JOINED count eager and compiled together."""
    names = (column, f"{column} compiled") if column in JOINED else (column,)
    found = [capabilities[name] for name in names if name in capabilities]
    passed, failed = (sum(x.get(outcome, 0) for x in found) for outcome in ("passed", "failed"))
    if failed:
        return f"**{passed} of {passed + failed}**"
    return str(passed) if passed else ""


def table(results: list[dict[str, Any]]) -> str:
    """The markdown table, a capability a row and a subject a column."""
    results = sorted(results, key=lambda r: ORDER.index(r["subject"]))
    lines = ["| checks passed | " + " | ".join(f"{r['subject']} {r['version']}" for r in results) + " |"]
    lines.append("|---|" + "---:|" * len(results))
    for column in COLUMNS:
        lines.append(f"| {column} | " + " | ".join(cell(r["capabilities"], column) for r in results) + " |")
    return "\n".join(lines)


def insert(text: str, content: str) -> str:
    """`text` with what stands between the markers replaced. Raises: ValueError: no markers, or not one pair."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"expected one {START} and after it one {END}")
    before, after = text.split(START)[0], text.split(END)[1]
    return f"{before}{START}\n{content}\n{END}{after}"


def main(root: Path = ROOT) -> int:
    """Writes the table into docs/conformance.md; returns the exit status."""
    files = sorted((root / "conformance" / "results").glob("*.json"))
    if not files:
        print("conformance/results holds no results; run the subject sessions first", file=sys.stderr)
        return 1
    content = table([json.loads(path.read_text(encoding="utf-8")) for path in files])
    page = root / "docs" / "conformance.md"
    page.write_text(insert(page.read_text(encoding="utf-8"), content), encoding="utf-8")
    print(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())

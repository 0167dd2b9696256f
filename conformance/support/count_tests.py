"""Adds up the JUnit reports of one run of nox: N passed, N failed, N skipped.

python conformance/support/count_tests.py [FOLDER]      default: the newest in .nox/results
"""

import sys
import xml.etree.ElementTree as xml
from pathlib import Path


def count_tests(results: Path) -> str:
    """The counts of all reports in a folder, in one line."""
    passed = failed = skipped = 0
    for report in sorted(results.glob("*.xml")):
        suite = xml.parse(report).getroot()[0]
        bad, skip = int(suite.get("failures", 0)) + int(suite.get("errors", 0)), int(suite.get("skipped", 0))
        passed, failed, skipped = passed + int(suite.get("tests", 0)) - bad - skip, failed + bad, skipped + skip
    return f"{passed} passed, {failed} failed, {skipped} skipped"


if __name__ == "__main__":
    newest = max(Path(".nox/results").iterdir(), default=None) if len(sys.argv) < 2 else Path(sys.argv[1])
    sys.exit("no test has run") if newest is None else print(count_tests(newest))

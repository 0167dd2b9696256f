"""Writes the lower end of every range in pyproject.toml as constraints of pip, a `name==version` a line.

python lower_ends.py FILE
"""

import re
import sys
import tomllib
from itertools import chain
from pathlib import Path

from places import ROOT


def ranges() -> dict[str, str]:
    """Package -> the one lower end that pyproject.toml gives it. Raises: AssertionError: it gives two."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    ends: dict[str, str] = {}
    for need in needs:
        if match := re.match(r"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)", need):
            assert ends.setdefault(match[1], match[2]) == match[2], (
                f"{match[1]} starts at {ends[match[1]]} and {match[2]}"
            )
    return ends


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(
        "".join(f"{name}=={end}\n" for name, end in sorted(ranges().items())), encoding="utf-8"
    )

"""Cost of resuming a run of 100,000 steps with 2,000,000 recorded responses, in a separate process.

    python benchmarks/long_resume.py [--steps 100000] [--responses 20]

Exits with an error above --memory GB (0.5) or --cpu seconds (30). The bound is in CPU seconds because other programs on
the machine change wall seconds more.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance" / "support"))
from long_run import long_run, resume


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--responses", type=int, default=20)
    parser.add_argument("--memory", type=float, default=0.5)
    parser.add_argument("--cpu", type=float, default=30.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        long_run(folder, arguments.steps, arguments.responses)
        cost = resume(folder, arguments.steps + 1)
    print(f"{arguments.steps:,} steps x {arguments.responses} responses: {cost.memory / 1e9:.2f} GB, ", end="")
    print(f"{cost.cpu:.1f} s of CPU, {cost.read / 1e9:.2f} GB read")
    if cost.memory / 1e9 > arguments.memory or cost.cpu > arguments.cpu:
        sys.exit("above the bound")


if __name__ == "__main__":
    main()

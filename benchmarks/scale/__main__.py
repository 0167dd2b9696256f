"""Counts what a backend costs at scale, prints the table of all backends, and fails if a count exceeds its bound.

python -m benchmarks.scale torch            all modules of a backend
python -m benchmarks.scale torch_sampling   one of them
python -m benchmarks.scale                  the table of the saved counts, without counting
"""

import importlib
import json
import subprocess
import sys
from dataclasses import asdict

from benchmarks.scale.table import FOLDER, Count, markdown, modules, read_results, write_results

ROOT = FOLDER.parents[1]


def count(module: str) -> list[Count] | None:
    """Returns a module's counts from a separate process, which has its own settings and memory; None if it failed."""
    command = [sys.executable, "-m", "benchmarks.scale", "--in-this-process", module]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    print("\n".join(line for line in lines if not line.startswith('{"name"')), end="\n" if lines else "")
    if done.returncode:
        print(f"{module} failed with status {done.returncode}", file=sys.stderr)
        return None
    return [Count(**json.loads(line)) for line in lines if line.startswith('{"name"')]


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--in-this-process"]:
        for counted in importlib.import_module(f"benchmarks.scale.{arguments[1]}").counts():
            print(json.dumps(asdict(counted)), flush=True)
        return 0
    known = sorted({path.stem for path in FOLDER.glob("*_*.py")} - {"__init__", "__main__"})
    chosen = [name for word in arguments for name in ([word] if word in known else modules(word))]
    if unknown := [word for word in arguments if word not in known and not modules(word)]:
        print(f"nothing to count for {', '.join(unknown)}; expected a backend or one of {known}", file=sys.stderr)
        return 2
    results, failed = read_results(), []
    for module in chosen:
        if (counts := count(module)) is None:
            failed.append(module)
        elif not counts:
            print(f"{module} counted nothing", file=sys.stderr)
            failed.append(module)
        else:
            results[module] = counts
    if chosen:
        write_results(results)
    shown = [(module.partition("_")[0], counted) for module in sorted(results) for counted in results[module]]
    print(markdown(shown))
    beyond = [counted.name for module in chosen or results for counted in results.get(module, []) if not counted.within]
    for name in beyond:
        print(f"beyond its bound: {name}", file=sys.stderr)
    return 1 if beyond or failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

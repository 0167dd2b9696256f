"""Demo of episodes from end to end: makes the model and the games, trains, and prints the result.

    python examples/guess_number/demo.py [--backend torch|jax|mlx] [--steps N]

Run it from the root of the repository. Other options are passed to `gvpo train`.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from prepare import prepare

from gvpo_core.training import cli

CONFIG = Path(__file__).parent / "config.toml"


def main() -> int:
    parser = argparse.ArgumentParser(description="GVPO teaches a tiny random model to find a number by hints.")
    parser.add_argument("--backend", choices=("torch", "jax", "mlx"), default="torch", help="default: torch")
    parser.add_argument("--steps", type=int, default=0, help="training steps; default: config.toml")
    parser.add_argument(
        "--run", type=Path, default=None, help="run folder, replaced if it exists; default: runs/guess-BACKEND"
    )
    options, others = parser.parse_known_args()
    run = options.run or Path(f"runs/guess-{options.backend}")
    start = time.monotonic()
    if (run / "metrics.jsonl").exists():
        print(f"removing the earlier demo in {run}")
        shutil.rmtree(run)
    prepare()
    arguments = ["train", str(CONFIG), "--run.folder", str(run), "--run.backend", options.backend]
    arguments += ["--run.steps", str(options.steps)] if options.steps else []
    if status := cli.main([*arguments, *others]):
        return status
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [record for record in records if record["kind"] == "eval"]
    before, after = evaluations[0], evaluations[-1]
    print(f"games won: {won(before):.2f} before, {won(after):.2f} after training; the best possible is 0.78")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes in all")
    return 0


def won(record: dict[str, float]) -> float:
    """Returns the share of games that ended. All others were cut after three guesses."""
    return 1 - record["eval/truncated"]


if __name__ == "__main__":
    sys.exit(main())

"""The small demo from end to end: makes the model and the prompts, trains, and prints the result.

    python examples/ascending_letters/demo.py [--backend torch|jax|mlx] [--steps N]

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
    parser = argparse.ArgumentParser(description="GVPO teaches a tiny random model the order of letters.")
    parser.add_argument("--backend", choices=("torch", "jax", "mlx"), default="torch", help="default: torch")
    parser.add_argument("--steps", type=int, default=0, help="training steps; default: config.toml")
    parser.add_argument(
        "--run", type=Path, default=None, help="run folder, replaced if it exists; default: runs/letters-BACKEND"
    )
    options, others = parser.parse_known_args()
    run = options.run or Path(f"runs/letters-{options.backend}")
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
    print(f"reward on {after['eval/prompts']} held-out prompts: {shown(before)} before, {shown(after)} after training")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes in all")
    return 0


def shown(record: dict[str, float]) -> str:
    """Returns the mean reward with the half-width of its 95 % interval."""
    half = record["eval/half_width"]
    return f"{record['eval/reward']:.3f} +- {half:.3f}"


if __name__ == "__main__":
    sys.exit(main())

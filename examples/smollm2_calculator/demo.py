"""Demo of a tool from end to end: makes the model and the problems, trains, and prints the result.

    python examples/smollm2_calculator/demo.py [--backend torch|jax|mlx] [--steps N] [--held-out N]

Run it from the root of the repository. Other options are passed to `gvpo train`.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

from prepare import prepare

from gvpo_core.training import cli

CONFIG = Path(__file__).parent / "config.toml"


def main() -> int:
    parser = argparse.ArgumentParser(description="GVPO teaches SmolLM2-135M-Instruct to use a calculator.")
    parser.add_argument("--backend", choices=("torch", "jax", "mlx"), default="torch", help="default: torch")
    parser.add_argument("--steps", type=int, default=0, help="training steps; default: config.toml")
    parser.add_argument("--held-out", type=int, default=0, help="held-out problems used; default: config.toml")
    parser.add_argument(
        "--run", type=Path, default=None, help="run folder, replaced if it exists; default: runs/calculator-BACKEND"
    )
    options, others = parser.parse_known_args()
    os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars of libraries; the run has its own
    run = options.run or Path(f"runs/calculator-{options.backend}")
    start = time.monotonic()
    if (run / "metrics.jsonl").exists():
        print(f"removing the earlier demo in {run}")
        shutil.rmtree(run)
    prepare()
    arguments = ["train", str(CONFIG), "--run.folder", str(run), "--run.backend", options.backend]
    arguments += ["--run.steps", str(options.steps)] if options.steps else []
    arguments += ["--evaluation.prompts", str(options.held_out)] if options.held_out else []
    if status := cli.main([*arguments, *others]):
        return status
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    before, *_, after = [record for record in records if record["kind"] == "eval"]
    accuracies = [f"{record['eval/reward']:.3f} +- {record['eval/half_width']:.3f}" for record in (before, after)]
    print(f"right answers on {after['eval/prompts']} held-out products: {accuracies[0]} before, {accuracies[1]} after")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())

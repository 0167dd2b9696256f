"""The demo from end to end: makes the model and the problems, trains, and prints the result.

    python examples/smollm2_arithmetic/demo.py [--backend torch|jax|mlx] [--steps N] [--held-out N]

Other options are passed to `gvpo train`. A stopped demo resumes. A finished one is replaced.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from prepare import prepare

from gvpo_core.training import cli
from gvpo_core.training.config.file import read_config
from gvpo_core.training.report.figure import reward_curve_png

CONFIG = Path(__file__).parent / "config.toml"


def main() -> int:
    steps = read_config(CONFIG).run.steps
    parser = argparse.ArgumentParser(description="GVPO teaches SmolLM2-135M-Instruct sums.")
    parser.add_argument("--backend", choices=("torch", "jax", "mlx"), default="torch", help="default: torch")
    parser.add_argument("--steps", type=int, default=steps, help=f"training steps; default: {steps}")
    parser.add_argument("--held-out", type=int, default=0, help="held-out problems used; default: all")
    options, others = parser.parse_known_args()
    if options.steps < 1 or options.held_out < 0:
        parser.error(f"--steps {options.steps} --held-out {options.held_out}; expected at least 1 and at least 0")
    os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars of libraries; the run has its own
    start = time.monotonic()
    name = "demo" if options.backend == "torch" else f"demo-{options.backend}"
    run = Path(f"runs/{name}" if options.steps == steps else f"runs/{name}-{options.steps}-steps")
    if len(evaluations(run)) >= 2:
        print(f"removing the finished demo in {run}")
        shutil.rmtree(run)
    prepare()
    print()
    arguments = ["train", str(CONFIG), "--run.folder", str(run), "--run.steps", str(options.steps)]
    arguments += ["--run.backend", options.backend, "--evaluation.prompts", str(options.held_out), *others]
    if status := cli.main(arguments):
        return status
    print(f"reward curve  {reward_curve_png(run, run / 'reward.png')}\n")
    before, after = (accuracy(record) for record in (evaluations(run)[0], evaluations(run)[-1]))
    problems = evaluations(run)[-1]["eval/prompts"]
    print(f"accuracy on {problems} held-out problems: {before} before, {after} after {options.steps} steps")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes in all")
    return 0


def evaluations(run: Path) -> list[dict[str, Any]]:
    """Returns the evaluation records of a run, or none if there is no run."""
    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        return []
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [record for record in records if record["kind"] == "eval"]


def accuracy(record: dict[str, Any]) -> str:
    """Returns the share of right answers with the half-width of its 95 % Wilson interval."""
    half = f" +- {record['eval/half_width']:.3f}" if "eval/half_width" in record else ""  # one problem has no interval
    return f"{record['eval/reward']:.3f}{half}"


if __name__ == "__main__":
    sys.exit(main())

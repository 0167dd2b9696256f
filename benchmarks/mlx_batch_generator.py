"""Compares gvpo_mlx's sampling with mlx-lm's BatchGenerator, for the same seeds: samples and time.

    python benchmarks/mlx_batch_generator.py [--prompts 4 --responses 8 --prompt 64 --tokens 48]

BatchGenerator gets one sampler per row, because a sampler of the whole batch does not know which rows it has. Each
inverts the cumulative distribution on the device in float32. Both generators run in this process on one tiny model, in
turns. Ours runs a second time with each step queued after the host has chosen the tokens. The figures are medians of
the ratios per round. Only samples that differ between the two runs of ours are an error. docs/mlx.md has the results.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
from gvpo_mlx import generate, load

from gvpo_core.training.config import ModelConfig, OptimizerConfig
from gvpo_core.training.sampling import Sampling, row_seed, uniforms

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance" / "support"))
import tiny_models

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 4096}


class RowSampler:
    """Chooses a row's t-th token, the first whose cumulative probability exceeds the row's t-th random number."""

    def __init__(self, seed: int, most: int) -> None:
        self.numbers = iter(uniforms([seed], 0, most)[0].tolist())

    def __call__(self, logprobs: mx.array) -> mx.array:
        cumulative = mx.cumsum(mx.exp(logprobs), 1)
        # BatchGenerator computes one token ahead, so it asks for one more than it uses.
        return (cumulative <= next(self.numbers, 0.0) * cumulative[:, -1:]).sum(1)


def theirs(of_policy: Any, prompts: Sequence[tuple[int, ...]], seeds: Sequence[Sequence[int]], most: int) -> Any:
    from mlx_lm.generate import BatchGenerator

    rows = [(i, j) for i, row in enumerate(seeds) for j in range(len(row))]
    with mx.stream(of_policy.device), of_policy.scorer.using(of_policy.scorer.parameters):
        generator = BatchGenerator(
            of_policy.scorer.lm,
            stop_tokens=[[end] for end in of_policy._end],
            completion_batch_size=len(rows),
            stream=mx.default_stream(of_policy.device),
        )
        samplers = [RowSampler(seeds[i][j], most) for i, j in rows]
        uids = generator.insert([list(prompts[i]) for i, _ in rows], max_tokens=[most] * len(rows), samplers=samplers)
        drawn: dict[int, list[int]] = {uid: [] for uid in uids}
        left = set(uids)
        while left:
            for response in generator.next()[1]:
                drawn[response.uid].append(response.token)
                if response.finish_reason:
                    left.discard(response.uid)
        generator.close()
    responses: list[list[tuple[int, ...]]] = [[()] * len(row) for row in seeds]
    for uid, (i, j) in zip(uids, rows, strict=True):
        responses[i][j] = tuple(drawn[uid])
    return responses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"prompts": 4, "responses": 8, "prompt": 64, "tokens": 48, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    draw = np.random.default_rng(0)
    prompts = [tuple(draw.integers(1, 4096, options.prompt).tolist()) for _ in range(options.prompts)]
    seeds = [[row_seed(1, i, j) for j in range(options.responses)] for i in range(options.prompts)]
    with tempfile.TemporaryDirectory() as name:
        folder = tiny_models.write_model("llama", Path(name), spread=0.05, **SIZES)
        of_policy = load(
            ModelConfig(path=str(folder), device="cpu"), OptimizerConfig(), updates=1, reference=False, seed=0
        )
        seconds: dict[str, list[float]] = {"ours": [], "waiting": [], "theirs": []}
        samples: dict[str, Any] = {}
        for _ in range(options.rounds):
            start = time.perf_counter()
            drawn = of_policy.generate(prompts, seeds, Sampling(options.tokens))
            seconds["ours"].append(time.perf_counter() - start)
            samples["ours"] = [[r.tokens for r in row] for row in drawn]
            with mock.patch.object(generate._Decoding, "takes_back", False):
                start = time.perf_counter()
                waited = of_policy.generate(prompts, seeds, Sampling(options.tokens))
                seconds["waiting"].append(time.perf_counter() - start)
            assert waited == drawn, "queuing steps before the choice changed the samples"
            start = time.perf_counter()
            samples["theirs"] = theirs(of_policy, prompts, seeds, options.tokens)
            seconds["theirs"].append(time.perf_counter() - start)
    rows = [(a, b) for x, y in zip(samples["ours"], samples["theirs"], strict=True) for a, b in zip(x, y, strict=True)]
    same, tokens = sum(a == b for a, b in rows), sum(len(a) for a, _ in rows)
    print(f"{len(rows)} rows, {tokens} tokens; rows with the same tokens: {same}")
    for name, other in {"waiting": "gvpo_mlx with steps after the choice", "theirs": "BatchGenerator"}.items():
        ratios = sorted(a / b for a, b in zip(seconds["ours"], seconds[name], strict=True))
        print(
            f"gvpo_mlx {min(seconds['ours']):.2f} s, {other} {min(seconds[name]):.2f} s: ratio"
            f" {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()

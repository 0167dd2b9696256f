"""Prompt tokens that turns of episodes compute with MLX: from the start, and from kept keys and values."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gvpo_mlx import generate, load

from benchmarks.scale.table import Count
from gvpo_core.training.config import ModelConfig, OptimizerConfig
from gvpo_core.training.sampling import Sampling

sys.path.insert(0, str(Path(__file__).parents[2] / "conformance" / "support"))
import tiny_models
from conversations import play

PROMPTS, K, PROMPT, HEARD, TURNS = 2, 4, 48, 12, 4
ENDS = [0, *range(60, 96)]  # many ids end a turn, so that a random model ends its turns


def counts() -> Iterator[Count]:
    with tempfile.TemporaryDirectory() as name:
        folder = tiny_models.write_model("llama", Path(name) / "model", max_position_embeddings=1024, spread=0.15)
        policy = load(
            ModelConfig(path=str(folder), device="cpu"), OptimizerConfig(), updates=1, reference=False, seed=0
        )
        policy._end = ENDS
        again, sampled = computed(policy)
        with policy.reusing_prefixes():
            kept, same = computed(policy)
        assert sampled == same, "the samples differ"
        on = f"tiny llama, {PROMPTS} prompts x {K} episodes of {TURNS} turns"
        episodes = PROMPTS * K
        yield Count("prompt tokens computed per episode", on, "", again / episodes, kept / episodes, 60)


def computed(policy: Any) -> tuple[int, list[Any]]:
    """Returns the tokens in forward passes over prompts, padding included, and the samples."""
    draw, columns, plain = np.random.default_rng(0), [], generate._Decoding._pass

    def counted(self: Any, part: Any) -> Any:
        columns.append(len(part.prompts) * part.fresh)
        return plain(self, part)

    of_prompt = [tuple(draw.integers(1, 60, PROMPT).tolist()) for _ in range(PROMPTS)]
    heard = lambda turn: tuple(draw.integers(1, 60, HEARD).tolist())
    generate._Decoding._pass = counted  # type: ignore[method-assign]
    try:
        on = lambda prompts, seeds: policy.generate(prompts, seeds, Sampling(128))
        drawn, going = play(on, of_prompt, K, TURNS, heard)
    finally:
        generate._Decoding._pass = plain  # type: ignore[method-assign]
    assert going == PROMPTS * K, "a response was cut"
    return sum(columns), drawn

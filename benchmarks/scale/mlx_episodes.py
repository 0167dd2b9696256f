"""Tokens of prompts that the turns of episodes compute with MLX: from the start, and from kept keys and values."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gvpo_mlx import generate, load

from benchmarks.scale.table import Count
from gvpo_core.training.config import ModelConfig, OptimizerConfig
from gvpo_core.training.sampling import Sampling, row_seed

sys.path.insert(0, str(Path(__file__).parents[2] / "conformance" / "support"))
import tiny_models

PROMPTS, K, PROMPT, HEARD, TURNS = 2, 4, 48, 12, 4
ENDS = [0, *range(60, 96)]  # so many ids end a turn that a random model ends its turns


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
        yield Count("tokens of prompts computed an episode", on, "", again / episodes, kept / episodes, 60)


def computed(policy: Any) -> tuple[int, list[Any]]:
    """Tokens in forward passes over prompts, padding included, and what was drawn."""
    draw, columns, sampled, plain = np.random.default_rng(0), [], [], generate._Decoding._pass

    def counted(self: Any, part: Any) -> Any:
        columns.append(len(part.prompts) * part.fresh)
        return plain(self, part)

    of_prompt = [tuple(draw.integers(1, 60, PROMPT).tolist()) for _ in range(PROMPTS)]
    conversations = {(i, j): prompt for i, prompt in enumerate(of_prompt) for j in range(K)}
    generate._Decoding._pass = counted  # type: ignore[method-assign]
    try:
        for turn in range(TURNS):
            prompts = sorted({*conversations.values()})
            rows = [[place for place, tokens in conversations.items() if tokens == prompt] for prompt in prompts]
            seeds = [[row_seed(1, *place, turn) for place in places] for places in rows]
            sampled.append(policy.generate(prompts, seeds, Sampling(128)))
            for places, responses in zip(rows, sampled[-1], strict=True):
                for place, response in zip(places, responses, strict=True):
                    assert response.finished
                    heard = tuple(draw.integers(1, 60, HEARD).tolist())
                    conversations[place] = (*conversations[place], *response.tokens, *heard)
    finally:
        generate._Decoding._pass = plain  # type: ignore[method-assign]
    return sum(columns), sampled

"""Tokens that episodes compute: in an update, and in prompts of later turns, from the start or from a kept prefix."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gvpo_torch import generate, load

from benchmarks.scale import episodes
from benchmarks.scale.table import Count
from gvpo_core.training.config import ModelConfig, OptimizerConfig
from gvpo_core.training.policy import layout
from gvpo_core.training.policy.prefixes import Prefixes
from gvpo_core.training.sampling import Sampling

sys.path.insert(0, str(Path(__file__).parents[2] / "conformance" / "support"))
import tiny_models
from conversations import play

PROMPTS, K, PROMPT, HEARD, TURNS = 4, 8, 48, 12, 6
ENDS = [0, *range(80, 96)]  # many ids end a turn, so that a random model ends its turns


def counts() -> Iterator[Count]:
    name = "tokens computed in an update per episode, thoughts dropped"
    for turns in (4, 20):
        alone, shared = (
            sum(row.length for row in layout.plan_rows(rows, packed=True, tokens=1 << 30)) / episodes.K
            for rows in episodes.segments(turns)
        )
        least = episodes.needed(episodes.segments(turns)[0]) / episodes.K
        yield Count(name, episodes.ON % (turns, episodes.THOUGHT), "", alone, shared, float(np.ceil(least)))
    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny_models.make_model("llama", Path(scratch) / "model", max_position_embeddings=2048)
        policy = load(
            ModelConfig(path=str(folder), device="cpu"), OptimizerConfig(), updates=1, reference=False, seed=0
        )
        on = f"tiny llama, {PROMPTS} prompts x {K} episodes of {TURNS} turns"
        for fixed, where in ((False, ""), (True, ", fixed buffers")):
            again, drawn = computed(policy, None, fixed)
            kept, same = computed(policy, Prefixes(1 << 30), fixed)
            assert drawn == same, "the samples differ"
            played = PROMPTS * K
            yield Count(f"prompt tokens computed per episode{where}", on, "", again / played, kept / played, 90)


def computed(policy: Any, prefixes: Prefixes | None, fixed: bool) -> tuple[int, list[Any]]:
    """Returns the tokens in forward passes over prompts, padding included, and the samples."""
    draw, passes = np.random.default_rng(0), []

    def forward(ids: torch.Tensor, positions: torch.Tensor, *, mask: Any = None, cache: Any) -> torch.Tensor:
        passes.append(ids.numel())
        return policy.scorer(ids, positions, mask=mask, cache=cache)

    of_prompt = [tuple(draw.integers(1, 80, PROMPT).tolist()) for _ in range(PROMPTS)]
    totals: list[int] = []

    def generated(prompts: Any, seeds: Any) -> Any:
        passes.clear()
        with torch.inference_mode():
            responses = generate.generate(
                policy.scorer,
                forward,
                prompts,
                seeds,
                Sampling(256),
                end=ENDS,
                device=policy.device,
                cache_tokens=1 << 30,
                in_fixed_buffers=fixed,
                prefixes=prefixes,
            )
        totals.append(passes[0])  # later passes decode
        return responses

    policy.scorer.eval()
    heard = lambda turn: tuple(draw.integers(1, 80, HEARD).tolist())
    drawn, going = play(generated, of_prompt, K, TURNS, heard)
    assert going == PROMPTS * K, "a response was cut"
    return sum(totals), drawn

"""Turns that start from kept keys and values draw the tokens of turns that are computed from the start, with MLX."""

import logging

import pytest
import tiny_models
from conversations import play
from mlx_policies import policy
from required import require

require(subject="mlx")

import mlx.core as mx
from gvpo_mlx import generate

from gvpo_core.training.sampling import Sampling

ENDS = [0, *range(60, 90)]
OPENING = [tuple(range(20, 40)), (5, 6, 7), (9, 5), tuple(range(20, 30))]
K, TURNS = 3, 3


@pytest.fixture(scope="module")
def of_policy(tmp_path_factory):
    made = policy(tiny_models.write_model("llama", tmp_path_factory.mktemp("llama"), spread=0.15))
    made._end = ENDS
    return made


def played(of_policy, monkeypatch):
    """(responses of all turns, tokens of prompts in forward passes, padding included)."""
    computed, plain = [], generate._Decoding._pass
    monkeypatch.setattr(
        generate._Decoding,
        "_pass",
        lambda self, part: computed.append(len(part.prompts) * part.fresh) or plain(self, part),
    )
    draw = lambda prompts, seeds: of_policy.generate(prompts, seeds, Sampling(9))
    drawn, going = play(draw, OPENING, K, TURNS, lambda turn: (1, 2 + turn))
    assert going, "no conversation went on to the last turn"
    return drawn, sum(computed)


@pytest.mark.parametrize("cache_tokens", [1 << 20, 240])
def test_the_same_tokens_are_drawn_and_what_was_computed_is_not_computed_again(
    cache_tokens, of_policy, monkeypatch
) -> None:
    monkeypatch.setattr(of_policy, "_cache_tokens", lambda: cache_tokens)
    with monkeypatch.context() as patch:
        plain, every = played(of_policy, patch)
    with monkeypatch.context() as patch, of_policy.reusing_prefixes() as prefixes:
        reused, computed = played(of_policy, patch)
    assert reused == plain and of_policy._prefixes is None
    assert prefixes.reused and prefixes.computed <= computed < every / (2 if cache_tokens > 240 else 1)


def test_a_model_with_windows_recomputes_turns(tmp_path, caplog) -> None:
    config = {"sliding_window": 6, "use_sliding_window": True}
    windowed = policy(tiny_models.write_model("mistral", tmp_path / "model", **config))
    with caplog.at_level(logging.INFO, "gvpo.mlx"), windowed.reusing_prefixes() as prefixes:
        assert prefixes is None
    assert "computed from the start (its cache has " in caplog.text and "Rotating" in caplog.text


def test_a_cache_that_is_continued_wrongly_is_found_before_it_is_used(of_policy, monkeypatch) -> None:
    scorer, fill = of_policy.scorer, generate.fill
    with mx.stream(of_policy.device):
        assert generate.continues(scorer) == ""

        def shifted(cache, part):
            fill(cache, part)
            for c in cache:
                c.keys = None if c.keys is None else mx.roll(c.keys, 1, 2)

        monkeypatch.setattr(generate, "fill", shifted)
        assert "logits then differ by up to" in generate.continues(scorer)

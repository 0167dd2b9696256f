"""Turns that start from kept keys and values draw the tokens of turns that are computed from the start, with JAX."""

import logging

import pytest
import tiny_models
from conversations import play
from jax_policies import policy
from required import require

require(subject="jax")

from gvpo_jax import check, decoding, generate, programs

from gvpo_core.training.sampling import Sampling

ENDS = [0, *range(60, 90)]
OPENING = [tuple(range(20, 40)), (5, 6, 7), (9, 5), tuple(range(20, 30))]
K, TURNS = 3, 3
FAMILIES = {"llama": {}, "mistral": {"sliding_window": 6, "use_sliding_window": True}}


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    made = {}

    def get(family: str):
        if family not in made:
            folder = tiny_models.write_model(family, tmp_path_factory.mktemp(family), spread=0.15, **FAMILIES[family])
            made[family] = policy(folder)
            made[family]._end = ENDS
        return made[family]

    return get


def played(of_policy, monkeypatch):
    """(responses of all turns, tokens of prompts that programs took, padding included)."""
    computed, plain = [], programs.Programs.call

    def counted(self, function, static, *arguments, **options):
        if function in (decoding.prefill, decoding.extend):
            computed.append(arguments[-2].size)
        return plain(self, function, static, *arguments, **options)

    monkeypatch.setattr(programs.Programs, "call", counted)
    draw = lambda prompts, seeds: of_policy.generate(prompts, seeds, Sampling(9))
    drawn, going = play(draw, OPENING, K, TURNS, lambda turn: (1, 2 + turn))
    assert going, "no conversation went on to the last turn"
    return drawn, sum(computed)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "cache_tokens"), [("llama", 240), ("llama", 1 << 20), ("mistral", 1 << 20)])
def test_the_same_tokens_are_drawn_and_what_was_computed_is_not_computed_again(
    family, cache_tokens, policies, monkeypatch
) -> None:
    of_policy = policies(family)
    monkeypatch.setattr(of_policy, "_cache_tokens", lambda: cache_tokens)
    with monkeypatch.context() as patch:
        plain, every = played(of_policy, patch)
    with of_policy.reusing_prefixes() as prefixes, monkeypatch.context() as patch:
        reused, computed = played(of_policy, patch)
    assert reused == plain and of_policy._prefixes is None
    assert prefixes.reused and prefixes.computed <= computed
    assert computed < every or cache_tokens == 240


def test_a_cache_that_is_continued_wrongly_is_found_before_it_is_used(policies, monkeypatch, caplog) -> None:
    of_policy, plain = policies("llama"), generate.filled_caches

    def shifted(*given):
        caches, filled = plain(*given)
        return [(keys[:, :, ::-1], values) for keys, values in caches], filled

    monkeypatch.setattr(generate, "filled_caches", shifted)
    monkeypatch.setattr(of_policy, "_keeps_nothing", None)
    with caplog.at_level(logging.INFO, "gvpo.jax"), of_policy.reusing_prefixes() as prefixes:
        assert prefixes is None
    assert "computed from the start (log-probs then differ by up to" in caplog.text
    monkeypatch.undo()
    given = (of_policy.scorer, of_policy.learner.parameters, of_policy.learner.adapters)
    assert check.continues(*given, packed=of_policy.packed, dtype="float32") == ""

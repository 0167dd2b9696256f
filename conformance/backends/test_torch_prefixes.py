"""Turns that start from kept keys and values draw the tokens of turns that are computed from the start."""

import logging

import numpy as np
import pytest
import tiny_models
from batches import batch, coefficients_of
from conversations import play
from required import require
from torch_policies import parameters, policy

require(subject="torch")
import torch
from gvpo_torch import adapters, check, generate

from gvpo_core.training.policy.prefixes import Prefixes
from gvpo_core.training.sampling import Sampling, row_seed

ENDS = [0, *range(60, 90)]
OPENING = [tuple(range(20, 40)), (5, 6, 7), (9, 5), tuple(range(20, 30))]
K, TURNS = 3, 4
OF = batch((2, 2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_models.made_once(tmp_path_factory)


def played(of_policy, prefixes: Prefixes | None, *, fixed: bool = False, cache_tokens: int = 1 << 20):
    """(responses of all turns, tokens of prompts that were computed); conversations that were cut end."""
    computed = []

    def forward(ids, positions, *, mask=None, cache):
        if ids.shape[1] > 1 or not cache.layers or not cache.get_seq_length():
            computed.append(ids.numel() if mask is None else int(mask[:, -ids.shape[1] :].sum()))
        return of_policy.scorer(ids, positions, mask=mask, cache=cache)

    def draw(prompts, seeds):
        with torch.inference_mode(), of_policy.scorer.autocast():
            return generate.generate(
                of_policy.scorer,
                forward,
                prompts,
                seeds,
                Sampling(9),
                end=ENDS,
                device=of_policy.device,
                cache_tokens=cache_tokens,
                in_fixed_buffers=fixed,
                prefixes=prefixes,
            )

    of_policy.scorer.eval()
    drawn, going = play(draw, OPENING, K, TURNS, lambda turn: (1, 2 + turn))
    assert going, "no conversation went on to the last turn"
    return drawn, sum(computed)


@pytest.mark.parametrize("fixed", [False, True], ids=["loop", "buffers"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_same_tokens_are_drawn_and_what_was_computed_is_not_computed_again(family, fixed, folders) -> None:
    of_policy = policy(folders(family))
    plain, every = played(of_policy, None, fixed=fixed)
    prefixes = Prefixes(1 << 20)
    reused, computed = played(of_policy, prefixes, fixed=fixed)
    assert reused == plain
    assert computed == prefixes.computed and every == prefixes.computed + prefixes.reused
    later = sum(len(responses) for turn in plain[1:] for responses in turn)
    first = sum(map(len, OPENING))
    assert computed <= first + 4 * later, "of a later turn: the last token drawn, what was heard, and padding to it"
    assert every > 2 * computed


@pytest.mark.parametrize("family", ["gpt2", "smollm3", "cohere"])
def test_other_positions_and_heads_start_from_what_is_kept(family, folders) -> None:
    of_policy = policy(folders(family))
    plain, every = played(of_policy, None)
    reused, computed = played(of_policy, Prefixes(1 << 20))
    assert reused == plain and computed < every / 2


@pytest.mark.parametrize("fixed", [False, True], ids=["loop", "buffers"])
@pytest.mark.parametrize("cache_tokens", [1, 100])
def test_rows_in_several_chunks_draw_the_same(cache_tokens, fixed, folders) -> None:
    of_policy = policy(folders("llama"))
    plain, every = played(of_policy, None)
    reused, computed = played(of_policy, Prefixes(1 << 20), fixed=fixed, cache_tokens=cache_tokens)
    assert reused == plain and computed < every


@pytest.mark.parametrize("most", [0, 30, 90])
def test_no_more_is_kept_than_the_bound_and_the_rest_is_computed_again(most, folders, monkeypatch) -> None:
    of_policy = policy(folders("llama"))
    plain, every = played(of_policy, None)
    prefixes, held = Prefixes(most), [0]
    keep = Prefixes.keep
    monkeypatch.setattr(Prefixes, "keep", lambda self, *given: keep(self, *given) or held.append(self.held))
    reused, computed = played(of_policy, prefixes)
    assert reused == plain and max(held) <= most
    assert (computed < every) == (most > 0)
    assert sum(map(len, prefixes._states)) == prefixes.held and sorted(prefixes._states) == prefixes._keys


def test_a_prompt_starts_from_the_longest_of_what_is_kept() -> None:
    prefixes, draw = Prefixes(1 << 20), np.random.default_rng(0)
    kept = {tuple(draw.integers(0, 3, draw.integers(1, 9)).tolist()) for _ in range(60)}
    for tokens in kept:
        assert prefixes.wants(tokens)
        prefixes.keep(tokens, "states")
    for _ in range(200):
        prompt = tuple(draw.integers(0, 3, draw.integers(1, 10)).tolist())
        common = max(sum(1 for n in range(1, min(len(prompt) - 1, len(t)) + 1) if t[:n] == prompt[:n]) for t in kept)
        prefixes.plan([prompt], [[1]])
        start = prefixes.start(prompt)
        assert start.length == common and start.tokens[:common] == prompt[:common]


@pytest.mark.parametrize("fixed", [False, True], ids=["loop", "buffers"])
def test_one_that_heard_much_does_not_make_the_others_compute_as_much(fixed, folders) -> None:
    of_policy, heard = policy(folders("llama")), [(1, 2)] * 5 + [tuple(range(1, 41))]

    def drawn(prompts, prefixes):
        seeds = [[row_seed(2, i)] for i in range(len(prompts))]
        with torch.inference_mode():
            return generate.generate(
                of_policy.scorer,
                of_policy.scorer,
                prompts,
                seeds,
                Sampling(9),
                end=range(96),  # any token ends a turn
                device=of_policy.device,
                cache_tokens=1 << 20,
                in_fixed_buffers=fixed,
                prefixes=prefixes,
            )

    prefixes, prompts = Prefixes(1 << 20), [(*range(20, 50), i) for i in range(6)]
    of_policy.scorer.eval()
    first = [row[0].tokens for row in drawn(prompts, prefixes)]
    later = [(*p, *said, *more) for p, said, more in zip(prompts, first, heard, strict=True)]
    before = prefixes.computed
    assert drawn(later, prefixes) == drawn(later, None)
    assert prefixes.computed - before == sum(map(len, heard)) + len(heard), "what was heard, and the last token drawn"


def test_within_a_rollout_a_policy_keeps_and_afterwards_it_holds_nothing(folders) -> None:
    of_policy = policy(folders("llama"), lora_rank=2)
    of_policy._end = ENDS
    prompts, seeds = OPENING[:2], [[1, 2], [3]]
    with of_policy.reusing_prefixes() as prefixes:
        first = of_policy.generate(prompts, seeds, Sampling(9))
        later = [(*prompts[0], *first[0][0].tokens, 5), (*prompts[1], *first[1][0].tokens, 5)]
        second = of_policy.generate(later, [[1], [2]], Sampling(9))
        assert of_policy._prefixes is prefixes and prefixes._states
    assert of_policy._prefixes is None and prefixes.reused
    assert not prefixes._states and not prefixes.held, "the caller holds it while rewards are computed"
    assert of_policy.generate(later, [[1], [2]], Sampling(9)) == second


def test_adapters_are_merged_once_for_all_turns_of_a_rollout_and_then_put_back(folders, monkeypatch) -> None:
    of_policy = policy(folders("llama"), lora_rank=2)
    assert of_policy.sampled_bytes
    merged, entered = adapters.merged, []
    monkeypatch.setattr(adapters, "merged", lambda lm: entered.append(lm) or merged(lm))
    before = {name: value.clone() for name, value in of_policy.scorer.state_dict().items()}
    with of_policy.reusing_prefixes():
        in_rollout = [of_policy.generate(OPENING[:1], [[turn]], Sampling(4)) for turn in range(3)]
    assert len(entered) == 1
    alone = [of_policy.generate(OPENING[:1], [[turn]], Sampling(4)) for turn in range(3)]
    assert len(entered) == 4 and alone == in_rollout
    assert all(torch.equal(value, before[name]) for name, value in of_policy.scorer.state_dict().items())
    assert not any(layer.merged for layer in adapters.lora_layers(of_policy.scorer.lm))


CHANGES = {
    "update": lambda of_policy, folder: of_policy.update(OF, coefficients_of(OF)),
    "save": lambda of_policy, folder: of_policy.save(folder),
    "restore": lambda of_policy, folder: of_policy.restore(folder),
    "reset": lambda of_policy, folder: of_policy.reset(),
    "renew_reference": lambda of_policy, folder: of_policy.renew_reference(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_within_a_rollout_parameters_are_neither_changed_nor_saved(change, folders, tmp_path) -> None:
    """They are those of sampling there, in 16 bits or with adapters merged: a step along them would be lost."""
    of_policy = policy(folders("llama"), dtype="bfloat16", reference=True)
    before = parameters(of_policy)
    with of_policy.reusing_prefixes(), pytest.raises(RuntimeError, match=f"{change} within reusing_prefixes"):
        CHANGES[change](of_policy, tmp_path)
    assert all(np.array_equal(value, before[name]) for name, value in parameters(of_policy).items())
    of_policy.update(OF, coefficients_of(OF))
    assert not np.array_equal(parameters(of_policy)["model.norm.weight"], before["model.norm.weight"])


UNFIT = {
    "mistral-window": "(its cache has DynamicSlidingWindowLayer, which may not hold every token)",
    "gemma3_text": "(its cache has DynamicSlidingWindowLayer, which may not hold every token)",
    "qwen3_next": "(its cache has LinearAttentionLayer, which may not hold every token)",
}


@pytest.mark.parametrize("family", UNFIT)
def test_a_model_with_a_partial_cache_recomputes_turns(family, folders, caplog) -> None:
    of_policy = policy(folders(family))
    with caplog.at_level(logging.INFO, "gvpo.torch"), of_policy.reusing_prefixes():
        assert of_policy._prefixes is None
    assert UNFIT[family] in caplog.text and "later turns of an episode are computed from the start" in caplog.text


def test_rope_by_length_computes_turns_from_the_start(tmp_path, caplog) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 700.0}
    of_policy = policy(tiny_models.make_model("llama", tmp_path / "model", rope_parameters=rope))
    assert of_policy.scorer.rope is not None
    with caplog.at_level(logging.INFO, "gvpo.torch"), of_policy.reusing_prefixes():
        assert of_policy._prefixes is None
    assert "RoPE depends on the length of the row" in caplog.text


def test_a_cache_that_is_continued_wrongly_is_found_before_it_is_used(folders, monkeypatch) -> None:
    of_policy = policy(folders("llama"))
    assert check.continues(of_policy.scorer, of_policy.device) == ""
    fill = generate.fill

    def shifted(cache, part):
        fill(cache, part)
        for layer in cache.layers:
            layer.keys = layer.keys.roll(1, 2) if layer.is_initialized else None

    monkeypatch.setattr(generate, "fill", shifted)
    with torch.no_grad():
        assert "log-probs then differ by up to" in check.continues(of_policy.scorer, of_policy.device)

"""Sampling: the right distribution, independent of the batch, repeatable, the end token kept."""

import numpy as np
import pytest
import tiny_models
from torch_policies import policy, require

require()

import torch
from gvpo_torch.generate import pick, truncate

from gvpo_core.training.policy import Batch
from gvpo_core.training.sampling import Sampling, row_seed, uniforms

MODELS = ("llama", "mistral-window", "gemma3_text", "gpt_oss", "qwen3_next", "qwen3_moe", "gpt2")
PROMPTS = [(5, 6, 7), tuple(range(20, 32)), (9,), tuple(range(40, 47))]
SEEDS = [[row_seed(1, i, j) for j in range(size)] for i, size in enumerate((3, 1, 2, 4))]


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = policy(tiny_models.make_model(name, tmp_path_factory.mktemp(name), spread=0.15))
        return made[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_a_response_does_not_depend_on_its_batch(name: str, policies) -> None:
    of_policy = policies(name)
    sampling = Sampling(max_tokens=12)
    together = of_policy.generate(PROMPTS, SEEDS, sampling)
    assert [len(row) for row in together] == [len(row) for row in SEEDS]
    for i, prompt in enumerate(PROMPTS):
        for j, seed in enumerate(SEEDS[i]):
            assert of_policy.generate([prompt], [[seed]], sampling) == [[together[i][j]]]
    back = of_policy.generate(PROMPTS[::-1], [row[::-1] for row in SEEDS[::-1]], sampling)
    assert [row[::-1] for row in back[::-1]] == together


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_the_inverse_of_the_models_own_distribution(name: str, policies) -> None:
    of_policy = policies(name)
    found = of_policy.generate(PROMPTS, SEEDS, Sampling(max_tokens=12, temperature=0.7))
    for i, prompt in enumerate(PROMPTS):
        for seed, response in zip(SEEDS[i], found[i], strict=True):
            ids = torch.tensor([prompt + response.tokens])
            with torch.no_grad():
                logits = of_policy.scorer.base(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            p = np.asarray((logits[len(prompt) - 1 : -1].double() / 0.7).softmax(-1))
            for t, (token, u) in enumerate(zip(response.tokens, uniforms([seed], 0, len(p))[0], strict=True)):
                below = p[t, :token].sum()
                assert below - 1e-5 <= u <= below + p[t, token] + 1e-5


def test_sampler_and_scorer_agree(policies) -> None:
    of_policy = policies("llama")
    found = of_policy.generate(PROMPTS, SEEDS, Sampling(max_tokens=12))
    rows = [(p, r.tokens, i) for i, p in enumerate(PROMPTS) for r in found[i]]
    of = Batch(*(list(x) for x in zip(*rows, strict=True)))
    scored = of_policy.logprobs(of)
    sampled = np.zeros(len(of))
    scorer = of_policy.scorer
    seen: list[torch.Tensor] = []

    def forward(*args, **options):
        seen.append(scorer(*args, **options).log_softmax(-1))
        return seen[-1]

    from gvpo_torch import generate

    row = 0
    for i, prompt in enumerate(PROMPTS):
        for j, seed in enumerate(SEEDS[i]):
            seen.clear()
            with torch.no_grad():
                again = generate.generate(
                    scorer,
                    forward,
                    [prompt],
                    [[seed]],
                    Sampling(max_tokens=12),
                    end=[0],
                    device=torch.device("cpu"),
                    cache_tokens=10**6,
                )
            assert again[0][0] == found[i][j]
            sampled[row] = sum(float(p[0, t]) for p, t in zip(seen, found[i][j].tokens, strict=True))
            row += 1
    np.testing.assert_allclose(scored, sampled, rtol=0, atol=1e-4)


def test_seeds_decide(policies) -> None:
    of_policy = policies("llama")
    draw = lambda *seeds: of_policy.generate([PROMPTS[0]], [list(seeds)], Sampling(max_tokens=12))[0]
    assert draw(1, 2) == draw(1, 2)
    assert draw(1, 1)[0] == draw(1, 1)[1]
    assert len({r.tokens for r in draw(*range(20))}) > 10


def test_the_end_token_is_kept_and_ends(policies) -> None:
    of_policy = policies("llama")
    found = of_policy.generate(PROMPTS, [[row_seed(3, i, j) for j in range(40)] for i in range(4)], Sampling(60))
    responses = [r for row in found for r in row]
    assert {r.finished for r in responses} == {True, False}
    for r in responses:
        assert r.finished == (r.tokens[-1] == 0)
        assert 0 not in r.tokens[:-1]
        assert r.finished or len(r.tokens) == 60


def test_a_small_cache_changes_nothing(policies, monkeypatch) -> None:
    of_policy = policies("llama")
    whole = of_policy.generate(PROMPTS, SEEDS, Sampling(max_tokens=12))
    for tokens in (1, 50, 100):
        monkeypatch.setattr(of_policy, "_cache_tokens", lambda tokens=tokens: tokens)
        assert of_policy.generate(PROMPTS, SEEDS, Sampling(max_tokens=12)) == whole


def test_temperature_zero_is_the_most_likely_token(policies) -> None:
    of_policy = policies("llama")
    a, b = of_policy.generate([PROMPTS[0]], [[1, 2]], Sampling(max_tokens=8, temperature=0.0))[0]
    assert a == b
    ids = torch.tensor([PROMPTS[0] + a.tokens])
    with torch.no_grad():
        best = of_policy.scorer.base(input_ids=ids).logits[0].argmax(-1)
    assert tuple(best[len(PROMPTS[0]) - 1 : -1].tolist()) == a.tokens


def test_pick_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().float()
    for u, token in ((0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 2), (0.6001, 3), (1 - 1e-16, 3)):
        assert pick(logits, np.array([u]), Sampling(1)).tolist() == [token]
    none = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for u, token in ((0.0, 1), (0.49, 1), (0.51, 2), (1 - 1e-16, 2)):
        assert pick(none, np.array([u]), Sampling(1)).tolist() == [token]


def test_frequencies_follow_the_distribution() -> None:
    p = torch.tensor([0.05, 0.5, 0.0, 0.15, 0.3])
    n = 20_000
    numbers = uniforms(range(n), 0, 1)[:, 0]
    drawn = pick(p.log().expand(n, 5), numbers, Sampling(1))
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / n, p, atol=4 * 0.5 / n**0.5)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, [1, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.5}, [1, 4]),
        ({"top_p": 0.35}, [1]),
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"min_p": 0.5}, [1, 3, 4]),
        ({"min_p": 0.51}, [1, 4]),
        ({"top_k": 3, "min_p": 0.6}, [1, 4]),
    ],
)
def test_truncation_by_hand(settings, kept) -> None:
    masses = torch.tensor([[0.05, 0.4, 0.05, 0.2, 0.3]], dtype=torch.float64)
    left = truncate(masses.clone(), Sampling(1, **settings))
    assert torch.nonzero(left[0]).squeeze(1).tolist() == kept
    assert torch.equal(left[left > 0], masses[left > 0])


def test_no_prompts_and_no_seeds(policies) -> None:
    of_policy = policies("llama")
    assert of_policy.generate([], [], Sampling(3)) == []
    assert of_policy.generate([(5,)], [[]], Sampling(3)) == [[]]
    with pytest.raises(ValueError, match="1 prompts and 2 rows of seeds"):
        of_policy.generate([(5,)], [[1], [2]], Sampling(3))

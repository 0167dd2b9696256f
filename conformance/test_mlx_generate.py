"""Sampling in MLX: the right distribution, independent of the batch, repeatable, the end token kept."""

import numpy as np
import pytest
import tiny_models
from mlx_policies import policy, require

require()

import mlx.core as mx
from gvpo_mlx.generate import BLOCK, pick, truncate

from gvpo_core.training.policy import Batch
from gvpo_core.training.sampling import Sampling, row_seed, uniforms

MODELS = ("llama", "qwen2", "qwen3")
PROMPTS = [(5, 6, 7), tuple(range(20, 32)), (9,), tuple(range(40, 47))]
SEEDS = [[row_seed(1, i, j) for j in range(size)] for i, size in enumerate((3, 1, 2, 4))]


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = policy(tiny_models.write_model(name, tmp_path_factory.mktemp(name), spread=0.15))
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
            logits = np.array(of_policy.scorer.lm(mx.array([prompt + response.tokens]))[0], dtype=np.float64)
            p = np.exp((logits[len(prompt) - 1 : -1] - logits.max()) / 0.7)
            p /= p.sum(1, keepdims=True)
            for t, (token, u) in enumerate(zip(response.tokens, uniforms([seed], 0, len(p))[0], strict=True)):
                below = p[t, :token].sum()
                assert below - 1e-5 <= u <= below + p[t, token] + 1e-5


def test_sampler_and_scorer_agree(policies, monkeypatch) -> None:
    from gvpo_mlx import generate

    of_policy = policies("llama")
    sampled = []
    plain = generate.pick

    def watched(logits, numbers, sampling):
        tokens = plain(logits, numbers, sampling)
        every = np.array(logits - mx.logsumexp(logits, 1, keepdims=True))
        sampled.append(float(every[0, tokens[0]]))
        return tokens

    monkeypatch.setattr(generate, "pick", watched)
    for prompt, seeds in zip(PROMPTS, SEEDS, strict=True):
        sampled.clear()
        ((response,),) = of_policy.generate([prompt], [seeds[:1]], Sampling(max_tokens=12))
        scored = of_policy.logprobs(Batch([prompt], [response.tokens], [0]))
        np.testing.assert_allclose(scored, [sum(sampled)], rtol=0, atol=1e-4)


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


@pytest.mark.parametrize("tokens", [1, 50, 100])
def test_waiting_rows_join_as_others_end(tokens: int, policies, monkeypatch) -> None:
    """Each continues in the stream of numbers that is its own, beside rows that are further on."""
    of_policy = policies("llama")
    seeds = [[row_seed(4, i, j) for j in range(5)] for i in range(4)]
    whole = of_policy.generate(PROMPTS, seeds, Sampling(max_tokens=30))
    assert len({len(r.tokens) for row in whole for r in row}) > 3
    monkeypatch.setattr(of_policy, "_cache_tokens", lambda: tokens)
    assert of_policy.generate(PROMPTS, seeds, Sampling(max_tokens=30)) == whole


def test_a_prompt_is_prefilled_once(policies, monkeypatch) -> None:
    from gvpo_mlx import generate

    of_policy = policies("llama")
    seen = []
    plain = generate._Decoding.prefill
    monkeypatch.setattr(generate._Decoding, "prefill", lambda self, lines: seen.append(lines) or plain(self, lines))
    decoder = of_policy.scorer.decoder
    widths = []

    def watched(ids, cache=None):
        widths.append(ids.shape)
        return decoder(ids, cache=cache)

    monkeypatch.setattr(of_policy.scorer, "decoder", watched)
    of_policy.generate(PROMPTS, SEEDS, Sampling(max_tokens=3))
    assert len(seen) == 1 and len(seen[0]) == 10
    assert widths[0] == (4, 12) and all(width == 1 for _, width in widths[1:])


def test_temperature_zero_is_the_most_likely_token(policies) -> None:
    of_policy = policies("llama")
    a, b = of_policy.generate([PROMPTS[0]], [[1, 2]], Sampling(max_tokens=8, temperature=0.0))[0]
    assert a == b
    best = np.array(mx.argmax(of_policy.scorer.lm(mx.array([PROMPTS[0] + a.tokens]))[0], -1))
    assert tuple(best[len(PROMPTS[0]) - 1 : -1].tolist()) == a.tokens


def test_pick_by_hand() -> None:
    logits = mx.log(mx.array([[0.1, 0.2, 0.3, 0.4]]))
    for u, token in ((0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 2), (0.6001, 3), (1 - 1e-16, 3)):
        assert pick(logits, np.array([u]), Sampling(1)).tolist() == [token]
    none = mx.array([[-np.inf, 0.0, 0.0, -np.inf]])
    for u, token in ((0.0, 1), (0.49, 1), (0.51, 2), (1 - 1e-16, 2)):
        assert pick(none, np.array([u]), Sampling(1)).tolist() == [token]


def test_pick_over_a_large_vocabulary_is_the_float64_one() -> None:
    draw = np.random.default_rng(0)
    size = 40 * BLOCK + 17
    logits = (3 * draw.normal(size=(50, size))).astype(np.float32)
    logits[:, : 2 * BLOCK] = -np.inf  # blocks without mass
    numbers = draw.random(50)
    p = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    cumulative = p.cumsum(1) / p.sum(1, keepdims=True)
    found = pick(mx.array(logits), numbers, Sampling(1))
    above = cumulative[np.arange(50), found]
    below = above - p[np.arange(50), found] / p.sum(1)
    assert ((below <= numbers + 1e-6) & (numbers <= above + 1e-6)).all()
    assert (found == (cumulative <= numbers[:, None]).sum(1)).mean() > 0.9


def test_frequencies_follow_the_distribution() -> None:
    p = np.array([0.05, 0.5, 0.0, 0.15, 0.3])
    n = 5_000
    numbers = uniforms(range(n), 0, 1)[:, 0]
    with np.errstate(divide="ignore"):
        logits = mx.broadcast_to(mx.array(np.log(p).astype(np.float32)), (n, 5))
    drawn = pick(logits, numbers, Sampling(1))
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / n, p, atol=4 * 0.5 / n**0.5)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, [1, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.5}, [1, 4]),
        ({"top_p": 0.35}, [1]),
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"min_p": 0.49}, [1, 3, 4]),
        ({"min_p": 0.51}, [1, 4]),
        ({"top_k": 3, "min_p": 0.6}, [1, 4]),
    ],
)
def test_truncation_by_hand(settings, kept) -> None:
    masses = np.array([[0.05, 0.4, 0.05, 0.2, 0.3]])
    left = truncate(masses.copy(), Sampling(1, **settings))
    assert np.flatnonzero(left[0]).tolist() == kept
    assert np.array_equal(left[left > 0], masses[left > 0])
    drawn = {
        int(pick(mx.log(mx.array(masses)), np.array([u]), Sampling(1, **settings))[0]) for u in np.arange(0, 1, 0.01)
    }
    assert drawn == set(kept)


def test_no_prompts_and_no_seeds(policies) -> None:
    of_policy = policies("llama")
    assert of_policy.generate([], [], Sampling(3)) == []
    assert of_policy.generate([(5,)], [[]], Sampling(3)) == [[]]
    with pytest.raises(ValueError, match="1 prompts and 2 rows of seeds"):
        of_policy.generate([(5,)], [[1], [2]], Sampling(3))


def test_prompts_of_one_length_alone_are_decoded_together_where_padding_is_not_exact(policies, monkeypatch) -> None:
    from gvpo_mlx import generate

    of_policy = policies("llama")
    whole = of_policy.generate(PROMPTS, SEEDS, Sampling(max_tokens=12))
    monkeypatch.setattr(of_policy, "_same_length", True)
    shapes = []
    plain = generate._Decoding.prefill
    monkeypatch.setattr(generate._Decoding, "prefill", lambda self, lines: shapes.append(lines) or plain(self, lines))
    assert of_policy.generate(PROMPTS, SEEDS, Sampling(max_tokens=12)) == whole
    assert [{len(PROMPTS[line.prompt]) for line in lines} for lines in shapes] == [{12}, {7}, {3}, {1}]


def test_a_model_that_decodes_wrongly_is_found_at_load(policies, monkeypatch) -> None:
    from gvpo_mlx import generate
    from mlx_lm.models.cache import BatchKVCache

    from gvpo_core.training.config import ConfigError

    scorer = policies("llama").scorer
    assert generate.check(scorer)
    unpadded = BatchKVCache.make_mask
    with monkeypatch.context() as patch:  # the padding is seen
        patch.setattr(
            BatchKVCache, "make_mask", lambda self, n, **_: mx.tril(mx.ones((n, self._idx + n), mx.bool_), self._idx)
        )
        assert not generate.check(scorer)
    assert BatchKVCache.make_mask is unpadded
    with monkeypatch.context() as patch:  # every token stands at the first position
        patch.setattr(
            BatchKVCache,
            "offset",
            property(lambda self: mx.zeros(len(self.left_padding), mx.int32), lambda *_: None),
            raising=False,
        )
        with pytest.raises(ConfigError, match="decodes with its cache otherwise than without"):
            generate.check(scorer)

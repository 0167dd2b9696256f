"""Sampling: the right distribution, independent of the batch, repeatable, the end token kept, few programs."""

import numpy as np
import pytest
import tiny_models
from jax_policies import MODULES, policy
from torch_policies import require

require(*MODULES, subject="jax")

import jax.numpy as jnp
from gvpo_jax.generate import pick, truncate

from gvpo_core.training.policy import Batch
from gvpo_core.training.sampling import Sampling, row_seed, uniforms

PROMPTS = [(5, 6, 7), tuple(range(20, 32)), (9,), tuple(range(40, 47))]
SEEDS = [[row_seed(1, i, j) for j in range(size)] for i, size in enumerate((3, 1, 2, 4))]
MODELS = {"llama": {}, "mistral": {"sliding_window": 6}}


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = policy(
                tiny_models.write_model(name, tmp_path_factory.mktemp(name), spread=0.15, **MODELS[name])
            )
        return made[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_a_response_does_not_depend_on_its_batch(name: str, policies, monkeypatch) -> None:
    of_policy, sampling = policies(name), Sampling(max_tokens=12)
    together = of_policy.generate(PROMPTS, SEEDS, sampling)
    assert [len(row) for row in together] == [len(row) for row in SEEDS]
    for i, j in ((0, 1), (1, 0), (3, 3)):
        assert of_policy.generate([PROMPTS[i]], [[SEEDS[i][j]]], sampling) == [[together[i][j]]]
    back = of_policy.generate(PROMPTS[::-1], [row[::-1] for row in SEEDS[::-1]], sampling)
    assert [row[::-1] for row in back[::-1]] == together
    monkeypatch.setattr(of_policy, "_cache_tokens", lambda: 50)
    assert of_policy.generate(PROMPTS, SEEDS, sampling) == together


@pytest.mark.parametrize("name", MODELS)
def test_sampler_and_scorer_agree(name: str, policies) -> None:
    """The decoder with its caches against the scorer, which sees whole rows: to 1e-4 on sums."""
    of_policy = policies(name)
    found, sampled = of_policy.sample(PROMPTS, SEEDS, Sampling(max_tokens=12, temperature=0.7))
    rows = [(p, r.tokens, i) for i, p in enumerate(PROMPTS) for r in found[i]]
    of = Batch(*(list(x) for x in zip(*rows, strict=True)))
    np.testing.assert_allclose(of_policy.logprobs(of), np.concatenate(sampled), rtol=0, atol=1e-4)


def test_seeds_decide(policies) -> None:
    of_policy = policies("llama")
    drawn = of_policy.generate([PROMPTS[0]], [[1, 1, *range(2, 20)]], Sampling(max_tokens=12))[0]
    assert drawn[0] == drawn[1]
    assert len({r.tokens for r in drawn}) > 10
    assert of_policy.generate([PROMPTS[0]], [[1, 1, *range(2, 20)]], Sampling(max_tokens=12))[0] == drawn


def test_the_end_token_is_kept_and_ends(policies) -> None:
    of_policy = policies("llama")
    found = of_policy.generate(PROMPTS, [[row_seed(3, i, j) for j in range(40)] for i in range(4)], Sampling(60))
    responses = [r for row in found for r in row]
    assert {r.finished for r in responses} == {True, False}
    for r in responses:
        assert r.finished == (r.tokens[-1] == 0)
        assert 0 not in r.tokens[:-1]
        assert r.finished or len(r.tokens) == 60


def test_a_run_compiles_a_handful_of_programs(tmp_path) -> None:
    of_policy = policy(tiny_models.write_model("llama", tmp_path))
    draw, before = np.random.default_rng(0), len(of_policy.programs)
    for step in range(12):
        prompts = [tuple(draw.integers(1, 96, int(draw.integers(3, 16))).tolist()) for _ in range(4)]
        of_policy.generate(prompts, [[row_seed(step, i, j) for j in range(4)] for i in range(4)], Sampling(10))
    assert len(of_policy.programs) - before == 2  # prefill and decode


def take(logits, numbers, temperature=1.0):
    settings = {"temperature": jnp.float32(temperature)}
    return pick(jnp.asarray(logits, jnp.float32), jnp.asarray(numbers, jnp.float32), settings, False, ()).tolist()


def test_pick_by_hand() -> None:
    logits = np.log([[0.1, 0.2, 0.3, 0.4]])
    for u, token in ((0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 2), (0.6001, 3), (1 - 1e-7, 3), (1, 3)):
        assert take(logits, [u]) == [token]
    none = [[-np.inf, 0.0, 0.0, -np.inf]]
    for u, token in ((0.0, 1), (0.49, 1), (0.51, 2), (1 - 1e-7, 2), (1, 2)):
        assert take(none, [u]) == [token]


def test_pick_over_a_large_vocabulary_is_the_inverse_of_the_distribution() -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(1, 49_153)).astype(np.float32) * 3
    numbers = uniforms(range(500), 0, 1)[:, 0]
    picked = take(np.repeat(logits, 500, 0), numbers, 0.7)
    p = np.exp(logits[0].astype(np.float64) / 0.7)
    p /= p.sum()
    below = np.cumsum(p) - p
    for u, token in zip(numbers, picked, strict=True):
        assert below[token] - 2e-6 <= u <= below[token] + p[token] + 2e-6


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, [1, 4]),
        ({"top_p": 0.5}, [1, 4]),
        ({"top_p": 0.35}, [1]),
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"min_p": 0.5}, [1, 3, 4]),
        ({"min_p": 0.51}, [1, 4]),
        ({"top_k": 3, "min_p": 0.6}, [1, 4]),
    ],
)
def test_truncation_by_hand(settings, kept) -> None:
    masses = jnp.asarray([[0.05, 0.4, 0.05, 0.2, 0.3]], jnp.float32)
    given = {name: jnp.asarray(value) for name, value in settings.items()}
    left = np.asarray(truncate(masses, given, tuple(settings)))
    assert np.flatnonzero(left[0]).tolist() == kept


def test_no_prompts_and_no_seeds(policies) -> None:
    of_policy = policies("llama")
    assert of_policy.generate([], [], Sampling(3)) == []
    assert of_policy.generate([(5,)], [[]], Sampling(3)) == [[]]
    with pytest.raises(ValueError, match="1 prompts and 2 rows of seeds"):
        of_policy.generate([(5,)], [[1], [2]], Sampling(3))

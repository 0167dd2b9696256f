"""Sampling of every backend: the right distribution, independent of the batch, repeatable, the end token kept."""

import numpy as np
import pytest
import tiny_models
import trainer_backends
from trainer_backends import Backend

from gvpo_core.training.policy import Batch
from gvpo_core.training.sampling import Sampling, row_seed, uniforms

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)

PROMPTS = [(5, 6, 7), tuple(range(20, 32)), (9,), tuple(range(40, 47))]
SEEDS = [[row_seed(1, i, j) for j in range(size)] for i, size in enumerate((3, 1, 2, 4))]
DECODERS = [(b, name) for b in PRESENT for name in b.decoders]


def write(name: str, folder):
    if name == "mistral-window":
        return tiny_models.write_model("mistral", folder, spread=0.15, sliding_window=6)
    make = tiny_models.write_model if name in tiny_models.DECODERS else tiny_models.make_model
    return make(name, folder, spread=0.15)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    made = {}

    def get(backend: Backend, name: str):
        if (backend.name, name) not in made:
            folder = write(name, tmp_path_factory.mktemp(name))
            made[backend.name, name] = backend.policies.policy(folder)
        return made[backend.name, name]

    return get


@pytest.fixture
def of_policy(backend, policies):
    return policies(backend, backend.decoders[0])


@pytest.fixture(scope="module", params=DECODERS, ids=[f"{b.name}-{name}" for b, name in DECODERS])
def each(request, policies):
    """A backend, and each of its decoders."""
    backend, name = request.param
    return backend, policies(backend, name)


@pytest.mark.slow_on("jax-mistral-window")
def test_a_response_does_not_depend_on_its_batch(each) -> None:
    _, of_policy = each
    sampling = Sampling(max_tokens=12)
    together = of_policy.generate(PROMPTS, SEEDS, sampling)
    assert [len(row) for row in together] == [len(row) for row in SEEDS]
    for i, prompt in enumerate(PROMPTS):
        for j, seed in enumerate(SEEDS[i]):
            assert of_policy.generate([prompt], [[seed]], sampling) == [[together[i][j]]]
    back = of_policy.generate(PROMPTS[::-1], [row[::-1] for row in SEEDS[::-1]], sampling)
    assert [row[::-1] for row in back[::-1]] == together


def test_tokens_are_the_inverse_of_the_models_own_distribution(each) -> None:
    backend, of_policy = each
    found = of_policy.generate(PROMPTS, SEEDS, Sampling(max_tokens=12, temperature=0.7))
    for i, prompt in enumerate(PROMPTS):
        for seed, response in zip(SEEDS[i], found[i], strict=True):
            z = backend.policies.logits(of_policy, prompt + response.tokens)[len(prompt) - 1 : -1]
            p = np.exp((z - z.max(1, keepdims=True)) / 0.7)
            p /= p.sum(1, keepdims=True)
            for t, (token, u) in enumerate(zip(response.tokens, uniforms([seed], 0, len(p))[0], strict=True)):
                below = p[t, :token].sum()
                assert below - 1e-5 <= u <= below + p[t, token] + 1e-5


def test_sampler_and_scorer_agree(each, monkeypatch) -> None:
    """The decoder with its caches against the scorer, which sees whole rows: to 1e-4 on sums, at temperature 1."""
    backend, of_policy = each
    sampling = Sampling(max_tokens=12, temperature=0.7)
    found, sampled = backend.policies.sample(of_policy, PROMPTS, SEEDS, sampling, monkeypatch)
    assert found == of_policy.generate(PROMPTS, SEEDS, sampling)
    rows = [(p, r.tokens, i) for i, p in enumerate(PROMPTS) for r in found[i]]
    of = Batch(*(list(x) for x in zip(*rows, strict=True)))
    np.testing.assert_allclose(of_policy.logprobs(of), sampled, rtol=0, atol=1e-4)


def test_seeds_decide(of_policy) -> None:
    draw = lambda: of_policy.generate([PROMPTS[0]], [[1, 1, *range(2, 21)]], Sampling(max_tokens=12))[0]
    drawn = draw()
    assert drawn[0] == drawn[1]
    assert len({r.tokens for r in drawn}) > 10
    assert draw() == drawn


def test_the_end_token_is_kept_and_ends(of_policy) -> None:
    found = of_policy.generate(PROMPTS, [[row_seed(3, i, j) for j in range(40)] for i in range(4)], Sampling(60))
    responses = [r for row in found for r in row]
    assert {r.finished for r in responses} == {True, False}
    for r in responses:
        assert r.finished == (r.tokens[-1] == 0)
        assert 0 not in r.tokens[:-1]
        assert r.finished or len(r.tokens) == 60


@pytest.mark.slow_on("mlx", "jax")
def test_a_small_cache_changes_nothing(of_policy, monkeypatch) -> None:
    """Rows that wait for room continue in the stream of numbers that is their own."""
    seeds = [[row_seed(4, i, j) for j in range(5)] for i in range(4)]
    whole = of_policy.generate(PROMPTS, seeds, Sampling(max_tokens=30))
    assert len({len(r.tokens) for row in whole for r in row}) > 3
    for tokens in (1, 50, 100):
        monkeypatch.setattr(of_policy, "_cache_tokens", lambda tokens=tokens: tokens)
        assert of_policy.generate(PROMPTS, seeds, Sampling(max_tokens=30)) == whole


def test_temperature_zero_is_the_most_likely_token(backend, of_policy) -> None:
    a, b = of_policy.generate([PROMPTS[0]], [[1, 2]], Sampling(max_tokens=8, temperature=0.0))[0]
    assert a == b
    best = backend.policies.logits(of_policy, PROMPTS[0] + a.tokens).argmax(1)
    assert tuple(best[len(PROMPTS[0]) - 1 : -1].tolist()) == a.tokens


def test_no_prompts_and_no_seeds(of_policy) -> None:
    assert of_policy.generate([], [], Sampling(3)) == []
    assert of_policy.generate([(5,)], [[]], Sampling(3)) == [[]]
    with pytest.raises(ValueError, match="1 prompts and 2 rows of seeds"):
        of_policy.generate([(5,)], [[1], [2]], Sampling(3))


# -- one draw


def logarithms(p) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(p))


def test_pick_by_hand(backend) -> None:
    take = lambda p, u: backend.policies.pick(logarithms([p]), np.array([u]), Sampling(1))
    first_to_last = ((0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 2), (0.6001, 3))
    for u, token in (*first_to_last, (1 - 1e-7, 3), (1 - 1e-16, 3), (1.0, 3)):
        assert take([0.1, 0.2, 0.3, 0.4], u) == [token]
    for u, token in ((0.0, 1), (0.49, 1), (0.51, 2), (1 - 1e-7, 2), (1 - 1e-16, 2), (1.0, 2)):
        assert take([0.0, 0.5, 0.5, 0.0], u) == [token]


def test_pick_over_a_large_vocabulary_is_the_float64_one(backend) -> None:
    draw, size, rows = np.random.default_rng(0), 49_153, np.arange(50)
    logits = (3 * draw.normal(size=(50, size))).astype(np.float32)
    logits[:, :512] = -np.inf  # where a sum over the vocabulary begins there is no mass
    numbers = draw.random(50)
    found = np.asarray(backend.policies.pick(logits, numbers, Sampling(1, temperature=0.7)))
    p = np.exp((logits - logits.max(1, keepdims=True)).astype(np.float64) / 0.7)
    p /= p.sum(1, keepdims=True)
    cumulative = p.cumsum(1)
    above = cumulative[rows, found]
    assert (above - p[rows, found] <= numbers + 1e-6).all()
    assert (numbers <= above + 1e-6).all()
    assert (found == (cumulative <= numbers[:, None]).sum(1)).mean() > 0.9


def test_frequencies_follow_the_distribution(backend) -> None:
    p, n = np.array([0.05, 0.5, 0.0, 0.15, 0.3]), 20_000
    numbers = uniforms(range(n), 0, 1)[:, 0]
    drawn = backend.policies.pick(np.broadcast_to(logarithms(p), (n, 5)), numbers, Sampling(1))
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
        ({"min_p": 0.5}, [1, 3, 4]),
        ({"min_p": 0.51}, [1, 4]),
        ({"top_k": 3, "min_p": 0.6}, [1, 4]),
    ],
)
def test_truncation_by_hand(settings, kept, backend) -> None:
    masses = np.float32([[0.05, 0.4, 0.05, 0.2, 0.3]]).astype(np.float64)  # 0.2 and 0.4 keep their ratio
    left = backend.policies.truncate(masses, Sampling(1, **settings))
    assert np.flatnonzero(left[0]).tolist() == kept
    assert np.array_equal(left[left > 0], masses[left > 0])
    if settings != {"min_p": 0.5}:  # at the border the rounding of a logarithm decides
        numbers = np.arange(0, 1, 0.01)
        logits = np.broadcast_to(logarithms(masses), (len(numbers), 5))
        assert set(backend.policies.pick(logits, numbers, Sampling(1, **settings))) == set(kept)

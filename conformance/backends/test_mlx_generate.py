"""What only gvpo_mlx's sampling has: one prefill a prompt, padding that is not always exact, a check at load."""

import pytest
import tiny_models
from mlx_policies import policy
from required import require

require(subject="mlx")

import mlx.core as mx
import numpy as np

from gvpo_core.training.sampling import Sampling, row_seed

PROMPTS = [(5, 6, 7), tuple(range(20, 32)), (9,), tuple(range(40, 47))]
SEEDS = [[row_seed(1, i, j) for j in range(size)] for i, size in enumerate((3, 1, 2, 4))]


@pytest.fixture(scope="module")
def of_policy(tmp_path_factory):
    return policy(tiny_models.write_model("llama", tmp_path_factory.mktemp("llama"), spread=0.15))


def test_a_prompt_is_prefilled_once(of_policy, monkeypatch) -> None:
    from gvpo_mlx import generate

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


def test_inexact_padding_decodes_equal_lengths_together(of_policy, monkeypatch) -> None:
    from gvpo_mlx import generate

    whole = of_policy.generate(PROMPTS, SEEDS, Sampling(max_tokens=12))
    monkeypatch.setattr(of_policy, "_same_length", True)
    shapes = []
    plain = generate._Decoding.prefill
    monkeypatch.setattr(generate._Decoding, "prefill", lambda self, lines: shapes.append(lines) or plain(self, lines))
    assert of_policy.generate(PROMPTS, SEEDS, Sampling(max_tokens=12)) == whole
    assert [{len(PROMPTS[line.prompt]) for line in lines} for lines in shapes] == [{12}, {7}, {3}, {1}]


def test_a_model_that_decodes_wrongly_is_found_at_load(of_policy, monkeypatch) -> None:
    from gvpo_mlx import generate
    from mlx_lm.models.cache import BatchKVCache

    from gvpo_core.training.config import ConfigError

    scorer = of_policy.scorer
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
        with pytest.raises(ConfigError, match="decodes differently with its cache and without"):
            generate.check(scorer)


def waits(monkeypatch) -> list[str]:
    """Grows by one at each call with which the host waits for the device."""
    from gvpo_mlx import choice

    found, plain, inside = [], {"eval": mx.eval, "array": np.array}, []

    def evaluated(*arrays):
        found.append("eval")
        inside.append(1)  # `np.array` then copies what is there
        return plain["eval"](*arrays)

    def copied(value, *args, **options):
        if isinstance(value, mx.array) and not inside:
            found.append("array")
        return plain["array"](value, *args, **options)

    def to_host(*arrays, plain=choice.to_host):
        try:
            return plain(*arrays)
        finally:
            inside.clear()

    monkeypatch.setattr(mx, "eval", evaluated)
    monkeypatch.setattr(np, "array", copied)
    monkeypatch.setattr(choice, "to_host", to_host)
    return found


@pytest.mark.parametrize("sampling", [Sampling(20), Sampling(20, temperature=0.0), Sampling(20, top_p=0.9)])
def test_the_host_waits_once_a_token(sampling, of_policy, monkeypatch) -> None:
    """Passes are queued; only the choice of a token waits, and the next pass is queued before it."""
    from gvpo_mlx import generate

    found, step = waits(monkeypatch), generate._Decoding.step
    monkeypatch.setattr(generate._Decoding, "step", lambda rows, tokens: found.append("step") or step(rows, tokens))
    (drawn,) = of_policy.generate([(5, 6, 7)], [[1, 2, 3]], sampling)
    tokens = max(len(r.tokens) for r in drawn)
    assert found.count("eval") == tokens > 5
    one = ["eval", "step"] if sampling.top_p < 1 else ["step", "eval"]
    assert found[: 2 * (tokens - 1)] == one * (tokens - 1)


@pytest.mark.parametrize("sampling", [Sampling(40), Sampling(40, temperature=0.0), Sampling(9, temperature=0.7)])
@pytest.mark.parametrize("rows", [3, 100])
def test_a_step_before_the_choice_changes_no_token(rows, sampling, of_policy, monkeypatch) -> None:
    """Nor does a wrong offer, whose step is taken back; with rows that end, are dropped and make room."""
    from gvpo_mlx import generate

    monkeypatch.setattr(of_policy, "_cache_tokens", lambda: rows * (12 + sampling.max_tokens))
    decoding = generate._Decoding
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "takes_back", False)
        right = of_policy.generate(PROMPTS, SEEDS, sampling)
    plain, take_back, taken, offers = generate.offer, decoding.take_back, [], []
    monkeypatch.setattr(decoding, "take_back", lambda self: taken.append(1) or take_back(self))
    assert of_policy.generate(PROMPTS, SEEDS, sampling) == right and not taken

    def sometimes_wrong(*given):
        offered = plain(*given)
        offers.append(offered)
        return offered._replace(tokens=(offered.tokens + len(offers) % 3) % tiny_models.VOCABULARY)

    if sampling.temperature:  # at 0 the host decides nothing
        monkeypatch.setattr(generate, "offer", sometimes_wrong)
        assert of_policy.generate(PROMPTS, SEEDS, sampling) == right
        assert len(taken) > 5


def test_a_block_that_rounding_misses_is_fetched_again(monkeypatch) -> None:
    """A number whose float32 product lies in the next block of 256 tokens."""
    from gvpo_mlx import choice

    logits = mx.zeros((1, 1024))  # every token has mass 1: the block's border is at 0.25 exactly
    number = np.nextafter(0.25, 0.0)  # 0.25 in float32
    found = waits(monkeypatch)
    assert choice.pick(logits, np.asarray([number]), Sampling(1)).tolist() == [255]
    assert len(found) == 2
    assert choice.pick(logits, np.asarray([0.25]), Sampling(1)).tolist() == [256]
    assert len(found) == 3

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
    from gvpo_mlx import generate

    found, plain, inside = [], {"eval": mx.eval, "array": np.array}, []

    def evaluated(*arrays):
        found.append("eval")
        inside.append(1)  # `np.array` then copies what is there
        return plain["eval"](*arrays)

    def copied(value, *args, **options):
        if isinstance(value, mx.array) and not inside:
            found.append("array")
        return plain["array"](value, *args, **options)

    def to_host(*arrays, plain=generate._to_host):
        try:
            return plain(*arrays)
        finally:
            inside.clear()

    monkeypatch.setattr(mx, "eval", evaluated)
    monkeypatch.setattr(np, "array", copied)
    monkeypatch.setattr(generate, "_to_host", to_host)
    return found


@pytest.mark.parametrize("sampling", [Sampling(20), Sampling(20, temperature=0.0), Sampling(20, top_p=0.9)])
def test_the_host_waits_once_a_token(sampling, of_policy, monkeypatch) -> None:
    """Prefill and forward passes are queued; only the choice of a token waits."""
    queued, plain = [], mx.async_eval
    found = waits(monkeypatch)
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: queued.append(1) or plain(*arrays))
    (drawn,) = of_policy.generate([(5, 6, 7)], [[1, 2, 3]], sampling)
    tokens = max(len(r.tokens) for r in drawn)
    assert found == ["eval"] * tokens and tokens > 5
    assert len(queued) == tokens  # one of them the prefill


def test_a_block_that_rounding_misses_is_fetched_again(monkeypatch) -> None:
    """A number whose float32 product lies in the next block of 256 tokens."""
    from gvpo_mlx import generate

    logits = mx.zeros((1, 1024))  # every token has mass 1: the block's border is at 0.25 exactly
    number = np.nextafter(0.25, 0.0)  # 0.25 in float32
    found = waits(monkeypatch)
    assert generate.pick(logits, np.asarray([number]), Sampling(1)).tolist() == [255]
    assert len(found) == 2
    assert generate.pick(logits, np.asarray([0.25]), Sampling(1)).tolist() == [256]
    assert len(found) == 3

"""What only gvpo_mlx's sampling has: one prefill a prompt, padding that is not always exact, a check at load."""

import pytest
import tiny_models
from mlx_policies import policy
from required import require

require(subject="mlx")

import mlx.core as mx

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


def test_prompts_of_one_length_alone_are_decoded_together_where_padding_is_not_exact(of_policy, monkeypatch) -> None:
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
        with pytest.raises(ConfigError, match="decodes with its cache otherwise than without"):
            generate.check(scorer)


def test_a_step_is_queued_and_the_choice_of_tokens_waits(of_policy, monkeypatch) -> None:
    """`eval` waits at prefill alone; each later token's forward pass starts while the host prepares its choice."""
    waits, queued, plain = [], [], {name: getattr(mx, name) for name in ("eval", "async_eval")}
    monkeypatch.setattr(mx, "eval", lambda *arrays: waits.append(1) or plain["eval"](*arrays))
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: queued.append(1) or plain["async_eval"](*arrays))
    (drawn,) = of_policy.generate([(5, 6, 7)], [[1, 2, 3]], Sampling(20))
    assert len(waits) == 1
    assert len(queued) == max(len(r.tokens) for r in drawn) - 1 > 5

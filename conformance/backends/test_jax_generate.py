"""What only gvpo_jax's sampling has: programs, and how few they are."""

import numpy as np
import pytest
import tiny_models
from jax_policies import policy
from required import require

require(subject="jax")

from gvpo_jax import decoding as sampler
from gvpo_jax import generate, programs, rows

from gvpo_core.training.sampling import Sampling, row_seed


@pytest.mark.slow
def test_a_run_compiles_a_handful_of_programs(tmp_path) -> None:
    of_policy = policy(tiny_models.write_model("llama", tmp_path))
    draw, before = np.random.default_rng(0), len(of_policy.programs)
    for step in range(12):
        prompts = [tuple(draw.integers(1, 96, int(draw.integers(3, 16))).tolist()) for _ in range(4)]
        of_policy.generate(prompts, [[row_seed(step, i, j) for j in range(4)] for i in range(4)], Sampling(10))
    assert len(of_policy.programs) - before == 2  # prefill and decode


def test_prompts_are_padded_to_few_lengths() -> None:
    lengths = range(1, 1025)
    for responses, most, longest in ((16, 4096, 1), (8, 2048, 2), (4, 64, 16), (1, 64, 16)):
        room = rows.bucket(most)
        widths = [generate.prompt_width(n, responses, room) for n in lengths]
        assert len(set(widths)) <= longest
        assert all(n <= width for n, width in zip(lengths, widths, strict=True))
        added = [width - rows.bucket(n) for n, width in zip(lengths, widths, strict=True)]
        assert max(added) <= responses * room / 32


def decoding(of_policy) -> list[str]:
    return [p.as_text() for key, p in of_policy.programs.used.items() if key[0] is sampler.decode]


@pytest.mark.slow
def test_a_token_reads_what_is_filled_of_the_cache(tmp_path, monkeypatch) -> None:
    """The same samples whether the whole cache is read or its filled quarters, a loop each."""
    of_policy = policy(tiny_models.write_model("llama", tmp_path))
    given = ([(5, 6, 7), (9, 8, 7, 6)], [[1, 2, 3], [4, 5, 6]], Sampling(60))
    of_policy.programs.used.clear()
    whole, sums = of_policy.sample(*given)
    assert max(len(r.tokens) for row in whole for r in row) > 40
    (text,) = decoding(of_policy)
    loops = text.count(" while(")
    monkeypatch.setattr(sampler, "FEWEST", 8)
    monkeypatch.setattr(programs, "_kept", {})
    assert sampler.filled_sizes(64) == [16, 32, 48, 64]
    of_policy.programs.used.clear()
    parts, again = of_policy.sample(*given)
    (text,) = decoding(of_policy)
    assert text.count(" while(") > loops > 0
    assert parts == whole
    np.testing.assert_allclose(np.concatenate(again), np.concatenate(sums), rtol=0, atol=1e-4)


def test_the_sizes_of_a_cache_end_with_all_of_it(monkeypatch) -> None:
    for room in (32, 128, 160, 448, 1024, 4096):
        sizes = sampler.filled_sizes(room)
        assert sizes[-1] == room and len(sizes) <= 4
        for t in range(room):
            assert t < sizes[t // sizes[0]] <= t + max(128, -(-room // 4))
    read = sum(sampler.filled_sizes(4096)[t // 1024] for t in range(4096))
    assert read <= 1.26 * sum(range(1, 4097))  # 2.0 where all of it is read

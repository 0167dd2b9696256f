"""Packed rows by blocks: which blocks are visited, and that log-probs are those of the dense mask, on CPU."""

import logging

import numpy as np
import pytest
import tiny_models
from batches import batch
from required import require
from torch_policies import policy
from trees import branches, visible

require(subject="torch")
import block_kernel
import torch
from gvpo_torch import blocks, check, model

from gvpo_core.training.policy import Batch

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # as it is on CPU


Of = tuple[np.ndarray, np.ndarray]  # (T,) segments and last


def row(prompt: int, responses: list[int], padding: int = 0) -> Of:
    """Of responses that share nothing after their prompt."""
    return branches(prompt, [(0, length - 1) for length in responses], padding)


ROWS = {
    "several": [row(150, [140, 70, 200, 33], 20), row(300, [200, 114])],
    "one block": [row(3, [5, 4])],
    "edges of blocks": [row(128, [129, 129, 257]), row(256, [257], 128)],
    "a long prompt": [row(700, [2, 1, 9])],
    "no padding": [row(511, [2, 130, 1])],
    "common beginnings": [
        branches(40, [(0, 300), (200, 150), (250, 10), (0, 20), (3, 260)], 30),
        branches(128, [(0, 256), (128, 128), (256, 128)]),
    ],
    "a chain with leaves": [branches(100, [(0, 60), *[(60 * i, 60 * j) for i in range(1, 5) for j in (3, 1)]], 5)],
}


def stacked(name: str) -> Of:
    """(B, T) each, padded to the longest row."""
    longest = max(len(segments) for segments, _ in ROWS[name])
    pad = lambda x: np.pad(x, (0, longest - len(x)), constant_values=-1)
    segments, last = zip(*ROWS[name], strict=True)
    return np.stack([*map(pad, segments)]), np.stack([*map(pad, last)])


@pytest.mark.parametrize("name", ROWS)
def test_blocks_are_those_with_visible_pairs(name) -> None:
    segments, last = stacked(name)
    longest, n = segments.shape[1], blocks.BLOCK
    found, pairs = blocks.kinds(segments, last), np.stack([*map(visible, segments, last)])
    for b in range(len(segments)):
        for i in range(found.shape[1]):
            for j in range(found.shape[2]):
                inside = pairs[b, i * n : (i + 1) * n, j * n : (j + 1) * n]
                assert (found[b, i, j] > 0) == inside.any(), (b, i, j)
                assert found[b, i, j] != 2 or inside.all(), (b, i, j)
                if j < i and (i + 1) * n <= longest:
                    assert found[b, i, j] == 2 or not inside.all(), (b, i, j)


def test_visited_blocks_of_the_jobs() -> None:
    """J1 and J2 of docs/scaling.md, every response at its full length."""
    for prompt, response, k, bound in ((512, 2048, 8, 0.105), (1024, 4096, 16, 0.05)):
        segments, last = row(prompt, [response] * k)
        assert 0.9 * bound < (blocks.kinds(segments[None], last[None]) > 0).mean() <= bound


def test_a_branch_is_not_visited_by_its_siblings() -> None:
    """8 leaves of 512 tokens after 512 that they share: each block of a leaf sees four of those and its own."""
    segments, last = branches(512, [(0, 1024), *[(512, 512)] * 7])
    visited = (blocks.kinds(segments[None], last[None]) > 0)[0].sum(1)
    assert visited.tolist() == [*range(1, 9), *range(9, 13), *[9, 10, 11, 12] * 7]


def long_batch() -> Batch:
    """Two groups whose packed rows take several blocks."""
    draw = np.random.default_rng(2)
    tokens = lambda n: tuple(draw.integers(0, tiny_models.VOCABULARY, n).tolist())
    prompts = [tokens(150), tokens(20)]
    responses = [tokens(n) for n in (140, 1, 90, 33, 60)]
    responses[2], responses[4] = responses[0][:70] + responses[2], responses[3] + responses[4]
    return Batch([prompts[0]] * 3 + [prompts[1]] * 2, responses, [0, 0, 0, 1, 1])


@pytest.mark.parametrize("family", tiny_models.FULL_ATTENTION)
def test_log_probs_are_those_of_the_dense_mask(family, tmp_path, monkeypatch) -> None:
    folder = tiny_models.make_model(family, tmp_path, max_position_embeddings=512)
    of_policy, of = policy(folder), long_batch()
    assert of_policy.packed and not of_policy.scorer.in_blocks
    dense, drawn = of_policy.logprobs(of), of_policy.generate([(5, 6)], [[1, 2]], sampling())
    assert not of_policy.describe().memory.in_blocks
    assert check.in_blocks(of_policy.scorer, of_policy.device)
    assert of_policy.describe().memory.in_blocks
    monkeypatch.setattr(model, "_attention", None)  # no dense mask
    made = []
    plain = blocks.mask
    monkeypatch.setattr(blocks, "mask", lambda *given: made.append(plain(*given)) or made[-1])
    np.testing.assert_allclose(of_policy.logprobs(of), dense, rtol=0, atol=2e-3)
    assert made
    assert of_policy.generate([(5, 6)], [[1, 2]], sampling()) == drawn


@pytest.mark.parametrize("anew", [False, True])
def test_the_reference_is_scored_as_the_policy_is(anew, tmp_path, monkeypatch) -> None:
    """By blocks, and without padding where it counts; also the initial model that is read again after a renewed one."""
    monkeypatch.setattr(check, "FAST", ("cpu",))
    monkeypatch.setattr(blocks, "WITHOUT_GRADIENT", ())
    monkeypatch.setattr(blocks, "flex_attention", block_kernel.flex_attention)
    folder = tiny_models.make_model("qwen2", tmp_path / "model", max_position_embeddings=512)
    of_policy, of = policy(folder, reference=True), long_batch()
    assert of_policy.scorer.in_blocks, "the policy is not scored by blocks"
    if anew:
        (tmp_path / "initial").mkdir()
        of_policy.save(tmp_path / "initial")
        of_policy.renew_reference()
        of_policy.restore(tmp_path / "initial")
    with of_policy._reference.scoring() as reference:
        assert reference is not of_policy.scorer
    monkeypatch.setattr(model, "_attention", None)  # no dense mask
    block_kernel.calls.clear()
    found = of_policy.logprobs(of, reference=True)
    visited = [*block_kernel.calls]
    assert visited
    block_kernel.calls.clear()
    np.testing.assert_allclose(found, of_policy.logprobs(of), rtol=0, atol=1e-5)
    assert block_kernel.calls == visited


def test_the_reference_sees_no_padding_where_that_counts(tmp_path, monkeypatch) -> None:
    own = check.check_whole

    def found(scorer, *given):
        scorer.masks_padding = True  # as of a model whose tokens depend on the padding after them
        return own(scorer, *given)

    monkeypatch.setattr(check, "check_whole", found)
    of_policy = policy(tiny_models.make_model("llama", tmp_path), layout="plain", reference=True)
    masks, sees = [], model.Scorer._sees
    monkeypatch.setattr(model.Scorer, "_sees", lambda *given: masks.append(sees(*given)) or masks[-1])
    of_policy.logprobs(batch(), reference=True)
    assert any(mask is not None for mask in masks)


def sampling():
    from gvpo_core.training.sampling import Sampling

    return Sampling(6)


def test_bfloat16_goes_by_blocks(tmp_path) -> None:
    of_policy, of = (
        policy(tiny_models.make_model("qwen2", tmp_path, max_position_embeddings=512), dtype="bfloat16"),
        long_batch(),
    )
    dense = of_policy.logprobs(of)
    assert check.in_blocks(of_policy.scorer, of_policy.device)
    lengths = np.asarray([len(response) for response in of.responses])
    assert (np.abs(of_policy.logprobs(of) - dense) / lengths).mean() < 0.02


@pytest.mark.parametrize("fault", ["wrong", "fails"])
def test_what_blocks_get_wrong_takes_the_dense_mask_by_name(fault, tmp_path, monkeypatch, caplog) -> None:
    of_policy = policy(tiny_models.make_model("llama", tmp_path, max_position_embeddings=512))
    before, dense = of_policy.scorer.base.config._attn_implementation, of_policy.logprobs(long_batch())
    plain = blocks.flex_attention

    def spoiled(query, *given, **options):
        if fault == "fails":
            raise RuntimeError("no kernel for this device")
        return plain(query * 1.1, *given, **options)

    monkeypatch.setattr(blocks, "flex_attention", spoiled)
    with caplog.at_level(logging.INFO, "gvpo.torch"):
        assert not check.in_blocks(of_policy.scorer, of_policy.device)
    said = "no kernel for this device" if fault == "fails" else "by blocks log-probs differ by up to"
    assert "packed rows take a dense mask" in caplog.text and said in caplog.text
    assert of_policy.scorer.base.config._attn_implementation == before
    np.testing.assert_array_equal(of_policy.logprobs(long_batch()), dense)


@pytest.mark.parametrize("kind", [{}, {"lora_rank": 2}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("spoiled", [False, True])
def test_gradients_are_compared_at_load(spoiled, kind, tmp_path, monkeypatch, caplog) -> None:
    """Of LoRA too, whose first matrices alone have gradient 0; a gradient of 0 passes in 16 bits neither."""
    of_policy = policy(tiny_models.make_model("qwen2", tmp_path, max_position_embeddings=512), **kind)

    def kernel(query, *given, **options):
        query = query.detach() + 0 * (query - query.detach()) if spoiled else query
        return block_kernel.flex_attention(query, *given, **options)

    monkeypatch.setattr(blocks, "WITHOUT_GRADIENT", ())
    monkeypatch.setattr(blocks, "flex_attention", kernel)
    monkeypatch.setattr(check, "_in_16_bits", lambda scorer: "dtype" in kind)  # as a sharded model is checked
    block_kernel.calls.clear()
    with caplog.at_level(logging.INFO, "gvpo.torch"), of_policy.scorer.autocast():
        assert check.in_blocks(of_policy.scorer, of_policy.device) != spoiled
    assert block_kernel.calls and ("by blocks gradients differ" in caplog.text) == spoiled


def test_windows_and_sinks_are_not_computed_by_blocks() -> None:
    of = blocks.mask(*stacked("one block"), torch.device("cpu"))
    q = torch.zeros(1, 2, 10, 4)
    for options in ({"sliding_window": 4}, {"s_aux": torch.zeros(2)}):
        with pytest.raises(NotImplementedError, match="a window or sinks"):
            blocks._attention(torch.nn.Module(), q, q, q, of, **options)


def test_a_soft_cap_is_applied() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 10, 4, generator=draw) for _ in range(3))
    segments, last = stacked("one block")
    of = blocks.mask(segments, last, q.device)
    found, _ = blocks._attention(torch.nn.Module(), q, k, v, of, softcap=0.7, scaling=1.0)
    scores = 0.7 * torch.tanh(q @ k.transpose(2, 3) / 0.7)
    scores = scores.masked_fill(~torch.from_numpy(visible(segments[0], last[0])), -torch.inf)
    torch.testing.assert_close(found.transpose(1, 2), scores.softmax(-1) @ v)


@pytest.mark.slow
def test_rows_of_other_lengths_are_not_compiled_again() -> None:
    """torch gives up after 8 programs: 3 serve all lengths and numbers of rows, 6 with and without gradients."""
    from torch._dynamo.testing import CompileCounter

    counter, draw = CompileCounter(), np.random.default_rng(0)
    compiled = torch.compile(blocks.flex_attention, dynamic=True, fullgraph=True, backend=counter)
    for rows in (1, 1, 2, 3, 1, 2, 5, 1):
        of = row(int(draw.integers(130, 400)), draw.integers(130, 300, 3).tolist())
        segments, last = (np.repeat(x[None], rows, 0) for x in of)
        assert segments.shape[1] > blocks.NARROWEST
        q, k = (torch.zeros(rows, heads, segments.shape[1], 8) for heads in (4, 2))
        compiled(q, k, k, block_mask=blocks.mask(segments, last, q.device), enable_gqa=True, scale=0.25)
    assert 1 <= counter.frame_count <= 3


def test_plain_rows_take_no_mask(tmp_path, monkeypatch) -> None:
    """Padding comes after all that counts: causal attention alone is exact, and has kernels of its own."""
    of_policy = policy(tiny_models.make_model("llama", tmp_path), layout="plain")
    masks = []
    plain = model.Scorer._sees
    monkeypatch.setattr(model.Scorer, "_sees", lambda *given: masks.append(plain(*given)) or masks[-1])
    of = batch()
    found = of_policy.logprobs(of)
    assert masks and all(mask is None for mask in masks)
    of_policy.scorer.masks_padding = True
    np.testing.assert_allclose(found, of_policy.logprobs(of), rtol=0, atol=1e-4)
    assert masks[-1] is not None

"""Decoding in buffers of fixed size, as on CUDA, draws the tokens of the plain loop; here without graphs, on CPU."""

import re

import pytest
import tiny_models
import torch_policies
from required import require
from torch_policies import policy

require(subject="torch")
import torch
from gvpo_torch import check, decode_attention, fixed, generate, model
from torch.utils._python_dispatch import TorchDispatchMode

from gvpo_core.training.policy import layout
from gvpo_core.training.sampling import Sampling, row_seed

FAMILIES = ["llama", "qwen2", "qwen3"]
PROMPTS = [(5, 6, 7), tuple(range(20, 32)), (9,)]
SEEDS = [[row_seed(1, i, j) for j in range(size)] for i, size in enumerate((3, 1, 4))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_models.made_once(tmp_path_factory)


def sampled(of_policy, sampling: Sampling, **options):
    return torch_policies.drawn(of_policy, PROMPTS, SEEDS, sampling, **options)


@pytest.mark.parametrize("kind", [{}, {"lora_rank": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_draws_the_tokens_of_the_plain_loop(family, kind, folders, monkeypatch):
    """Beyond the first size of the buffers, with rows that end early and are dropped, prompts padded."""
    monkeypatch.setattr(fixed, "FIRST_TOKENS", 5)
    monkeypatch.setattr(fixed, "WAIT_EVERY", 4)
    of_policy = policy(folders(family), **kind)
    assert decode_attention.fits(of_policy.scorer)
    made = []
    monkeypatch.setattr(fixed, "FixedRows", lambda *given: made.append(Watched(*given)) or made[-1])
    for sampling in (Sampling(70), Sampling(9, temperature=0.0), Sampling(9, temperature=0.7, top_k=5, top_p=0.9)):
        found = [sampled(of_policy, sampling, in_fixed_buffers=fixed_too) for fixed_too in (False, True)]
        assert found[0] == found[1]
    assert len(made) == 3 and made[0].grown > 1 and made[0].kept, "buffers neither grew nor lost rows"
    assert [rows.placed for rows in made] == [1, 1, 1]
    assert of_policy.scorer.base.config._attn_implementation != decode_attention.ATTENTION


@pytest.mark.parametrize("sampling", [Sampling(70), Sampling(33, temperature=0.0), Sampling(4), Sampling(1)], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_waiting_rows_take_the_places_of_those_that_ended(rows, sampling, folders, monkeypatch):
    """The same tokens as all at once, in the buffers of a few rows: a response depends on none beside it."""
    monkeypatch.setattr(fixed, "FIRST_TOKENS", 5)
    monkeypatch.setattr(fixed, "WAIT_EVERY", 4)
    of_policy = policy(folders("llama"))
    together = sampled(of_policy, sampling, in_fixed_buffers=False)
    made = []
    monkeypatch.setattr(fixed, "FixedRows", lambda *given: made.append(Watched(*given)) or made[-1])
    few = rows * (12 + sampling.max_tokens)  # tokens of cache
    assert sampled(of_policy, sampling, in_fixed_buffers=True, cache_tokens=few) == together
    (buffers,) = made
    assert buffers.placed > 2 and buffers.bias.shape[0] <= rows and buffers.slots <= 12 + sampling.max_tokens + 7


@pytest.mark.parametrize("rows", [8, 2], ids=["all rows at once", "rows wait for a place"])
def test_the_host_waits_once_in_16_tokens(rows, folders, monkeypatch):
    """For tokens and ends in one copy; a row that takes another's place adds no wait, beside those of its prefill."""
    of_policy = policy(folders("llama"))
    waits, steps, prefills = [], [], []
    for name in ("cpu", "item", "tolist", "__int__", "__bool__"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *given, own=own: waits.append(1) or own(self, *given))
    advance, prefill = fixed.FixedRows.advance, generate._prefill
    monkeypatch.setattr(fixed.FixedRows, "advance", lambda *given: steps.append(1) or advance(*given))

    def prefilled(*given):  # transformers looks at the mask of the prompts
        before = len(waits)
        prefills.append(1)
        result = prefill(*given)
        del waits[before:]
        return result

    monkeypatch.setattr(generate, "_prefill", prefilled)
    drawn = sampled(of_policy, Sampling(64), in_fixed_buffers=True, cache_tokens=rows * (12 + 64))
    longest = max(len(r.tokens) for row in drawn for r in row)
    assert longest > 16 and len(prefills) == (2 if rows == 2 else 1)  # of two prompts and one, and of all three
    at_limit = sum(len(r.tokens) == 64 for row in drawn for r in row)  # known to the host, which looks then
    assert len(waits) <= -(-(len(steps) + 1) // 16) + at_limit * (rows == 2)


class Watched(fixed.FixedRows):
    grown = kept = placed = 0

    def grow(self) -> None:
        self.grown += 1
        super().grow()

    def place(self, *given) -> None:
        self.placed += 1
        super().place(*given)

    def keep(self, *given) -> None:
        self.kept += 1
        super().keep(*given)


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "lora_rank": 2}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_is_compared_with_scoring_at_load(family, settings, folders, monkeypatch, caplog):
    of_policy = policy(folders(family), **settings)
    batch = layout.check_batch(of_policy.scorer.base.get_output_embeddings().weight.shape[0])
    plain = check._by_response(of_policy.scorer, batch, False, of_policy.device)
    with torch.no_grad():
        assert check.decodes_fixed(of_policy.scorer, batch, plain, of_policy.device)
        monkeypatch.setattr(decode_attention.Layer, "update", lambda layer, k, v, *a, **o: (layer.keys, layer.values))
        assert not check.decodes_fixed(of_policy.scorer, batch, plain, of_policy.device)
        assert re.search(r"sampling waits for the device at each token; .* \(log-probs then differ by", caplog.text)

        def broken(*given):
            raise RuntimeError("no kernel for these sizes\nand more")

        caplog.clear()
        monkeypatch.setattr(decode_attention, "attended", broken)
        assert not check.decodes_fixed(of_policy.scorer, batch, plain, of_policy.device)
        assert "(RuntimeError: no kernel for these sizes)" in caplog.text


@pytest.mark.parametrize("family", ["gemma3_text", "mistral", "gpt2"])
def test_other_attention_takes_the_plain_loop(family, folders, monkeypatch):
    of_policy = policy(folders(family))
    if family == "mistral":  # a window without a list of layers
        monkeypatch.setattr(of_policy.scorer.config, "sliding_window", 8)
        assert not getattr(of_policy.scorer.config, "layer_types", None)
    batch = layout.check_batch(of_policy.scorer.base.get_output_embeddings().weight.shape[0])
    plain = check._by_response(of_policy.scorer, batch, False, of_policy.device)
    with torch.no_grad():
        decodes = check.decodes_fixed(of_policy.scorer, batch, plain, of_policy.device)
    windows = getattr(of_policy.scorer.config, "sliding_window", None) is not None
    assert not (decodes and windows)


@pytest.mark.parametrize("broken", [True, False], ids=["ending the capture raises too", "the capture ends"])
def test_a_layer_that_cannot_be_captured_is_decoded_without_graphs(broken, folders, monkeypatch, caplog):
    """CUDA breaks a capture off where the host waits; PyTorch refuses some calls before they reach it."""
    of_policy, captures = policy(folders("llama")), []
    plain = sampled(of_policy, Sampling(12), in_fixed_buffers=True)

    class Capture:
        def __init__(self, graph, pool) -> None:
            captures.append(graph)
            assert pool == "the pool"

        def __enter__(self) -> None:
            pass

        def __exit__(self, *raised) -> None:
            if broken:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(fixed.FixedRows, "logits", nothing_while_capturing(captures))
    ended = []
    monkeypatch.setattr(fixed, "_end_capture", lambda *given: ended.append(given))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    of_policy.scorer.in_graphs = True
    assert sampled(of_policy, Sampling(12), in_fixed_buffers=True) == plain
    assert len(captures) == 1 and not of_policy.scorer.in_graphs
    assert ended == [("the stream", "the pool")] * broken
    assert "tokens are drawn without CUDA graphs (a copy to the host)" in caplog.text


def nothing_while_capturing(captures):
    """`FixedRows.logits`; while a graph is captured nothing is computed: here, an error ends the capture."""
    plain = fixed.FixedRows.logits

    def logits(rows):
        if len(captures) == 1 and captures[0] is not None:
            captures[0] = None
            raise RuntimeError("a copy to the host")
        return plain(rows)

    return logits


def test_layers_are_held_in_the_dtype_of_products_and_put_back(folders):
    of_policy = policy(folders("llama"), dtype="bfloat16")
    before = {name: p.detach().clone() for name, p in of_policy.scorer.named_parameters()}
    linear = of_policy.scorer.decoder.layers[0].mlp.up_proj
    with torch.inference_mode(), of_policy.scorer.autocast():
        x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0)).to(of_policy.device)
        plain = linear(x)
        with model.products_in_compute_dtype(of_policy.scorer):
            assert linear.weight.dtype == torch.bfloat16
            assert of_policy.scorer.base.get_input_embeddings().weight.dtype == torch.float32
            held = linear(x)
    assert torch.equal(held, plain)
    for name, p in of_policy.scorer.named_parameters():
        assert torch.equal(p, before[name]) and p.dtype == before[name].dtype


def test_a_linear_layer_is_cast_once_a_rollout(folders):
    """Not once a token; the samples are those of the casts."""

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default):
                narrow = args[0].dtype is torch.float32 and result.dtype is torch.bfloat16
                self.count += narrow and args[0].shape in shapes
            return result

    of_policy = policy(folders("llama"), dtype="bfloat16")
    layers = [p for *_, p in model.cast_parameters(of_policy.scorer)]
    shapes = {p.shape for p in layers if p.ndim == 2}
    with Casts() as casts:
        drawn = of_policy.generate([(1, 5, 9), (1, 7)], [[0, 1], [2]], Sampling(20))
    assert max(len(r.tokens) for row in drawn for r in row) > 5
    assert casts.count == sum(p.ndim == 2 for p in layers) > 0
    assert all(p.dtype == torch.float32 for p in of_policy.scorer.parameters())


def test_what_hangs_on_a_gradient_hangs_there_after_sampling(folders):
    """DDP's hooks do: they were lost where a parameter had held data of another dtype meanwhile."""
    of_policy = policy(folders("llama"), dtype="bfloat16")
    weight = of_policy.scorer.decoder.layers[0].mlp.up_proj.weight
    accumulator = lambda: weight.expand_as(weight).grad_fn.next_functions[0][0]
    before, called = accumulator(), []
    before.register_hook(lambda *_: called.append(1))
    of_policy.generate([(1, 5, 9)], [[0]], Sampling(3))
    assert accumulator() is before
    weight.sum().backward()
    assert called

"""A CUDA device takes the CPU's step, samples its tokens and scores as it does: nox -s gpu, on a machine with one."""

import os

import numpy as np
import pytest
import tiny_models
from batches import SMOOTH, batch, coefficients_of, sections, step_difference
from required import require

require(subject="torch")
import torch

if not torch.cuda.is_available():
    if "gpu" in os.environ.get("GVPO_SUBJECTS", "").split(","):
        raise RuntimeError("no CUDA device on this machine")
    pytest.skip("no CUDA device: nox -s gpu runs these", allow_module_level=True)

import torch.distributed as dist
from gvpo_torch import blocks, decode_prompts, fixed, load, model
from gvpo_torch.deferred import unread
from gvpo_torch.sharding import is_sharded, shard
from gvpo_torch.update import full_tensor, make_optimizer
from torch.distributed.tensor import DTensor

from gvpo_core.training.sampling import Sampling, row_seed

OF = batch((4, 3, 1, 5))
ROWS = np.arange(len(OF))
KINDS = {"full": {}, "lora": {"lora_rank": 3, "learning_rate": 3.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model("llama-tied", tmp_path_factory.mktemp("llama"), attention_bias=True)


def made(folder, device, **settings):
    return load(*sections(folder, device, SMOOTH | settings), updates=10, reference=False, seed=0)


def parameters(policy):
    return {name: full_tensor(p.detach()).cpu().double().numpy().copy() for name, p in policy._named.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["group", "score"])
def test_the_step_is_the_cpus(kind, strategy, folder):
    moves = []
    for device in ("cpu", "cuda"):
        policy = made(folder, device, strategy=strategy, micro_batch_responses=5, **KINDS[kind])
        before = parameters(policy)
        policy.update(OF, coefficients_of(OF))
        moves.append({name: value - before[name] for name, value in parameters(policy).items()})
    assert step_difference(*moves) < 1e-4


def test_scores_are_the_cpus(folder):
    one, other = (made(folder, device).logprobs(OF) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-4)


def test_bfloat16_is_close(folder):
    one, other = made(folder, "cpu").logprobs(OF), made(folder, "cuda", dtype="bfloat16").logprobs(OF)
    lengths = np.asarray([len(response) for response in OF.responses])
    assert (np.abs(other - one) / lengths).max() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_the_cpus(kind, folder, monkeypatch):
    """By one CUDA graph a token, captured anew where buffers grow and where rows are dropped."""
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(id(graph)) or replay(graph))
    monkeypatch.setattr(fixed, "FIRST_TOKENS", 32)
    prompts = [(5, 6, 7), tuple(range(20, 32))]
    seeds = [[row_seed(1, i, j) for j in range(4)] for i in range(2)]
    for sampling in (Sampling(100), Sampling(40, temperature=0.0), Sampling(40, temperature=0.7, top_k=5, top_p=0.9)):
        one, other = (
            made(folder, device, **KINDS[kind]).generate(prompts, seeds, sampling) for device in ("cpu", "cuda")
        )
        assert other == one
    assert len(replays) > 50 and len(set(replays)) > 1


def test_heads_that_the_kernel_does_not_take_are_sampled_by_products_in_graphs(tmp_path, monkeypatch):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    monkeypatch.setattr(decode_prompts, "_on_cuda", lambda *given: 1 / 0)
    folder = tiny_models.write_model("mistral", tmp_path, head_dim=12)
    seeds = [[row_seed(1, 0, j) for j in range(4)]]
    one, other = (made(folder, device).generate([(5, 6, 7)], seeds, Sampling(60)) for device in ("cpu", "cuda"))
    assert other == one and replays


def refused(x):
    """As PyTorch does of a copy from the host's memory that is not pinned, before CUDA breaks the capture off."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("not while a graph is captured")
    return x


@pytest.mark.parametrize("wait", [lambda x: x + 0 * float(x.sum()), refused], ids=["broken off", "refused before"])
def test_a_failed_capture_leaves_stream_and_allocator_as_they_were(wait, folder, monkeypatch, caplog):
    """A layer that waits for the host: tokens are drawn without a graph, and cached memory can still be released."""
    policy, plain = made(folder, "cuda"), made(folder, "cpu")
    prompts, seeds = [(5, 6, 7)], [[row_seed(1, 0, j) for j in range(3)]]
    layer = policy.scorer.decoder.layers[0].mlp
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: wait(forward(x)))
    stream = torch.cuda.current_stream()
    assert policy.generate(prompts, seeds, Sampling(40)) == plain.generate(prompts, seeds, Sampling(40))
    assert not policy.scorer.in_graphs and "tokens are drawn without CUDA graphs" in caplog.text
    assert torch.cuda.current_stream() == stream
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(int(0.6 * free), dtype=torch.uint8, device="cuda")
    del held  # cached; the next one fits only once it is released
    torch.empty(int(0.8 * free), dtype=torch.uint8, device="cuda")


def test_waiting_rows_take_the_places_of_those_that_ended(folder, monkeypatch):
    """In place: a graph goes on with the rows that are new in its buffers."""
    placed, place = [], fixed.FixedRows.place
    monkeypatch.setattr(fixed.FixedRows, "place", lambda rows, *given: placed.append(rows.graph) or place(rows, *given))
    prompts = [(5, 6, 7), tuple(range(20, 32))]
    seeds = [[row_seed(1, i, j) for j in range(6)] for i in range(2)]
    on_cpu, on_cuda = (made(folder, device) for device in ("cpu", "cuda"))
    monkeypatch.setattr(on_cuda, "_cache_tokens", lambda: 3 * (12 + 60))
    assert on_cuda.generate(prompts, seeds, Sampling(60)) == on_cpu.generate(prompts, seeds, Sampling(60))
    assert len(placed) > 2 and any(graph is not None for graph in placed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 6, 48, 112])
def test_attention_of_decoding_gives_the_normaliser_of_its_softmax(queries, dtype):
    """By the kernel that the rows take, in a graph as there: what plain products give."""
    draw = torch.Generator("cuda").manual_seed(0)
    made = lambda *shape: torch.randn(shape, generator=draw, device="cuda").to(dtype)
    query, keys, values = made(3, 2, queries, 128), made(3, 2, 512, 128), made(3, 2, 512, 128)
    bias = torch.where(made(3, 1, 1, 512) > 0, 0.0, -torch.inf).to(dtype)
    assert decode_prompts._has_kernel(query, values)
    decode_prompts.attended(query, keys, values, bias, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode_prompts.attended(query, keys, values, bias, None)
    query.copy_(made(*query.shape))
    graph.replay()
    mask = bias.expand(3, 2, queries, 512)
    for got, want in zip(found, decode_prompts._products(query, keys, values, mask, None), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got.float(), want, rtol=0, atol=5e-3 if dtype == torch.float32 else 2e-2)


def test_memory_is_the_devices(folder):
    policy = made(folder, "auto")
    assert policy.scorer.decodes_fixed
    assert made(folder, "cuda", dtype="bfloat16").scorer.decodes_fixed
    assert policy.describe().device.startswith("cuda")
    done = policy.update(OF, coefficients_of(OF))
    assert 0 < done.peak_memory <= torch.cuda.get_device_properties(0).total_memory


def test_room_for_samples_includes_what_the_allocator_keeps(folder):
    """Else few rows are drawn together after the first update."""
    policy = made(folder, "cuda")
    before, size = policy._cache_tokens(), torch.cuda.mem_get_info()[0] // 2
    held = torch.empty(size, dtype=torch.uint8, device="cuda")
    assert policy._cache_tokens() < 0.6 * before
    del held
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() >= size
    assert policy._cache_tokens() == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize("always", [False, True])
def test_a_group_of_several_micro_batches_takes_the_cpus_step(always, folder):
    """All forward before one goes back, layers computed again."""
    moves = []
    for device in ("cpu", "cuda"):
        policy = made(folder, device, micro_batch_tokens=20, gradient_checkpointing=always)
        assert policy.defers
        before = parameters(policy)
        policy.update(OF, coefficients_of(OF))
        moves.append({name: value - before[name] for name, value in parameters(policy).items()})
    assert step_difference(*moves) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("always", [False, True])
def test_blocks_take_the_step_of_the_dense_mask(always, dtype, tmp_path):
    """FlexAttention's gradients, with rows of several blocks of 128 tokens and several lengths."""
    folder = tiny_models.write_model("qwen2", tmp_path, max_position_embeddings=1024, hidden_size=96)
    of = batch((3, 2, 4), longest=300)

    def moved(dtype, in_blocks):
        policy = made(folder, "cuda", dtype=dtype, gradient_checkpointing=always, micro_batch_tokens=700)
        assert policy.packed and policy.scorer.in_blocks, "the dense mask was chosen at load; the log says why"
        policy.scorer.in_blocks = in_blocks
        before = parameters(policy)
        policy.update(of, coefficients_of(of))
        return {name: value - before[name] for name, value in parameters(policy).items()}

    right = moved("float32", False)
    blocks, dense = (step_difference(right, moved(dtype, in_blocks)) for in_blocks in (True, False))
    assert blocks < (1e-3 if dtype == "float32" else 1.1 * dense)  # in 16 bits both round


@pytest.mark.parametrize("kind", [{}, {"lora_rank": 3}, {"dtype": "bfloat16"}], ids=str)
def test_deterministic_kernels_repeat_bit_for_bit(kind, tmp_path):
    """Attention by blocks and by a dense mask. The usual kernels differ by 3e-8 here."""
    folder = tiny_models.write_model("qwen2", tmp_path, max_position_embeddings=1024, hidden_size=96)
    for of in (OF, batch((3, 2, 4), longest=300)):
        ends = []
        for _ in range(2):
            policy = made(folder, "cuda", deterministic=True, learning_rate=1e-3, **kind)
            for _ in range(3):
                policy.update(of, coefficients_of(of))
            ends.append(parameters(policy))
        assert step_difference(*ends) == 0.0


def sharded(policy):
    """The policy, its model sharded by FSDP2 over the ranks there are."""
    shard(policy.scorer, policy.device)
    policy._sharded = is_sharded(policy._trained)
    policy._optimizer = make_optimizer(policy.scorer, policy.optimizer_config)
    policy._named = {n.removeprefix("lm."): p for n, p in policy.scorer.named_parameters() if p.requires_grad}
    assert policy._sharded and all(isinstance(p, DTensor) for p in policy._named.values())
    return policy


@pytest.fixture
def one_rank_of_nccl():
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_take_the_step_of_a_copy(kind, dtype, folder, one_rank_of_nccl):
    """FSDP2 over NCCL on one device. Several ranks on one device are not possible: NCCL refuses them."""
    copy, shards = (made(folder, "cuda", dtype=dtype, strategy="score", **KINDS[kind]) for _ in range(2))
    shards = sharded(shards)
    prompts, seeds = [(5, 6, 7), (9,)], [[row_seed(1, i, j) for j in range(3)] for i in range(2)]
    drawn = [policy.generate(prompts, seeds, Sampling(8)) for policy in (copy, shards)]
    assert dtype == "bfloat16" or drawn[0] == drawn[1]
    moves = []
    for policy in (copy, shards):
        before = parameters(policy)
        policy.update(OF, coefficients_of(OF))
        moves.append({name: value - before[name] for name, value in parameters(policy).items()})
    # Adapters on a bfloat16 base differed by 0.6 % on an H200; on CPU by less than 1e-5. The cause was not found: the
    # gathered weights are aligned differently, for which cuBLAS may choose another algorithm.
    assert step_difference(*moves) < (1e-4 if dtype == "float32" else 2e-2 if kind == "lora" else 1e-3)
    lengths = np.asarray([len(response) for response in OF.responses])
    gap = np.abs(shards.logprobs(OF) - copy.logprobs(OF)) / lengths
    assert gap.max() < (0.1 if kind == "lora" and dtype == "bfloat16" else 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_read_saved_and_exported_as_a_copy(kind, folder, tmp_path, one_rank_of_nccl):
    """Read in parts onto the device, copied to the host to be saved, gathered to be exported."""
    copy, shards = (made(folder, "cuda", strategy="score", **KINDS[kind]) for _ in range(2))
    right = dict(copy.scorer.named_parameters())
    scorer = model.load_scorer(copy.config, copy.device, 0, deferred=True)
    assert unread(scorer), "nothing was left to read in parts"
    shard(scorer, copy.device)
    read = dict(scorer.named_parameters())
    assert read.keys() == right.keys()
    for name, p in read.items():
        assert isinstance(p, DTensor) and p.device.type == "cuda" and torch.equal(p.full_tensor(), right[name]), name

    shards = sharded(shards)
    shards.update(OF, coefficients_of(OF))
    (tmp_path / "saved").mkdir()
    shards.save(tmp_path / "saved")
    copy.restore(tmp_path / "saved")
    after = parameters(shards)
    assert all(np.array_equal(value, after[name]) for name, value in parameters(copy).items())
    for policy, out in ((copy, "copy"), (shards, "shards")):
        policy.export(tmp_path / out)
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("copy", "shards")]
    assert files[0] == files[1]
    moves = []
    for policy in (copy, shards):
        policy.update(OF, coefficients_of(OF))
        moves.append({name: value - after[name] for name, value in parameters(policy).items()})
    assert step_difference(*moves) < 1e-4


@pytest.mark.parametrize("kind", [{}, {"lora_rank": 3}, {"gradient_checkpointing": True}], ids=str)
def test_shards_go_by_blocks(kind, tmp_path, one_rank_of_nccl, monkeypatch):
    """FlexAttention within FSDP2: the step of one process with the dense mask."""
    folder = tiny_models.write_model("qwen2", tmp_path, max_position_embeddings=1024, hidden_size=96)
    of, moves, masks = batch((3, 2, 4), longest=300), [], []
    plain = blocks.mask
    monkeypatch.setattr(blocks, "mask", lambda *given: masks.append(1) or plain(*given))
    for in_blocks in (True, False):
        policy = made(folder, "cuda", micro_batch_tokens=700, strategy="score", **kind)
        assert policy.packed and policy.scorer.in_blocks, "the dense mask was chosen at load; the log says why"
        policy = sharded(policy) if in_blocks else policy
        policy.scorer.in_blocks = in_blocks
        before, made_before = parameters(policy), len(masks)
        policy.update(of, coefficients_of(of))
        assert (len(masks) > made_before) == in_blocks
        moves.append({name: value - before[name] for name, value in parameters(policy).items()})
    assert step_difference(*moves) < 1e-3


def test_tf32_is_set_in_passes_alone(folder, monkeypatch):
    seen = []
    score = model.score
    monkeypatch.setattr(
        model, "score", lambda *given: seen.append(torch.backends.cuda.matmul.allow_tf32) or score(*given)
    )
    for settings, inside in (({"dtype": "bfloat16", "lora_rank": 3}, True), ({"dtype": "float32"}, False)):
        policy = made(folder, "cuda", **settings)
        seen.clear()
        policy.update(OF, coefficients_of(OF))
        assert set(seen) == {inside} and not torch.backends.cuda.matmul.allow_tf32

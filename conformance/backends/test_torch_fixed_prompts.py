"""Fixed buffers hold a prompt once for all its rows; attention to it is joined with that to a row's own tokens."""

from collections import Counter, deque

import numpy as np
import pytest
import tiny_models
import torch_policies
from batches import batch
from conversations import play
from places import DEVICE
from required import require
from torch_policies import policy

require(subject="torch")
import torch
from gvpo_torch import check, decode_attention, decode_prompts, fixed, generate
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from gvpo_core.training.policy import layout
from gvpo_core.training.policy.prefixes import Prefixes
from gvpo_core.training.sampling import Sampling, row_seed

PROMPTS = [(5, 6, 7), tuple(range(20, 32)), (9,), (40, 41)]
SIZES = (5, 3, 6, 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_models.made_once(tmp_path_factory)


@pytest.fixture
def watched(monkeypatch):
    """What the buffers of one rollout did."""
    monkeypatch.setattr(fixed, "FIRST_TOKENS", 5)
    monkeypatch.setattr(fixed, "WAIT_EVERY", 4)
    made = []
    monkeypatch.setattr(fixed, "FixedRows", lambda *given: made.append(Watched(*given)) or made[-1])
    return made


class Watched(fixed.FixedRows):
    """Keeps count of prompts, and holds that all results are numbers and that buffers are replaced where it is said."""

    def __init__(self, *given) -> None:
        super().__init__(*given)
        self.held, self.used, self.steps = 0, [], 0

    def _made(self) -> None:
        super()._made()
        self.addresses = None
        self.made = getattr(self, "made", 0) + 1

    def buffers(self) -> dict[str, torch.Tensor]:
        found = {}
        for of, prefix in ((self, ""), (self.prompts, "prompts ")):
            for name, value in vars(of).items():
                many = value if isinstance(value, list) else [value]
                found |= {f"{prefix}{name} {n}": t for n, t in enumerate(many) if isinstance(t, torch.Tensor)}
        return found

    def hold(self, slots, prompts, most) -> None:
        super().hold(slots, prompts, most)
        self.held += len(slots)

    def advance(self, *given) -> None:
        addresses = {name: buffer.data_ptr() for name, buffer in self.buffers().items()}
        assert self.addresses is None or addresses == self.addresses
        super().advance(*given)
        self.addresses = addresses
        self.steps += 1
        assert {name: buffer.data_ptr() for name, buffer in self.buffers().items()} == addresses

    def logits(self) -> torch.Tensor:
        self.used.append(tuple(self.prompts.lines.shape))
        logits = super().logits()
        capturing = DEVICE == "cuda" and torch.cuda.is_current_stream_capturing()  # when no one may wait
        assert capturing or logits.isfinite().all()
        return logits


def loaded(folder, watched):
    """A policy; what its check at load drew is forgotten, which on CUDA goes through the buffers."""
    of_policy = policy(folder)
    watched.clear()
    return of_policy


def drawn(of_policy, prompts, seeds, sampling, *, fixed_too=True, **options):
    return torch_policies.drawn(of_policy, prompts, seeds, sampling, in_fixed_buffers=fixed_too, **options)


def seeds_of(sizes):
    return [[row_seed(1, i, j) for j in range(size)] for i, size in enumerate(sizes)]


@pytest.mark.parametrize("rows", [2, 4, 7])
def test_a_prompt_is_computed_and_held_once_for_rows_that_begin_at_different_times(rows, folders, watched, monkeypatch):
    """Rows draw the plain loop's tokens; slots grow, and are taken again; no buffer is replaced between."""
    of_policy, prefilled, sampling = loaded(folders("llama"), watched), Counter(), Sampling(40)
    seeds = seeds_of(SIZES)
    plain = drawn(of_policy, PROMPTS, seeds, sampling, fixed_too=False)
    prefill = generate._prefill

    def counted(scorer, forward, prompts, chosen, *given):
        prefilled.update(prompts[i] for i, _ in chosen)
        return prefill(scorer, forward, prompts, chosen, *given)

    monkeypatch.setattr(generate, "_prefill", counted)
    room = rows * (12 + sampling.max_tokens)
    assert drawn(of_policy, PROMPTS, seeds, sampling, cache_tokens=room) == plain
    assert prefilled == dict.fromkeys(PROMPTS, 1)
    (buffers,) = watched
    assert buffers.held == len(PROMPTS) and buffers.steps > 40 and buffers.made > 2
    slots, together = (np.asarray(of) for of in zip(*buffers.used, strict=True))
    assert together[0] == min(rows, max(SIZES)) and slots.max() <= rows
    if rows == 4:
        assert (np.diff(slots) > 0).any(), "the room for prompts never grew"
    if rows == 2:
        assert slots.max() < len(PROMPTS), "no slot was taken again"


def test_the_bytes_held_are_those_of_the_prompts_not_of_the_rows(folders, watched) -> None:
    of_policy, prompt = loaded(folders("llama"), watched), tuple(range(20, 60))
    drawn(of_policy, [prompt, (5, 6)], seeds_of((8, 8)), Sampling(4))
    (rows,) = watched
    heads, width = rows.keys[0].shape[1], rows.keys[0].shape[3]
    assert [tuple(keys.shape) for keys in rows.prompts.keys] == [(2, heads, 40, width)] * len(rows.keys)
    assert rows.keys[0].shape == (16, heads, 8, width)
    held = sum(buffer.nbytes for name, buffer in rows.buffers().items() if "keys" in name or "values" in name)
    assert held == 2 * len(rows.keys) * heads * width * 4 * (2 * 40 + 16 * 8)


def test_equal_prompts_of_several_groups_share_a_slot(folders, watched) -> None:
    of_policy, prompts = loaded(folders("llama"), watched), [(5, 6, 7), (9,), (5, 6, 7), (8, 6, 7), (5, 6, 7)]
    seeds = seeds_of((2, 1, 1, 2, 3))
    plain = drawn(of_policy, prompts, seeds, Sampling(12), fixed_too=False)
    for room in (1 << 20, 2 * (3 + 12)):
        assert drawn(of_policy, prompts, seeds, Sampling(12), cache_tokens=room) == plain
        assert watched[-1].held == 3


@pytest.mark.parametrize("rows", [2, 5])
def test_turns_start_from_prompts_and_responses_that_were_held_apart(rows, folders, watched) -> None:
    """Kept states are a prompt's and those of what a row drew after it, also where rows wait and buffers grow."""
    of_policy, ends = loaded(folders("llama"), watched), [0, *range(60, 90)]
    opening = [tuple(range(20, 40)), (5, 6, 7), (9, 5), tuple(range(20, 30))]

    def played(prefixes, fixed_too):
        def draw(prompts, seeds):
            given = {"fixed_too": fixed_too, "prefixes": prefixes, "end": ends}
            return drawn(of_policy, prompts, seeds, Sampling(18), cache_tokens=rows * 60, **given)

        return play(draw, opening, 3, 3, lambda turn: (1, 2 + turn))[0]

    plain, prefixes = played(None, False), Prefixes(1 << 20)
    assert not watched
    assert played(prefixes, True) == plain and prefixes.reused > prefixes.computed
    assert any(made.made > 1 for made in watched)


@pytest.mark.parametrize("kernel", ["products", "CUDA's"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_is_close_to_scoring(family, kernel, folders, monkeypatch) -> None:
    of_policy = policy(folders(family), dtype="bfloat16")
    if kernel == "CUDA's":
        with_the_kernel_of_cuda(monkeypatch)
    given = batch((4, 3, 1, 5))
    assert max(Counter(given.prompts).values()) > 1
    with torch.inference_mode(), of_policy.scorer.autocast():
        plain = check._by_response(of_policy.scorer, given, False, of_policy.device)
        decoded = check._decoded(of_policy.scorer, given, of_policy.device, in_fixed_buffers=True)
    apart = np.concatenate([np.abs(a - b) for a, b in zip(plain, decoded, strict=True)])
    assert 0 < apart.max() < 0.1 and apart.mean() < 0.02


BROKEN = {
    "each line attends to another line's prompt": lambda assign: lambda self, slots: assign(self, slots[::-1]),
    "padding is seen": lambda hold: lambda self, slots, prompts: hold(self, slots, prompts._replace(mask=None)),
    "the prompt's part does not count": lambda merged: lambda one, other: one[0],
    "the two parts count alike": lambda merged: lambda one, other: (one[0] + other[0]) / 2,
}
PLACES = dict(
    zip(
        BROKEN,
        [(decode_prompts.Prompts, "assign"), (decode_prompts.Prompts, "hold"), *[(decode_attention, "merged")] * 2],
        strict=True,
    )
)


@pytest.mark.parametrize("broken", BROKEN)
def test_the_check_at_load_finds_what_is_wrong_with_prompts(broken, folders, monkeypatch) -> None:
    of_policy = policy(folders("llama"))
    given = layout.check_batch(of_policy.scorer.base.get_output_embeddings().weight.shape[0])
    assert sorted(Counter(given.prompts).values()) == [2, 3] and len({len(p) for p in given.prompts}) == 2
    plain = check._by_response(of_policy.scorer, given, False, of_policy.device)
    with torch.no_grad():
        assert check.decodes_fixed(of_policy.scorer, given, plain, of_policy.device)
        of, name = PLACES[broken]
        monkeypatch.setattr(of, name, BROKEN[broken](getattr(of, name)))
        assert not check.decodes_fixed(of_policy.scorer, given, plain, of_policy.device)


def test_the_check_of_later_turns_finds_states_in_the_wrong_order(folders, monkeypatch) -> None:
    of_policy, states_of, calls = policy(folders("llama")), fixed.FixedRows.states, []
    monkeypatch.setattr(fixed.FixedRows, "states", lambda *given: calls.append(1) or states_of(*given))
    of_policy.scorer.decodes_fixed = True
    assert check.continues(of_policy.scorer, of_policy.device) == "" and calls
    turned = lambda *given: [(k.roll(1, 1), v.roll(1, 1)) for k, v in states_of(*given)]
    monkeypatch.setattr(fixed.FixedRows, "states", turned)
    assert "log-probs then differ by up to" in check.continues(of_policy.scorer, of_policy.device)


# -- the parts


def by_hand(query, keys, values, bias, scaling=None):
    """Attention and the logarithm of its normaliser, in float64."""
    q, k, v, b = (x.double().numpy() for x in (query, keys, values, bias))
    scores = np.einsum("bhmd,bhnd->bhmn", q, k) * (q.shape[-1] ** -0.5 if scaling is None else scaling) + b
    shares = np.exp(scores)
    total = shares.sum(-1)
    return np.einsum("bhmn,bhnd->bhmd", shares, v) / total[..., None], np.log(total)


def states(batch, heads, queries, keys, width, values=None, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    made = lambda *shape: torch.randn(shape, generator=draw).to(dtype)
    bias = torch.zeros((batch, 1, 1, keys), dtype=dtype)
    bias[:, :, :, :-3] = torch.where(made(batch, 1, 1, keys - 3) > 0, 0.0, -torch.inf)
    shapes = (batch, heads, queries, width), (batch, heads, keys, width), (batch, heads, keys, values or width)
    return [made(*shape) for shape in shapes] + [bias]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "values"), [(16, 16), (6, 6), (8, 24)], ids=str)
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_attention_and_its_normaliser(queries, width, values, dtype) -> None:
    given = states(3, 2, queries, 24, width, values, dtype)
    for scaling in (None, 0.7):
        out, normaliser = decode_prompts.attended(*given, scaling)
        want, total = by_hand(*given, scaling)
        assert out.shape == want.shape and normaliser.shape == total.shape
        assert out.dtype == normaliser.dtype == torch.float32
        np.testing.assert_allclose(out.double().numpy(), want, rtol=0, atol=1e-5)
        np.testing.assert_allclose(normaliser.double().numpy(), total, rtol=0, atol=1e-5)


def test_two_sets_of_keys_are_joined_as_one() -> None:
    query, keys, values, bias = states(2, 2, 5, 24, 16)
    keys[:, :, :8] *= 30  # far apart: weights of nearly 0 and 1
    of = lambda part: decode_prompts.attended(query, keys[:, :, part], values[:, :, part], bias[..., part], None)
    bias[..., 7] = 0.0
    joined = decode_prompts.merged(of(slice(0, 8)), of(slice(8, 24)))
    np.testing.assert_allclose(joined.numpy(), by_hand(query, keys, values, bias)[0], rtol=0, atol=1e-4)


def test_cuda_s_kernel_takes_what_it_is_given() -> None:
    """By fake tensors. Heads whose sizes are not aligned go without it."""
    for width, has_kernel in ((16, True), (6, False)):
        with FakeTensorMode() as mode:
            made = lambda *shape: FakeTensor(mode, torch.empty(shape, device="meta"), torch.device("cuda", 0))
            query, keys, bias = made(3, 2, 5, width), made(3, 2, 24, width), made(3, 1, 1, 24)
            assert decode_prompts._has_kernel(query, keys) == has_kernel
            out, normaliser = decode_prompts.attended(query, keys, keys, bias, None)
        assert out.shape == (3, 2, 5, width) and normaliser.shape == (3, 2, 5) and out.device.type == "cuda"


def kernel_of_cuda(query, keys, values, bias, with_normaliser, *, scale=None):
    """What CUDA's kernel gives, and what it wants, on CPU: its normaliser is padded to 32 queries."""
    assert with_normaliser is True and {keys.dtype, values.dtype, bias.dtype} == {query.dtype}
    assert bias.shape == (*query.shape[:3], keys.shape[2])
    for tensor in (query, keys, values, bias):
        assert tensor.stride(3) == 1 and all(stride % 8 == 0 for stride in tensor.stride()[:3])
    out, normaliser = (torch.from_numpy(x) for x in by_hand(query, keys, values, bias, scale))
    padded = torch.full((*normaliser.shape[:2], -(-query.shape[2] // 32) * 32), torch.inf)
    padded[:, :, : query.shape[2]] = normaliser
    laid_out = out.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return laid_out, padded, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def with_the_kernel_of_cuda(monkeypatch) -> list[int]:
    """Gives a list of its calls."""
    if DEVICE != "cpu":
        pytest.skip("the device has the kernel itself")
    calls: list[int] = []
    kernel = lambda *given, **options: calls.append(1) or kernel_of_cuda(*given, **options)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", kernel)
    monkeypatch.setattr(decode_prompts, "_has_kernel", lambda query, values: True)
    return calls


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_tokens_are_those_of_cuda_s_kernel(family, folders, watched, monkeypatch) -> None:
    of_policy, seeds = loaded(folders(family), watched), seeds_of(SIZES)
    plain = drawn(of_policy, PROMPTS, seeds, Sampling(24), fixed_too=False)
    calls = with_the_kernel_of_cuda(monkeypatch)
    assert drawn(of_policy, PROMPTS, seeds, Sampling(24), cache_tokens=4 * (12 + 24)) == plain
    assert len(calls) == 2 * len(watched[0].keys) * len(watched[0].used)


def test_slots_are_taken_again_when_the_last_row_of_a_prompt_has_ended() -> None:
    slots, waiting = fixed.Slots([0, 0, 1, 1, 2, 3], 2), deque(range(6))
    assert slots.admit(waiting, 3) == ([0, 1, 2], [0, 2]) and [slots[r] for r in (0, 1, 2)] == [0, 0, 1]
    assert slots.admit(waiting, 2) == ([3], []), "a row found its prompt; the next prompt found no slot"
    slots.end(0)
    slots.end(2)
    assert slots.admit(waiting, 2) == ([], [])
    slots.end(3)
    assert slots.admit(waiting, 2) == ([4], [4]) and slots[4] == 1 and slots[1] == 0 and slots.count == 2
    slots.end(1)
    assert slots.compact() == [1] and slots[4] == 0 and slots.count == 1
    assert slots.admit(waiting, 2) == ([5], [5]) and slots[5] == 1

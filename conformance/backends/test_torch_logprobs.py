"""The tiled head against log_softmax over full logits: values, gradients, memory shape."""

import itertools

import pytest
from required import require

require("torch", subject="torch")

import torch
from gvpo_torch import logprobs
from gvpo_torch.logprobs import token_logprobs

T, H, V = 13, 8, 50
HEADS = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.3},
    "both": {"softcap": 2.0, "scale": 1.7},
}


def arguments(dtype: torch.dtype, bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    draw = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, V, (T,), generator=draw)
    return make(T, H), make(V, H), targets, make(V) if bias else None


def plainly(hidden, weight, targets, bias=None, softcap=None, scale=1.0):
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize("trained", ["hidden", "head", "both"])
@pytest.mark.parametrize("tile", [(1, 1), (3, V), (T, 7), (5, 20), (100, 100)], ids=lambda tile: f"{tile[0]}x{tile[1]}")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_values_and_gradients(head: str, bias: bool, tile: tuple[int, int], trained: str, monkeypatch) -> None:
    monkeypatch.setattr(logprobs, "WIDTH_WANTED", tile[1])
    hidden, weight, targets, offset = arguments(torch.float64, bias)
    found = []
    for compute in (plainly, lambda *a, **k: token_logprobs(*a, tile_bytes=tile[0] * tile[1] * 8, **k)):
        h = hidden.clone().requires_grad_(trained != "head")
        w = weight.clone().requires_grad_(trained != "hidden")
        b = offset.clone().requires_grad_(trained != "hidden") if bias else None
        values = compute(h, w, targets, bias=b, **HEADS[head])
        (values * torch.linspace(-1, 2, T, dtype=torch.float64)).sum().backward()
        found.append([values.detach(), *(x.grad for x in (h, w, b) if x is not None and x.requires_grad)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


@pytest.mark.slow_on("softcap", "scale")
@pytest.mark.parametrize("head", HEADS)
def test_gradcheck(head: str, monkeypatch) -> None:
    monkeypatch.setattr(logprobs, "WIDTH_WANTED", 20)
    hidden, weight, targets, bias = arguments(torch.float64, True)
    for h, w, b in itertools.product((True, False), repeat=3):
        if h or w or b:
            inputs = (
                hidden.clone().requires_grad_(h),
                weight.clone().requires_grad_(w),
                bias.clone().requires_grad_(b),
            )
            compute = lambda h, w, b: token_logprobs(h, w, targets, bias=b, tile_bytes=4 * 20 * 8, **HEADS[head])
            # Of all three together every entry; else one random direction, where only what is trained differs.
            assert torch.autograd.gradcheck(compute, inputs, fast_mode=not (h and w and b))


def test_no_tokens_give_no_logprobs_and_zero_gradients() -> None:
    hidden, weight, targets, _ = arguments(torch.float32, False)
    weight.requires_grad_()
    values = token_logprobs(hidden[:0], weight, targets[:0])
    values.sum().backward()
    assert values.shape == (0,)
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_float64_on_the_rounded_inputs(dtype: torch.dtype) -> None:
    hidden, weight, targets, _ = arguments(dtype, False)
    exact = plainly(hidden.double(), weight.double(), targets)
    values = token_logprobs(hidden, weight, targets)
    assert values.dtype == torch.float32
    # 16-bit products are rounded to 16 bits off CUDA, before the float32 normaliser.
    tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(values.double(), exact, rtol=0, atol=tolerance * 10)


def test_wide_head_under_narrow_hidden_stays_wide() -> None:
    hidden, weight, targets, _ = arguments(torch.float32, False)
    narrow = hidden.bfloat16()
    exact = plainly(narrow.double(), weight.double(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        values = token_logprobs(narrow, weight, targets)
    torch.testing.assert_close(values.double(), exact, rtol=0, atol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets, _ = arguments(torch.float32, False)
    for trains_head in (True, False):
        h, w = (hidden * 1e4).requires_grad_(), weight.clone().requires_grad_(trains_head)
        values = token_logprobs(h, w, targets)
        values.sum().backward()
        assert torch.isfinite(values).all()
        assert torch.isfinite(h.grad).all()


@pytest.mark.parametrize("trains_head", [True, False])
def test_no_array_of_tokens_by_vocabulary_is_made(trains_head: bool, monkeypatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(logprobs, "WIDTH_WANTED", 10)
    tile, largest = 60, 0  # of T * V = 650

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(result):
                if isinstance(x, torch.Tensor) and H not in x.shape:  # not of tokens by hidden, nor vocabulary by it
                    largest = max(largest, x.numel())
            return result

    hidden, weight, targets, _ = arguments(torch.float32, False)
    weight = torch.nn.Parameter(weight, requires_grad=trains_head)
    with Watch():
        token_logprobs(hidden.requires_grad_(), weight, targets, tile_bytes=tile * 4).sum().backward()
    assert largest == tile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(T, H + 1)}, r"hidden has shape \(13, 9\) and head_weight \(50, 8\)"),
        ({"targets": torch.zeros(T + 1, dtype=torch.long)}, r"targets has shape \(14,\); expected \(13,\)"),
        ({"bias": torch.zeros(H)}, r"bias has shape \(8,\); expected \(50,\)"),
        ({"tile_bytes": 0}, "tile_bytes is 0; expected at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message) -> None:
    hidden, weight, targets, _ = arguments(torch.float32, False)
    given = {"hidden": hidden, "head_weight": weight, "targets": targets} | change
    with pytest.raises(ValueError, match=message):
        token_logprobs(**given)

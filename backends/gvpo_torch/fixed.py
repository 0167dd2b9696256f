"""Decoding in buffers of fixed size: no wait for the device but one every few tokens, and on CUDA one graph a token.

Keys, values, tokens and ends stay on the device. Only models whose layers all attend to everything before are decoded
so; the others, and devices other than CUDA, take the loop in `generate`, whose samples are the same up to rounding.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from gvpo_core.training.sampling import Sampling, uniforms
from gvpo_torch.model import Scorer

WAIT_EVERY = 16  # tokens between two looks at which rows have ended
UNIFORMS_AHEAD = 4 * WAIT_EVERY  # random numbers made at once for each row
FIRST_TOKENS = 256  # that the buffers have room for at first; doubled when they are full
EAGER_STEPS = 2  # before a graph is captured, so that libraries are set up
ATTENTION = "gvpo_decode"

Pick = Callable[[Tensor, Tensor, Sampling], Tensor]
Choose = Callable[[Tensor, Sequence[int], int], np.ndarray]


def fits(scorer: Scorer) -> bool:
    """Whether the model may be decoded in fixed buffers; `check` then compares that with scoring."""
    config, base = scorer.config, scorer.base
    layers = getattr(config, "layer_types", None)
    kinds = set(layers or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    plain = scorer.rope is None and not scorer.same_length and not kinds and not (window and not layers)
    able = getattr(base, "_can_set_attn_implementation", lambda: False)()
    return bool(plain and able and base.config is config)


class _Layer(CacheLayerMixin):
    """Keys and values (R, heads, S, D) of a layer, written at slot `at`."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, at: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.at = keys, values, at
        self.is_initialized = True

    def lazy_initialization(self, *states: Tensor) -> None:
        """Made with its buffers."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.at, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.at, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2]) - 1  # of no use here: positions and the mask are given

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])

    get_max_cache_shape = get_max_length  # its name before transformers 5.2x


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """One query a row, (B, H, 1, D), over keys and values (B, G, S, D) that H / G heads share, each read once."""
    if sliding_window is not None or softcap is not None or s_aux is not None or query.shape[2] != 1:
        raise NotImplementedError("attention with a window, a cap or sinks is not decoded in fixed buffers")
    rows, groups, slots, _ = key.shape
    shared = query.reshape(rows, groups, -1, query.shape[-1])  # the heads of a group in the place of queries
    mask = attention_mask.expand(rows, groups, shared.shape[2], slots)
    out = F.scaled_dot_product_attention(shared.to(key.dtype), key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, 1, -1, value.shape[-1]), None


AttentionInterface.register(ATTENTION, _attention)


@contextlib.contextmanager
def _attending(base: Any) -> Iterator[None]:
    before = base.config._attn_implementation
    base.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


@contextlib.contextmanager
def products_in_compute_dtype(scorer: Scorer) -> Iterator[None]:
    """Holds the linear layers in the dtype in which autocast computes them, instead of a cast at every token.

    The head is left: it may be the embedding. Master weights are put back at the end.
    """
    ends = {id(scorer.base.get_output_embeddings().weight), id(scorer.base.get_input_embeddings().weight)}
    layers = [m for m in scorer.modules() if type(m) is nn.Linear and id(m.weight) not in ends]
    held = [(p, p.data) for m in layers for p in m.parameters(recurse=False) if p.dtype != scorer.dtype]
    try:
        for p, data in held:
            p.data = data.to(scorer.dtype)
        yield
    finally:
        for p, data in held:
            p.data = data


class FixedRows:
    """R rows of one decoding, after their prompts."""

    def __init__(self, scorer: Scorer, cache: Any, owners: Tensor, mask: Tensor | None, lengths: Tensor) -> None:
        """
        Args:
          cache: transformers' cache of U prompts, W slots each, of DynamicLayer.
          owners: (R,) int64, the prompt of each row.
          mask: (U, W) bool, False on padding; None: no padding.
          lengths: (R,) int64, tokens of each row's prompt.
        """
        self.scorer = scorer
        device, width = owners.device, cache.layers[0].keys.shape[2]
        held = cache.layers[0].values.dtype
        dtype = scorer.dtype if torch.is_autocast_enabled(device.type) else held  # in which attention computes
        self.keys = [layer.keys.to(dtype).index_select(0, owners) for layer in cache.layers]
        self.values = [layer.values.to(dtype).index_select(0, owners) for layer in cache.layers]
        self.bias = torch.zeros((len(owners), 1, 1, width), dtype=dtype, device=device)
        if mask is not None:
            self.bias.masked_fill_(~mask.index_select(0, owners)[:, None, None], -torch.inf)
        self.tokens = torch.zeros((len(owners), 1), dtype=torch.int64, device=device)
        self.positions = lengths[:, None].clone()
        self.at = torch.full((1,), width, dtype=torch.int64, device=device)
        self.t = torch.zeros(1, dtype=torch.int64, device=device)  # tokens drawn
        self.drawn = torch.zeros((len(owners), 0), dtype=torch.int64, device=device)
        self.ended = torch.zeros(len(owners), dtype=torch.bool, device=device)
        self.numbers = torch.zeros((len(owners), UNIFORMS_AHEAD), dtype=torch.float64, device=device)
        self._made()

    def _made(self) -> None:
        """After buffers were replaced: the cache refers to the new ones, and a graph of the old ones is dropped."""
        layers = [_Layer(k, v, self.at) for k, v in zip(self.keys, self.values, strict=True)]
        self.cache = Cache(layers=layers)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager = 0

    def grow(self, tokens: int) -> None:
        """Room for `tokens` tokens a row."""
        more = tokens - self.drawn.shape[1]
        slots = self.keys[0].shape[2] + more
        slots += -slots % 8  # the kernel with a mask wants aligned rows
        for buffers in (self.keys, self.values):
            for i, held in enumerate(buffers):
                buffers[i] = held.new_zeros((*held.shape[:2], slots, held.shape[3]))
                buffers[i][:, :, : held.shape[2]] = held
        self.bias = F.pad(self.bias, (0, slots - self.bias.shape[3]), value=-torch.inf)
        self.drawn = F.pad(self.drawn, (0, more))
        self._made()

    def keep(self, rows: Tensor) -> None:
        """Keeps the given rows, (n,) int64."""
        for buffers in (self.keys, self.values):
            for i, held in enumerate(buffers):
                buffers[i] = held.index_select(0, rows)
        for name in ("bias", "tokens", "positions", "drawn", "ended", "numbers"):
            setattr(self, name, getattr(self, name).index_select(0, rows))
        self._made()

    def put(self, chosen: Tensor, end: Tensor) -> None:
        """Appends the next token of each row, (R,) int64."""
        self.drawn.index_copy_(1, self.t, chosen[:, None])
        self.ended |= torch.isin(chosen, end)
        self.tokens.copy_(chosen[:, None])
        self.t += 1

    def logits(self) -> Tensor:
        """(R, V) float32 after the last tokens, whose keys and values are added."""
        self.bias.index_fill_(3, self.at, 0.0)
        found = self.scorer(self.tokens, self.positions, mask=self.bias, cache=self.cache)
        self.positions += 1
        self.at += 1
        return found

    def advance(self, pick: Callable[[Tensor, Tensor], Tensor], end: Tensor) -> None:
        """One token a row, by `pick` of logits and the rows' numbers."""

        def step() -> None:
            number = self.numbers.index_select(1, self.t % UNIFORMS_AHEAD).squeeze(1)
            self.put(pick(self.logits(), number), end)

        if self.graph is None and (self.tokens.device.type != "cuda" or self.eager < EAGER_STEPS):
            self.eager += 1
            step()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                step()
        self.graph.replay()


def decode(
    rows: FixedRows,
    logits: Tensor,
    seeds: Sequence[int],
    sampling: Sampling,
    end: Sequence[int],
    *,
    pick: Pick,
    choose: Choose | None = None,
) -> list[tuple[list[int], bool]]:
    """The tokens of each row, and whether it ended.

    Args:
      logits: (R, V) float32 after the prompts.
      seeds: of the rows.
      pick: (logits, (R,) float64 in [0, 1), sampling) -> (R,) int64 tokens, all on the device.
      choose: (logits, indices of the rows left, t) -> (R,) int64, their t-th tokens, in place of drawing.
    """
    device, most = logits.device, sampling.max_tokens
    ends = torch.tensor(list(end), dtype=torch.int64, device=device)
    held = np.arange(len(seeds))
    found: list[tuple[list[int], bool]] = [([], False)] * len(seeds)
    rows.grow(min(most, FIRST_TOKENS))
    with _attending(rows.scorer.base):
        for t in range(most):
            if t % UNIFORMS_AHEAD == 0:
                stop = min(t + UNIFORMS_AHEAD, most)
                numbers = uniforms([seeds[r] for r in held.tolist()], t, stop)
                rows.numbers[:, : stop - t].copy_(torch.from_numpy(np.ascontiguousarray(numbers)))
            if t == rows.drawn.shape[1]:
                rows.grow(min(most, 2 * t))
            if choose is not None:
                given = logits if t == 0 else rows.logits()
                rows.put(torch.from_numpy(choose(given, held.tolist(), t)).to(device), ends)
            elif t == 0:
                rows.put(pick(logits, rows.numbers[:, 0], sampling), ends)
            else:
                rows.advance(lambda values, number: pick(values, number, sampling), ends)
            if (t + 1) % WAIT_EVERY and t + 1 < most and not (choose is not None and bool(rows.ended.all())):
                continue
            ended = rows.ended.cpu().numpy()
            over = ended.all() or t + 1 == most
            if over or ended.mean() >= 0.5:
                texts = rows.drawn[:, : t + 1].cpu().numpy()
                for line in np.flatnonzero(ended | over).tolist():
                    found[held[line]] = _cut(texts[line].tolist(), set(end))
                if over:
                    return found
                kept = np.flatnonzero(~ended)
                rows.keep(torch.from_numpy(kept).to(device))
                held = held[kept]
    return found


def _cut(tokens: list[int], end: set[int]) -> tuple[list[int], bool]:
    """A row's tokens up to its first end token: it may have been decoded on beside others."""
    for n, token in enumerate(tokens):
        if token in end:
            return tokens[: n + 1], True
    return tokens, False


def is_plain(cache: Any) -> bool:
    """Whether every layer of a cache only concatenates keys and values."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)

"""Decoding in buffers of fixed size: no wait for the device but one every few tokens, and on CUDA one graph a token.

Keys, values, tokens and ends stay on the device. Keys and values are in a ring of slots, and all rows write to the same
one; a row that has ended is replaced in place by one that waits, whose prompt goes into the slots before the next. Only
models whose layers all attend to everything before are decoded so, sharded ones too, whose parameters are gathered
before; the others, and devices other than CUDA, take the loop in `generate`, whose samples are the same up to rounding.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from gvpo_core.training.sampling import Sampling, uniforms
from gvpo_torch.model import Scorer

log = logging.getLogger("gvpo.torch")

WAIT_EVERY = 16  # tokens between two looks at which rows have ended
UNIFORMS_AHEAD = 4 * WAIT_EVERY  # random numbers made at once for each row
FIRST_TOKENS = 256  # that the buffers have room for at first; doubled when they are full
REFILL = 1 / 8  # of the rows have ended: waiting ones take their places
EAGER_STEPS = 2  # before a graph is captured, so that libraries are set up
ATTENTION = "gvpo_decode"

Pick = Callable[[Tensor, Tensor, Sampling], Tensor]
Choose = Callable[[Tensor, Sequence[int], int], np.ndarray]
Keep = Callable[[int, list[int], Callable[[], list[tuple[Tensor, Tensor]]]], None]


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
    keys: Tensor
    values: Tensor

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
    shared = query.reshape(rows, groups, -1, query.shape[-1])  # the heads of a group take the axis of queries
    mask = attention_mask.expand(rows, groups, shared.shape[2], slots)
    out = F.scaled_dot_product_attention(shared.to(key.dtype), key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, 1, -1, value.shape[-1]), None


AttentionInterface.register(ATTENTION, _attention)


@contextlib.contextmanager
def _attending(base: Any, by: str) -> Iterator[None]:
    before = base.config._attn_implementation
    base.set_attn_implementation(by)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


class Prefilled(NamedTuple):
    """R rows of U prompts, after one forward pass over the prompts."""

    logits: Tensor  # (U, V) float32, after the prompts
    cache: Any  # transformers' cache of the prompts, W slots each
    mask: Tensor | None  # (U, W) bool, False on padding; None: no padding
    owners: Tensor  # (R,) int64, the prompt of each row
    lengths: np.ndarray  # (R,) int64, tokens of each row's prompt


class FixedRows:
    """R rows that are decoded together."""

    def __init__(self, scorer: Scorer, first: Prefilled, most: int) -> None:
        """Buffers for as many rows as `first` has; `most`: tokens of a response."""
        if not is_plain(first.cache):
            raise NotImplementedError("layers that do not only concatenate keys and values are not decoded so")
        self.scorer, self.most = scorer, most
        rows, device = len(first.owners), first.owners.device
        self.width = first.cache.layers[0].keys.shape[2]
        slots = _aligned(self.width + min(most, FIRST_TOKENS))
        held = first.cache.layers[0].values.dtype
        dtype = scorer.dtype if torch.is_autocast_enabled(device.type) else held  # in which attention computes
        empty = lambda states: torch.zeros((rows, states.shape[1], slots, states.shape[3]), dtype=dtype, device=device)
        self.keys = [empty(layer.keys) for layer in first.cache.layers]
        self.values = [empty(layer.values) for layer in first.cache.layers]
        self.bias = torch.full((rows, 1, 1, slots), -torch.inf, dtype=dtype, device=device)
        self.tokens = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self.positions = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self.at = torch.full((1,), self.width % slots, dtype=torch.int64, device=device)  # the next slot
        self.t = torch.ones(1, dtype=torch.int64, device=device)  # tokens drawn by rows that began first
        # A ring, as the slots: what was drawn since the host looked, the token before included.
        self.drawn = torch.zeros((rows, WAIT_EVERY + 1), dtype=torch.int64, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.numbers = torch.zeros((rows, UNIFORMS_AHEAD), dtype=torch.float64, device=device)
        self._made()

    def _made(self) -> None:
        """After buffers were replaced: the cache refers to the new ones, and a graph of the old ones is dropped."""
        layers: list[Any] = [_Layer(k, v, self.at) for k, v in zip(self.keys, self.values, strict=True)]
        self.cache = Cache(layers=layers)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager = 0

    @property
    def slots(self) -> int:
        """Number of key and value slots of a row."""
        return int(self.bias.shape[3])

    def place(self, lines: Tensor, prompts: Prefilled, tokens: Tensor, ends: Tensor) -> None:
        """Replaces the rows of the given lines, (n,) int64, by those of `prompts`, whose first tokens are `tokens`."""
        width = prompts.cache.layers[0].keys.shape[2]
        slots = (self.at + torch.arange(-width, 0, device=lines.device)) % self.slots
        for buffers, name in ((self.keys, "keys"), (self.values, "values")):
            for buffer, layer in zip(buffers, prompts.cache.layers, strict=True):
                states = getattr(layer, name).to(buffer.dtype).index_select(0, prompts.owners)
                buffer[lines[:, None], :, slots[None]] = states.transpose(1, 2)
        seen = torch.zeros((len(lines), width), dtype=self.bias.dtype, device=lines.device)
        if prompts.mask is not None:
            seen.masked_fill_(~prompts.mask.index_select(0, prompts.owners), -torch.inf)
        self.bias[lines] = -torch.inf
        self.bias[lines[:, None], 0, 0, slots[None]] = seen
        self.tokens[lines] = tokens[:, None]
        self.positions[lines] = torch.from_numpy(prompts.lengths).to(lines.device)[:, None]
        self.drawn[lines, (self.t - 1) % self.drawn.shape[1]] = tokens
        self.ended[lines] = _among(tokens, ends)

    def grow(self) -> None:
        """Twice the room for tokens, up to that of the longest response."""
        slots = _aligned(min(self.width + self.most, 2 * self.slots - self.width))
        start, more = -int(self.at), slots - self.slots
        for buffers in (self.keys, self.values):
            for i, held in enumerate(buffers):
                buffers[i] = held.new_zeros((*held.shape[:2], slots, held.shape[3]))
                buffers[i][:, :, : held.shape[2]] = held.roll(start, 2)  # the oldest slot is the first
        self.at.fill_(self.slots)
        self.bias = F.pad(self.bias.roll(start, 3), (0, more), value=-torch.inf)
        self._made()

    def keep(self, rows: Tensor) -> None:
        """Keeps the given rows, (n,) int64."""
        for buffers in (self.keys, self.values):
            for i, held in enumerate(buffers):
                buffers[i] = held.index_select(0, rows)
        for name in ("bias", "tokens", "positions", "drawn", "ended", "numbers"):
            setattr(self, name, getattr(self, name).index_select(0, rows))
        self._made()

    def look(self, since: int, now: int) -> tuple[np.ndarray, np.ndarray]:
        """(R,) bool, which rows have ended, and their tokens of times since to now - 1, (R, n) int64: one wait."""
        held = torch.cat([self.drawn, self.ended[:, None]], dim=1).cpu().numpy()
        return held[:, -1] != 0, held[:, np.arange(since, now) % (held.shape[1] - 1)]

    def states(self, line: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (heads, count, D) of each layer, of the first `count` tokens of a line, its prompt first."""
        order = (self.at + torch.arange(self.slots, device=self.at.device)) % self.slots  # the oldest first
        slots = order[self.bias[line, 0, 0, order] == 0][:count]
        return [
            (keys[line].index_select(1, slots), values[line].index_select(1, slots))
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def put(self, chosen: Tensor, ends: Tensor) -> None:
        """Appends the next token of each row, (R,) int64."""
        self.drawn.index_copy_(1, self.t % self.drawn.shape[1], chosen[:, None])
        self.ended |= _among(chosen, ends)
        self.tokens.copy_(chosen[:, None])
        self.t += 1

    def logits(self) -> Tensor:
        """(R, V) float32 after the last tokens, whose keys and values are added."""
        self.bias.index_fill_(3, self.at, 0.0)
        logits = self.scorer(self.tokens, self.positions, mask=self.bias, cache=self.cache)
        self.positions += (~self.ended)[:, None]  # a row that ended is computed on; its position stays in range
        self.at += 1
        self.at %= self.slots
        return logits

    def advance(self, pick: Callable[[Tensor, Tensor], Tensor], ends: Tensor) -> None:
        """One token a row, by `pick` of logits and the rows' numbers."""

        def step() -> None:
            number = self.numbers.index_select(1, self.t % UNIFORMS_AHEAD).squeeze(1)
            self.put(pick(self.logits(), number), ends)

        if self.graph is None and (not self.scorer.in_graphs or self.eager < EAGER_STEPS):
            self.eager += 1
            step()
            return
        if self.graph is None:
            graph, stream, pool = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
            try:
                with torch.cuda.graph(graph, pool=pool):
                    step()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a layer that waits for the host, as some of experts do
                _end_capture(stream, pool)
                reason = str(error.__context__ or error).splitlines()[0]
                log.warning("%s: tokens are drawn without CUDA graphs (%s)", type(self.scorer.base).__name__, reason)
                self.scorer.in_graphs = False
                step()
                return
            self.graph = graph
        self.graph.replay()


def _end_capture(stream: Any, pool: Any) -> None:
    """After a capture that failed, whose own end raises before it puts back the stream and the allocator's pool."""
    torch.cuda.set_stream(stream)
    torch._C._cuda_endAllocateToPool(stream.device.index, pool)
    torch._C._cuda_releasePool(stream.device.index, pool)


def _among(tokens: Tensor, ends: Tensor) -> Tensor:
    """(R,) bool, without the wait for the host of `torch.isin` with many ends."""
    return (tokens[:, None] == ends).any(1)


def _aligned(slots: int) -> int:
    return slots + -slots % 8  # the kernel with a mask wants aligned rows


def decode(
    scorer: Scorer,
    first: Prefilled,
    waiting: deque[int],
    prefill: Callable[[Sequence[int]], Prefilled],
    seeds: Sequence[int],
    sampling: Sampling,
    end: Sequence[int],
    *,
    pick: Pick,
    choose: Choose | None = None,
    keep: Keep | None = None,
) -> list[tuple[list[int], bool]]:
    """The tokens of each row, and whether it ended.

    Args:
      first: rows 0 to R - 1, none with a shorter prompt than any that waits.
      waiting: the other rows; they take the places of rows that have ended.
      prefill: of the given rows.
      seeds: of all rows.
      pick: (logits, (R,) float64 in [0, 1), sampling) -> (R,) int64 tokens, all on the device.
      choose: (logits, indices of the rows left, t) -> (R,) int64, their t-th tokens, in place of drawing. No row waits.
      keep: (row, its tokens but the last, what copies the states of its prompt and of these), for rows that have ended.
    """
    device, most, longest = first.owners.device, sampling.max_tokens, first.lengths.copy()
    ends = torch.tensor(list(end), dtype=torch.int64, device=device)
    put = lambda values: torch.from_numpy(np.ascontiguousarray(values)).to(device)
    responses: list[tuple[list[int], bool]] = [([], False)] * len(seeds)
    held = np.arange(len(first.owners))  # row of each line
    begun = np.zeros(len(held), dtype=np.int64)  # when each line drew its first token
    idle = np.zeros(len(held), dtype=bool)  # its row has ended and was taken out
    texts = np.zeros((len(held), most), dtype=np.int64)  # tokens of each line, as far as the host has seen them
    rows = FixedRows(scorer, first, most)
    base, plain = scorer.base, scorer.base.config._attn_implementation
    t, seen = 1, 0  # tokens drawn by lines that began first; those of them that the host has seen

    def numbers(lines: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Of the tokens that the lines draw at times start to stop - 1."""
        made = np.zeros((len(lines), stop - start))
        for age in set(begun[lines].tolist()):
            alike = begun[lines] == age
            made[alike] = uniforms([seeds[r] for r in held[lines[alike]].tolist()], start - age, stop - age)
        return made

    def begin(lines: np.ndarray, prompts: Prefilled) -> None:
        logits = prompts.logits.index_select(0, prompts.owners)
        if choose is not None:
            tokens = put(choose(logits, held[lines].tolist(), 0))
        else:
            tokens = pick(logits, put(numbers(lines, t - 1, t)[:, 0]), sampling)
        rows.place(put(lines), prompts, tokens, ends)
        if t % UNIFORMS_AHEAD:
            ahead = numbers(lines, t, t + UNIFORMS_AHEAD - t % UNIFORMS_AHEAD)
            rows.numbers[put(lines), t % UNIFORMS_AHEAD :] = put(ahead)

    begin(held, first)
    del first  # its cache is copied
    with _attending(base, ATTENTION):
        while True:
            if t % WAIT_EVERY == 0 or choose is not None or t >= begun[~idle].min() + most:
                ended, drawn = rows.look(seen, t)
                ages = np.arange(seen, t) - begun[:, None]
                at = (ages >= 0) & (ages < most)
                texts[np.nonzero(at)[0], ages[at]] = drawn[at]
                seen = t - 1  # lines that begin now draw the token of t - 1
                ended = (ended | (t - begun >= most)) & ~idle
                if ended.any():
                    lines = np.flatnonzero(ended)
                    rows.ended[put(lines)] = True
                    for line in lines:
                        text = texts[line, : t - begun[line]].tolist()
                        responses[held[line]] = sampled, done = _cut(text, set(end))
                        if done and keep is not None:
                            count = int(longest[line]) + len(sampled) - 1
                            keep(int(held[line]), sampled[:-1], partial(rows.states, int(line), count))
                    idle |= ended
                if waiting and idle.mean() >= REFILL:
                    lines = np.flatnonzero(idle)[: len(waiting)]
                    held[lines] = [waiting.popleft() for _ in lines]
                    begun[lines], idle[lines] = t - 1, False
                    with _attending(base, plain):
                        prompts = prefill(held[lines].tolist())
                    longest[lines] = prompts.lengths
                    begin(lines, prompts)
                    del prompts
                    if most == 1:
                        continue
                if idle.all():
                    return responses
                if idle.mean() >= 0.5 and not waiting:
                    kept = np.flatnonzero(~idle)
                    rows.keep(put(kept))
                    held, begun, idle, longest, texts = (a[kept] for a in (held, begun, idle, longest, texts))
            if t % UNIFORMS_AHEAD == 0:
                rows.numbers.copy_(put(numbers(np.arange(len(held)), t, t + UNIFORMS_AHEAD)))
            if (longest + t - begun)[~idle].max() > rows.slots:
                rows.grow()
            if choose is not None:
                rows.put(put(choose(rows.logits(), held.tolist(), t)), ends)
            else:
                rows.advance(lambda values, number: pick(values, number, sampling), ends)
            t += 1


def _cut(tokens: list[int], end: set[int]) -> tuple[list[int], bool]:
    """A row's tokens up to its first end token: it may have been decoded on beside others."""
    for n, token in enumerate(tokens):
        if token in end:
            return tokens[: n + 1], True
    return tokens, False


def is_plain(cache: Any) -> bool:
    """Whether every layer of a cache only concatenates keys and values."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)

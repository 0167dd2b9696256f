"""Decoding in buffers of fixed size: no wait for the device but one every few tokens, and on CUDA one graph a token.

Keys, values, tokens and ends stay on the device. A prompt's keys and values are held once for all its rows (`Prompts`);
those of what the rows draw are in a ring of slots, and all rows write to the same one. A row that has ended is replaced
in place by one that waits. Only models whose layers all attend to everything before are decoded so, sharded ones too,
whose parameters are gathered before. The others, and devices other than CUDA, take the loop in `generate`, whose
samples are the same up to rounding.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from gvpo_core.training.sampling import Sampling, uniforms
from gvpo_torch.cache import is_plain
from gvpo_torch.decode_attention import ATTENTION, Layer, attending, attending_to
from gvpo_torch.decode_prompts import Prefilled, Prompts, Slots, aligned
from gvpo_torch.model import Scorer

log = logging.getLogger("gvpo.torch")

WAIT_EVERY = 16  # tokens between two looks at which rows have ended
UNIFORMS_AHEAD = 4 * WAIT_EVERY  # random numbers made at once for each row
FIRST_TOKENS = 256  # that the buffers have room for at first; doubled when they are full
REFILL = 1 / 8  # of the rows have ended: waiting ones take their places
EAGER_STEPS = 2  # before a graph is captured, so that libraries are set up

Pick = Callable[[Tensor, Tensor, Sampling], Tensor]
Choose = Callable[[Tensor, Sequence[int], int], np.ndarray]
Keep = Callable[[int, list[int], Callable[[], list[tuple[Tensor, Tensor]]]], None]


class FixedRows:
    """L lines, each with a row that is decoded, or that has ended."""

    def __init__(self, scorer: Scorer, first: Prefilled, lines: int, together: int, most: int) -> None:
        """Buffers for `lines` rows and the prompts of `first`.

        Args:
          together: most lines of one prompt.
          most: tokens of a response.
        """
        if not is_plain(first.cache):
            raise NotImplementedError("layers that do not only concatenate keys and values are not decoded so")
        self.scorer, self.most = scorer, most
        device, slots = first.owners.device, aligned(min(most, FIRST_TOKENS))
        held = first.cache.layers[0].values.dtype
        dtype = scorer.dtype if torch.is_autocast_enabled(device.type) else held  # in which attention computes
        empty = lambda states: torch.zeros((lines, states.shape[1], slots, states.shape[3]), dtype=dtype, device=device)
        self.keys = [empty(layer.keys) for layer in first.cache.layers]
        self.values = [empty(layer.values) for layer in first.cache.layers]
        self.prompts = Prompts(first, lines, together, dtype)
        self.bias = torch.full((lines, 1, 1, slots), -torch.inf, dtype=dtype, device=device)
        self.tokens = torch.zeros((lines, 1), dtype=torch.int64, device=device)
        self.positions = torch.zeros((lines, 1), dtype=torch.int64, device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)  # the next slot
        self.t = torch.ones(1, dtype=torch.int64, device=device)  # tokens drawn by rows that began first
        # A ring, as the slots: what was drawn since the host looked, the token before included.
        self.drawn = torch.zeros((lines, WAIT_EVERY + 1), dtype=torch.int64, device=device)
        self.ended = torch.zeros(lines, dtype=torch.bool, device=device)
        self.numbers = torch.zeros((lines, UNIFORMS_AHEAD), dtype=torch.float64, device=device)
        self._made()

    def _made(self) -> None:
        """After buffers were replaced: the cache refers to the new ones, and a graph of the old ones is dropped."""
        layers: list[Any] = [Layer(k, v, self.at) for k, v in zip(self.keys, self.values, strict=True)]
        self.cache = Cache(layers=layers)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager = 0

    @property
    def slots(self) -> int:
        """Slots of a line, for the keys and values of what its row draws."""
        return int(self.bias.shape[3])

    def hold(self, slots: Sequence[int], prompts: Prefilled, most: int) -> None:
        """Puts prompts into slots; `most`: slots that may ever be used."""
        if max(slots) >= self.prompts.slots:
            self.prompts.grow(min(most, max(2 * self.prompts.slots, max(slots) + 1)))
            self._made()
        self.prompts.hold(torch.tensor(slots, device=self.tokens.device), prompts)

    def place(self, lines: Tensor, tokens: Tensor, lengths: Tensor, ends: Tensor) -> None:
        """Replaces the rows of the given lines; `lengths`: tokens of the new rows' prompts. All (n,) int64."""
        self.bias[lines] = -torch.inf
        self.tokens[lines] = tokens[:, None]
        self.positions[lines] = lengths[:, None]
        self.drawn[lines, (self.t - 1) % self.drawn.shape[1]] = tokens
        self.ended[lines] = _among(tokens, ends)

    def _oldest_first(self) -> Tensor:
        """(S,) int64, the slots in the order in which they are written."""
        return (self.at + torch.arange(self.slots, device=self.at.device)) % self.slots

    def grow(self) -> None:
        """Twice the room for tokens, up to that of the longest response."""
        slots, order = aligned(min(self.most, 2 * self.slots)), self._oldest_first()
        for buffers in (self.keys, self.values):
            for i, held in enumerate(buffers):
                buffers[i] = held.new_zeros((*held.shape[:2], slots, held.shape[3]))
                buffers[i][:, :, : len(order)] = held.index_select(2, order)
        self.at.fill_(self.slots)
        self.bias = F.pad(self.bias.index_select(3, order), (0, slots - self.slots), value=-torch.inf)
        self._made()

    def keep(self, lines: Tensor, slots: Sequence[int], together: int) -> None:
        """Keeps the given lines, (n,) int64, and the prompts in the given slots."""
        for buffers in (self.keys, self.values):
            for i, held in enumerate(buffers):
                buffers[i] = held.index_select(0, lines)
        for name in ("bias", "tokens", "positions", "drawn", "ended", "numbers"):
            setattr(self, name, getattr(self, name).index_select(0, lines))
        self.prompts.keep(torch.tensor(slots, device=lines.device), len(lines), together)
        self._made()

    def look(self, since: int, now: int) -> tuple[np.ndarray, np.ndarray]:
        """(R,) bool, which rows have ended, and their tokens of times since to now - 1, (R, n) int64: one wait."""
        held = torch.cat([self.drawn, self.ended[:, None]], dim=1).cpu().numpy()
        return held[:, -1] != 0, held[:, np.arange(since, now) % (held.shape[1] - 1)]

    def states(self, line: int, slot: int, length: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (heads, length + count, D) of each layer: a prompt's, and of `count` tokens of a line."""
        order = self._oldest_first()
        own = order[self.bias[line, 0, 0, order] == 0][:count]
        both = lambda prompts, drawn: torch.cat([prompts[slot, :, -length:], drawn[line].index_select(1, own)], dim=1)
        prompts = self.prompts
        return [
            (both(k, keys), both(v, values))
            for k, v, keys, values in zip(prompts.keys, prompts.values, self.keys, self.values, strict=True)
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
        with attending_to(self.prompts):
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
            failed: RuntimeError | None = None
            try:
                with torch.cuda.graph(graph, pool=pool):
                    try:
                        step()
                    except RuntimeError as error:  # a layer that waits for the host, as some of experts do
                        failed = error
                        raise
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if error is not failed:  # CUDA broke the capture off, so ending it raised too
                    _end_capture(stream, pool)
                reason = str(failed or error).splitlines()[0]
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


def decode(
    scorer: Scorer,
    prompts: Sequence[int],
    lengths: np.ndarray,
    at_once: tuple[int, int],
    prefill: Callable[[Sequence[int]], Prefilled],
    seeds: Sequence[int],
    sampling: Sampling,
    end: Sequence[int],
    *,
    device: torch.device,
    pick: Pick,
    choose: Choose | None = None,
    keep: Keep | None = None,
) -> list[tuple[list[int], bool]]:
    """The tokens of each of R rows, and whether it ended.

    Args:
      prompts: of each row; rows of one prompt follow one another, and no prompt is longer than one before it.
      lengths: (R,) int64, tokens of each row's prompt.
      at_once: rows, and prompts, that are held together; the others wait, and take the places of those that ended.
      prefill: of the given rows, one a prompt; called once for each prompt.
      seeds: of all rows.
      pick: (logits, (R,) float64 in [0, 1), sampling) -> (R,) int64 tokens, all on the device.
      choose: (logits, indices of the rows left, t) -> (R,) int64, their t-th tokens, in place of drawing. No row waits.
      keep: (row, its tokens but the last, what copies the states of its prompt and of these), for rows that have ended.
    """
    most = sampling.max_tokens
    ends = torch.tensor(list(end), dtype=torch.int64, device=device)
    put = lambda values: torch.from_numpy(np.ascontiguousarray(values)).to(device)
    responses: list[tuple[list[int], bool]] = [([], False)] * len(seeds)
    slots, waiting = Slots(prompts, at_once[1]), deque(range(len(seeds)))
    last: dict[int, Tensor] = {}  # logits after prompts that rows wait for
    t, seen = 1, 0  # tokens drawn by lines that began first; those of them that the host has seen

    def numbers(lines: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Of the tokens that the lines draw at times start to stop - 1."""
        made = np.zeros((len(lines), stop - start))
        for age in set(begun[lines].tolist()):
            alike = begun[lines] == age
            made[alike] = uniforms([seeds[r] for r in held[lines[alike]].tolist()], start - age, stop - age)
        return made

    def begin(lines: np.ndarray, fresh: list[int], prefilled: Prefilled | None) -> None:
        """The rows of these lines; `fresh`: those of them whose prompts were computed just now."""
        if prefilled is not None:
            rows.hold([slots[row] for row in fresh], prefilled, at_once[1])
            after = prefilled.logits.index_select(0, prefilled.owners)
            last.update(zip((prompts[row] for row in fresh), after, strict=True))
        rows.prompts.assign(np.asarray([-1 if i else slots[r] for r, i in zip(held.tolist(), idle, strict=True)]))
        logits = torch.stack([last[prompts[row]] for row in held[lines].tolist()])
        for prompt in [*last]:
            if not waiting or prompt != prompts[waiting[0]]:
                del last[prompt]
            elif prefilled is not None:
                last[prompt] = last[prompt].clone()  # not with the logits of all others
        if choose is not None:
            tokens = put(choose(logits, held[lines].tolist(), 0))
        else:
            tokens = pick(logits, put(numbers(lines, t - 1, t)[:, 0]), sampling)
        rows.place(put(lines), tokens, put(lengths[held[lines]]), ends)
        if t % UNIFORMS_AHEAD:
            ahead = numbers(lines, t, t + UNIFORMS_AHEAD - t % UNIFORMS_AHEAD)
            rows.numbers[put(lines), t % UNIFORMS_AHEAD :] = put(ahead)

    started, fresh = slots.admit(waiting, at_once[0])
    held = np.asarray(started)  # row of each line
    begun = np.zeros(len(held), dtype=np.int64)  # when each line drew its first token
    idle = np.zeros(len(held), dtype=bool)  # its row has ended and was taken out
    texts = np.zeros((len(held), most), dtype=np.int64)  # tokens of each line, as far as the host has seen them
    first = prefill(fresh)
    rows = FixedRows(scorer, first, len(held), min(len(held), _most_alike(prompts)), most)
    begin(np.arange(len(held)), fresh, first)
    del first  # its cache is copied
    base, plain = scorer.base, scorer.base.config._attn_implementation
    with attending(base, ATTENTION):
        while True:
            if t % WAIT_EVERY == 0 or choose is not None or t >= begun[~idle].min() + most:
                ended, drawn = rows.look(seen, t)
                ages = np.arange(seen, t) - begun[:, None]
                at = (ages >= 0) & (ages < most)
                texts[np.nonzero(at)[0], ages[at]] = drawn[at]
                seen = t - 1  # lines that begin now draw the token of t - 1
                ended = (ended | (t - begun >= most)) & ~idle
                if ended.any():
                    rows.ended[put(np.flatnonzero(ended))] = True
                    for line in np.flatnonzero(ended).tolist():
                        row, text = int(held[line]), texts[line, : t - begun[line]].tolist()
                        responses[row] = sampled, done = _cut(text, set(end))
                        if done and keep is not None:
                            count = len(sampled) - 1
                            keep(row, sampled[:-1], partial(rows.states, line, slots[row], int(lengths[row]), count))
                        slots.end(row)
                    idle |= ended
                if waiting and idle.mean() >= REFILL:
                    started, fresh = slots.admit(waiting, int(idle.sum()))
                    lines = np.flatnonzero(idle)[: len(started)]
                    if started:
                        held[lines], begun[lines], idle[lines] = started, t - 1, False
                        with attending(base, plain):
                            begin(lines, fresh, prefill(fresh) if fresh else None)
                        if most == 1:
                            continue
                if idle.all():
                    return responses
                if idle.mean() >= 0.5 and not waiting:
                    kept = np.flatnonzero(~idle)
                    held, begun, idle, texts = (a[kept] for a in (held, begun, idle, texts))
                    rows.keep(put(kept), slots.compact(), _most_alike([slots[row] for row in held.tolist()]))
                    rows.prompts.assign(np.asarray([slots[row] for row in held.tolist()]))
            if t % UNIFORMS_AHEAD == 0:
                rows.numbers.copy_(put(numbers(np.arange(len(held)), t, t + UNIFORMS_AHEAD)))
            if (t - begun)[~idle].max() > rows.slots:
                rows.grow()
            if choose is not None:
                rows.put(put(choose(rows.logits(), held.tolist(), t)), ends)
            else:
                rows.advance(lambda values, number: pick(values, number, sampling), ends)
            t += 1


def _most_alike(prompts: Sequence[int]) -> int:
    """Rows of the prompt with most rows."""
    return max(Counter(prompts).values())


def _cut(tokens: list[int], end: set[int]) -> tuple[list[int], bool]:
    """A row's tokens up to its first end token: it may have been decoded on beside others."""
    for n, token in enumerate(tokens):
        if token in end:
            return tokens[: n + 1], True
    return tokens, False

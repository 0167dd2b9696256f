"""Decoding in buffers of fixed size: waits for the device only every few tokens; on CUDA each token is one graph.

Keys, values, tokens and ends stay on the device. A prompt's keys and values are held once for all its rows (`Prompts`).
Those of drawn tokens are in a ring of slots, and all rows write to the same slot. A waiting row replaces an ended row
in place. All layers of the model must attend to all earlier tokens. This works for sharded models too, whose parameters
are gathered first. Other models, and devices other than CUDA, use the loop in `generate`. Its samples are the same up
to rounding.
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

WAIT_EVERY = 16  # tokens between two checks for ended rows
UNIFORMS_AHEAD = 4 * WAIT_EVERY  # random numbers generated at once for each row
FIRST_TOKENS = 256  # first size of the buffers; doubled when they are full
REFILL = 1 / 8  # share of ended rows at which waiting rows take their places
EAGER_STEPS = 2  # steps before a graph is captured, so that libraries are set up

Pick = Callable[[Tensor, Tensor, Sampling], Tensor]
Choose = Callable[[Tensor, Sequence[int], int], np.ndarray]
Keep = Callable[[int, list[int], Callable[[], list[tuple[Tensor, Tensor]]]], None]


class FixedRows:
    """The buffers of L lines. Each line has a row that is being decoded or has ended."""

    def __init__(self, scorer: Scorer, first: Prefilled, lines: int, together: int, most: int) -> None:
        """Makes buffers for `lines` rows and the prompts of `first`.

        Args:
          together: largest number of lines of one prompt.
          most: largest number of tokens of a response.
        """
        if not is_plain(first.cache):
            raise NotImplementedError(
                "layers that do more than concatenate keys and values cannot be decoded in fixed buffers"
            )
        self.scorer, self.most = scorer, most
        device, slots = first.owners.device, aligned(min(most, FIRST_TOKENS))
        cache_dtype = first.cache.layers[0].values.dtype
        dtype = scorer.dtype if torch.is_autocast_enabled(device.type) else cache_dtype  # in which attention computes
        empty = lambda states: torch.zeros((lines, states.shape[1], slots, states.shape[3]), dtype=dtype, device=device)
        self.keys = [empty(layer.keys) for layer in first.cache.layers]
        self.values = [empty(layer.values) for layer in first.cache.layers]
        self.prompts = Prompts(first, lines, together, dtype)
        self.bias = torch.full((lines, 1, 1, slots), -torch.inf, dtype=dtype, device=device)
        self.tokens = torch.zeros((lines, 1), dtype=torch.int64, device=device)
        self.positions = torch.zeros((lines, 1), dtype=torch.int64, device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)  # the next slot
        self.t = torch.ones(1, dtype=torch.int64, device=device)  # tokens drawn by the rows that began first
        # A ring like the slots: the tokens drawn since the host looked, and the one before them.
        self.drawn = torch.zeros((lines, WAIT_EVERY + 1), dtype=torch.int64, device=device)
        self.ended = torch.zeros(lines, dtype=torch.bool, device=device)
        self.numbers = torch.zeros((lines, UNIFORMS_AHEAD), dtype=torch.float64, device=device)
        self._made()

    def _made(self) -> None:
        """Points the cache to new buffers, and drops the graph of the old ones."""
        layers: list[Any] = [Layer(k, v, self.at) for k, v in zip(self.keys, self.values, strict=True)]
        self.cache = Cache(layers=layers)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager = 0

    @property
    def slots(self) -> int:
        """Number of slots of a line, for the keys and values of drawn tokens."""
        return int(self.bias.shape[3])

    def hold(self, slots: Sequence[int], prompts: Prefilled, most: int) -> None:
        """Puts prompts into slots; `most`: largest number of slots."""
        if max(slots) >= self.prompts.slots:
            self.prompts.grow(min(most, max(2 * self.prompts.slots, max(slots) + 1)))
            self._made()
        self.prompts.hold(torch.tensor(slots, device=self.tokens.device), prompts)

    def place(self, lines: Tensor, tokens: Tensor, lengths: Tensor, ends: Tensor) -> None:
        """Replaces the rows of the given lines. `lengths`: tokens of their prompts. All but `ends` are (n,) int64."""
        self.bias[lines] = -torch.inf
        self.tokens[lines] = tokens[:, None]
        self.positions[lines] = lengths[:, None]
        self.drawn[lines, (self.t - 1) % self.drawn.shape[1]] = tokens
        self.ended[lines] = _among(tokens, ends)

    def _oldest_first(self) -> Tensor:
        """Returns (S,) int64, the slots in the order in which they are written."""
        return (self.at + torch.arange(self.slots, device=self.at.device)) % self.slots

    def grow(self) -> None:
        """Doubles the room for tokens, up to that of the longest response."""
        slots, order = aligned(min(self.most, 2 * self.slots)), self._oldest_first()
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):
                buffers[i] = buffer.new_zeros((*buffer.shape[:2], slots, buffer.shape[3]))
                buffers[i][:, :, : len(order)] = buffer.index_select(2, order)
        self.at.fill_(self.slots)
        self.bias = F.pad(self.bias.index_select(3, order), (0, slots - self.slots), value=-torch.inf)
        self._made()

    def keep(self, lines: Tensor, slots: Sequence[int], together: int) -> None:
        """Keeps only the given lines, (n,) int64, and the prompts in the given slots."""
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):
                buffers[i] = buffer.index_select(0, lines)
        for name in ("bias", "tokens", "positions", "drawn", "ended", "numbers"):
            setattr(self, name, getattr(self, name).index_select(0, lines))
        self.prompts.keep(torch.tensor(slots, device=lines.device), len(lines), together)
        self._made()

    def look(self, since: int, now: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (R,) bool, which rows have ended, and (R, n) int64, their tokens `since` to `now` - 1. Waits once."""
        on_host = torch.cat([self.drawn, self.ended[:, None]], dim=1).cpu().numpy()
        return on_host[:, -1] != 0, on_host[:, np.arange(since, now) % (on_host.shape[1] - 1)]

    def states(self, line: int, slot: int, length: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Returns each layer's keys and values (heads, length + count, D): of a prompt and of `count` drawn tokens."""
        order = self._oldest_first()
        drawn_slots = order[self.bias[line, 0, 0, order] == 0][:count]
        joined = lambda prompts, drawn: torch.cat(
            [prompts[slot, :, -length:], drawn[line].index_select(1, drawn_slots)], dim=1
        )
        prompts = self.prompts
        return [
            (joined(k, keys), joined(v, values))
            for k, v, keys, values in zip(prompts.keys, prompts.values, self.keys, self.values, strict=True)
        ]

    def put(self, chosen: Tensor, ends: Tensor) -> None:
        """Appends the next token of each row, (R,) int64."""
        self.drawn.index_copy_(1, self.t % self.drawn.shape[1], chosen[:, None])
        self.ended |= _among(chosen, ends)
        self.tokens.copy_(chosen[:, None])
        self.t += 1

    def logits(self) -> Tensor:
        """Returns (R, V) float32 logits after the last tokens, and adds the keys and values of these tokens."""
        self.bias.index_fill_(3, self.at, 0.0)
        with attending_to(self.prompts):
            logits = self.scorer(self.tokens, self.positions, mask=self.bias, cache=self.cache)
        self.positions += (~self.ended)[:, None]  # ended rows are still computed; their positions stay in range
        self.at += 1
        self.at %= self.slots
        return logits

    def advance(self, pick: Callable[[Tensor, Tensor], Tensor], ends: Tensor) -> None:
        """Draws one token per row; `pick` chooses it from the logits and the row's random number."""

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
                    except RuntimeError as error:  # a layer that waits for the host, like some expert layers
                        failed = error
                        raise
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if error is not failed:  # CUDA aborted the capture, so ending it raised too
                    _end_capture(stream, pool)
                reason = str(failed or error).splitlines()[0]
                log.warning("%s: tokens are drawn without CUDA graphs (%s)", type(self.scorer.base).__name__, reason)
                self.scorer.in_graphs = False
                step()
                return
            self.graph = graph
        self.graph.replay()


def _end_capture(stream: Any, pool: Any) -> None:
    """Restores the stream and the allocator's pool after a failed capture, whose own end raises before it does so."""
    torch.cuda.set_stream(stream)
    torch._C._cuda_endAllocateToPool(stream.device.index, pool)
    torch._C._cuda_releasePool(stream.device.index, pool)


def _among(tokens: Tensor, ends: Tensor) -> Tensor:
    """Returns (R,) bool: which tokens are in `ends`. `torch.isin` would wait for the host if there are many."""
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
    """Decodes R rows. Returns the tokens of each row, and whether it ended.

    Args:
      prompts: number of each row's prompt. Rows of one prompt follow one another, and no prompt is longer than an
        earlier one.
      lengths: (R,) int64, tokens of each row's prompt.
      at_once: how many rows, and how many prompts, are held together. The others wait to take the places of ended rows.
      prefill: computes the prompts of the given rows, one row per prompt; called once for each prompt.
      seeds: one per row.
      pick: (logits, (R,) float64 in [0, 1), sampling) -> (R,) int64 tokens, all on the device.
      choose: (logits, indices of the rows left, t) -> (R,) int64: gives their t-th tokens instead of drawing. No row
        waits.
      keep: called for ended rows with (row, its tokens but the last, a function that copies the states of its prompt
        and of these tokens).
    """
    most = sampling.max_tokens
    ends = torch.tensor(list(end), dtype=torch.int64, device=device)
    put = lambda values: torch.from_numpy(np.ascontiguousarray(values)).to(device)
    responses: list[tuple[list[int], bool]] = [([], False)] * len(seeds)
    slots, waiting = Slots(prompts, at_once[1]), deque(range(len(seeds)))
    last: dict[int, Tensor] = {}  # logits after prompts that have waiting rows
    t, seen = 1, 0  # tokens drawn by the lines that began first; how many of them the host has seen

    def numbers(lines: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Returns the random numbers of the tokens that the lines draw at times `start` to `stop` - 1."""
        result = np.zeros((len(lines), stop - start))
        for age in set(begun[lines].tolist()):
            same = begun[lines] == age
            result[same] = uniforms([seeds[r] for r in line_rows[lines[same]].tolist()], start - age, stop - age)
        return result

    def begin(lines: np.ndarray, fresh: list[int], prefilled: Prefilled | None) -> None:
        """Begins the rows of these lines; `fresh`: the rows of which `prefilled` has the prompts."""
        if prefilled is not None:
            rows.hold([slots[row] for row in fresh], prefilled, at_once[1])
            after = prefilled.logits.index_select(0, prefilled.owners)
            last.update(zip((prompts[row] for row in fresh), after, strict=True))
        rows.prompts.assign(np.asarray([-1 if i else slots[r] for r, i in zip(line_rows.tolist(), idle, strict=True)]))
        logits = torch.stack([last[prompts[row]] for row in line_rows[lines].tolist()])
        for prompt in [*last]:
            if not waiting or prompt != prompts[waiting[0]]:
                del last[prompt]
            elif prefilled is not None:
                last[prompt] = last[prompt].clone()  # a copy, so that the logits of all others are freed
        if choose is not None:
            tokens = put(choose(logits, line_rows[lines].tolist(), 0))
        else:
            tokens = pick(logits, put(numbers(lines, t - 1, t)[:, 0]), sampling)
        rows.place(put(lines), tokens, put(lengths[line_rows[lines]]), ends)
        if t % UNIFORMS_AHEAD:
            ahead = numbers(lines, t, t + UNIFORMS_AHEAD - t % UNIFORMS_AHEAD)
            rows.numbers[put(lines), t % UNIFORMS_AHEAD :] = put(ahead)

    started, fresh = slots.admit(waiting, at_once[0])
    line_rows = np.asarray(started)  # row of each line
    begun = np.zeros(len(line_rows), dtype=np.int64)  # when each line drew its first token
    idle = np.zeros(len(line_rows), dtype=bool)  # whether its row has ended and was taken out
    texts = np.zeros((len(line_rows), most), dtype=np.int64)  # tokens of each line that the host has seen
    first = prefill(fresh)
    rows = FixedRows(scorer, first, len(line_rows), min(len(line_rows), _most_per_prompt(prompts)), most)
    begin(np.arange(len(line_rows)), fresh, first)
    del first  # its cache has been copied
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
                        row, text = int(line_rows[line]), texts[line, : t - begun[line]].tolist()
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
                        line_rows[lines], begun[lines], idle[lines] = started, t - 1, False
                        with attending(base, plain):
                            begin(lines, fresh, prefill(fresh) if fresh else None)
                        if most == 1:
                            continue
                if idle.all():
                    return responses
                if idle.mean() >= 0.5 and not waiting:
                    live = np.flatnonzero(~idle)
                    line_rows, begun, idle, texts = (a[live] for a in (line_rows, begun, idle, texts))
                    rows.keep(put(live), slots.compact(), _most_per_prompt([slots[row] for row in line_rows.tolist()]))
                    rows.prompts.assign(np.asarray([slots[row] for row in line_rows.tolist()]))
            if t % UNIFORMS_AHEAD == 0:
                rows.numbers.copy_(put(numbers(np.arange(len(line_rows)), t, t + UNIFORMS_AHEAD)))
            if (t - begun)[~idle].max() > rows.slots:
                rows.grow()
            if choose is not None:
                rows.put(put(choose(rows.logits(), line_rows.tolist(), t)), ends)
            else:
                rows.advance(lambda values, number: pick(values, number, sampling), ends)
            t += 1


def _most_per_prompt(prompts: Sequence[int]) -> int:
    """Returns the number of rows of the prompt with the most rows."""
    return max(Counter(prompts).values())


def _cut(tokens: list[int], end: set[int]) -> tuple[list[int], bool]:
    """Returns a row's tokens up to its first end token, and whether there is one. Later tokens were decoded in vain."""
    for n, token in enumerate(tokens):
        if token in end:
            return tokens[: n + 1], True
    return tokens, False

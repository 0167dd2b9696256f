"""Sampling: one prefill per prompt, shared by the prompt's rows, then decoding step by step.

Each row has its own stream of random numbers. Its t-th token is where the cumulative distribution first exceeds the
t-th number, so a response does not depend on the batch in which it was drawn, up to float rounding.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gvpo_core.training.policy import Response, Tokens
from gvpo_core.training.policy.memory import rows_at_once
from gvpo_core.training.policy.prefixes import Part, Prefixes, parts_of
from gvpo_core.training.sampling import Sampling, uniforms
from gvpo_torch import fixed
from gvpo_torch.cache import keep_rows, new_cache
from gvpo_torch.decode_prompts import Prefilled
from gvpo_torch.model import Scorer
from gvpo_torch.prefixes import States, copied, fill

Forward = Callable[..., Tensor]
Choose = Callable[[Tensor, Sequence[tuple[int, int]], int], np.ndarray]
UNIFORMS_AHEAD = 64  # random numbers generated at once for each row


def generate(
    scorer: Scorer,
    forward: Forward,
    prompts: Sequence[Tokens],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    end: Sequence[int],
    device: torch.device,
    cache_tokens: int,
    choose: Choose | None = None,
    in_fixed_buffers: bool = False,
    prefixes: Prefixes | None = None,
) -> list[list[Response]]:
    """Returns len(seeds[i]) responses to prompts[i].

    Args:
      forward: `scorer`, or the callable to use in its place.
      end: ids that end a response.
      cache_tokens: tokens of cache held at once; sets how many rows are decoded together.
      choose: (logits (R, V), R rows (prompt, response), t) -> (R,) int64: gives their t-th tokens instead of drawing.
      in_fixed_buffers: decode with `fixed`, for models that `decode_attention.fits`.
      prefixes: kept keys and values from which prompts start; ended responses are added. Counts in `cache_tokens`.
    """
    if prefixes is not None:
        prefixes.plan(prompts, seeds)
        cache_tokens = max(1, cache_tokens - prefixes.held)
    responses: list[list[Response | None]] = [[None] * len(row) for row in seeds]
    skinny = device.type == "cpu" and not torch.is_autocast_enabled("cpu") and _wins_transposed()
    products = _skinny_products(scorer) if skinny else contextlib.nullcontext()
    ordered = _ordered(prompts, seeds)
    if in_fixed_buffers:  # ended rows make room for waiting ones
        parts = [ordered] if ordered else []
    else:
        parts = _chunks(scorer, prompts, ordered, sampling, cache_tokens)
    with products:
        for rows in parts:
            decode_args = (scorer, forward, prompts, seeds, rows, sampling, end, device, choose, prefixes)
            texts = _decode_fixed(*decode_args, cache_tokens) if in_fixed_buffers else _decode(*decode_args)
            for (i, j), response in zip(rows, texts, strict=True):
                responses[i][j] = response
    return responses  # type: ignore[return-value]


@functools.cache
def _wins_transposed() -> bool:
    """Whether `_skinny_products` is faster on this CPU: Intel's only. An AMD EPYC with AVX-512 took 1.4 times as long.

    Decides by vendor, not by timing: the two products round differently, and a resumed run must draw the same samples.
    """
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False


@contextlib.contextmanager
def _skinny_products(lm: nn.Module) -> Iterator[None]:
    """Computes linear layers as (W x^T)^T for steps of 16 to 48 rows: up to twice as fast as x W^T on Intel CPUs."""
    layers = [m for m in lm.modules() if type(m) is nn.Linear and m.weight.dtype == torch.float32]
    for layer in layers:
        layer.forward = functools.partial(_linear, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    rows = x.numel() // x.shape[-1]
    if not 16 <= rows <= 48 or x.dtype != torch.float32:
        return nn.functional.linear(x, layer.weight, layer.bias)
    product = torch.mm(layer.weight, x.reshape(rows, -1).t().contiguous()).t().contiguous()
    if layer.bias is not None:
        product = product + layer.bias
    return product.unflatten(0, x.shape[:-1])


def _ordered(prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Returns all rows (prompt, response): longest prompts first, rows of equal prompts one after another."""
    first: dict[Tokens, int] = {}
    for i, prompt in enumerate(prompts):
        first.setdefault(prompt, i)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), first[prompts[i]]))
    return [(i, j) for i in order for j in range(len(seeds[i]))]


def _chunks(
    scorer: Scorer,
    prompts: Sequence[Tokens],
    rows: Sequence[tuple[int, int]],
    sampling: Sampling,
    cache_tokens: int,
) -> list[list[tuple[int, int]]]:
    """Splits the ordered rows into parts to decode together: within the budget, prompts of similar length."""
    longest = max((len(prompt) for prompt in prompts), default=0) + sampling.max_tokens
    # Beyond RoPE's original length the longest row sets the frequencies, so all rows must have one length.
    same_length = scorer.same_length or (scorer.rope is not None and longest > scorer.rope.original)
    chunks: list[list[tuple[int, int]]] = []
    width = 0
    for i, j in rows:
        length = len(prompts[i])
        full = not chunks or (len(chunks[-1]) + 1) * (width + sampling.max_tokens) > cache_tokens
        if full or (same_length and length != width):
            chunks.append([])
            width = length
        chunks[-1].append((i, j))
    return chunks


def _prefill(
    scorer: Scorer,
    forward: Forward,
    prompts: Sequence[Tokens],
    rows: Sequence[tuple[int, int]],
    device: torch.device,
    prefixes: Prefixes | None,
) -> Prefilled:
    parts = parts_of(list(dict.fromkeys(prompts[i] for i in sorted({i for i, _ in rows}))), prefixes)
    passes = [_pass(scorer, forward, part, device) for part in parts]
    logits, cache, mask = passes[0] if len(passes) == 1 else _together(scorer, passes)
    places = {prompt: n for n, prompt in enumerate(prompt for part in parts for prompt in part.prompts)}
    owners = torch.from_numpy(np.asarray([places[prompts[i]] for i, _ in rows], dtype=np.int64)).to(device)
    return Prefilled(logits, cache, mask, owners)


def _pass(scorer: Scorer, forward: Forward, part: Part, device: torch.device) -> tuple[Tensor, Any, Tensor | None]:
    """Returns logits after the prompts, their cache and mask, see `Prefilled`. Computes only tokens not kept yet."""
    width = max(map(len, part.prompts))
    ids = np.zeros((len(part.prompts), width), dtype=np.int64)
    mask = np.zeros((len(part.prompts), width), dtype=bool)
    for b, prompt in enumerate(part.prompts):
        ids[b, width - len(prompt) :] = prompt
        mask[b, width - len(prompt) :] = True
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    put = lambda values: torch.from_numpy(np.ascontiguousarray(values[:, width - part.fresh :])).to(device)
    cache = new_cache(scorer.decoder, scorer.config)
    fill(cache, part)
    # No mask if no row is padded: recurrent layers would take the mask of the whole sequence for that of one token.
    mask_on = None if mask.all() else torch.from_numpy(mask).to(device)
    return forward(put(ids), put(positions), mask=mask_on, cache=cache), cache, mask_on


def _together(scorer: Scorer, passes: Sequence[tuple[Tensor, Any, Tensor | None]]) -> tuple[Tensor, Any, Tensor | None]:
    """Joins the passes into one; pads the narrower caches on the left."""
    widths = [cache.get_seq_length() for _, cache, _ in passes]
    width, together = max(widths), new_cache(scorer.decoder, scorer.config)
    for number in range(len(passes[0][1].layers)):
        layers = [(cache.layers[number], width - filled) for (_, cache, _), filled in zip(passes, widths, strict=True)]
        keys, values = (
            torch.cat([nn.functional.pad(getattr(layer, name), (0, 0, padding, 0)) for layer, padding in layers])
            for name in ("keys", "values")
        )
        together.update(keys, values, number)
    masks = []
    for (logits, _, mask), filled in zip(passes, widths, strict=True):
        full_mask = logits.new_ones((len(logits), filled), dtype=torch.bool) if mask is None else mask
        masks.append(nn.functional.pad(full_mask, (width - filled, 0), value=False))
    mask_of_all = torch.cat(masks)
    return torch.cat([logits for logits, _, _ in passes]), together, mask_of_all


def _decode_fixed(
    scorer: Scorer,
    forward: Forward,
    prompts: Sequence[Tokens],
    seeds: Sequence[Sequence[int]],
    rows: Sequence[tuple[int, int]],
    sampling: Sampling,
    end: Sequence[int],
    device: torch.device,
    choose: Choose | None,
    prefixes: Prefixes | None,
    cache_tokens: int,
) -> list[Response]:
    row_prompts = [prompts[i] for i, _ in rows]
    number = {prompt: n for n, prompt in enumerate(dict.fromkeys(row_prompts))}
    numbers = [number[prompt] for prompt in row_prompts]

    def prefill(chosen: Sequence[int]) -> Prefilled:
        prefilled = _prefill(scorer, forward, prompts, [rows[r] for r in chosen], device, prefixes)
        if prefixes is not None:
            computed = {row_prompts[r] for r in chosen}
            # Other rows of these prompts start from what was computed.
            prefixes.started([prompt for prompt in row_prompts if prompt in computed])
        return prefilled

    def keep(r: int, sampled: list[int], states: Callable[[], States]) -> None:
        tokens = (*row_prompts[r], *sampled)
        if prefixes is not None and prefixes.wants(tokens):
            prefixes.keep(tokens, states())

    at_once = rows_at_once(numbers, len(row_prompts[0]), sampling.max_tokens, cache_tokens)
    choice = None if choose is None else lambda logits, left, t: choose(logits, [rows[r] for r in left], t)
    texts = fixed.decode(
        scorer,
        numbers,
        np.asarray([len(prompt) for prompt in row_prompts]),
        at_once if choose is None else (len(rows), len(number)),
        prefill,
        [seeds[i][j] for i, j in rows],
        sampling,
        end,
        device=device,
        pick=draw,
        choose=choice,
        keep=None if prefixes is None else keep,
    )
    return [Response(tuple(tokens), done) for tokens, done in texts]


def _decode(
    scorer: Scorer,
    forward: Forward,
    prompts: Sequence[Tokens],
    seeds: Sequence[Sequence[int]],
    rows: Sequence[tuple[int, int]],
    sampling: Sampling,
    end: Sequence[int],
    device: torch.device,
    choose: Choose | None,
    prefixes: Prefixes | None,
) -> list[Response]:
    def put(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    logits, cache, mask_on, shared = _prefill(scorer, forward, prompts, rows, device, prefixes)
    if prefixes is not None:
        prefixes.started([prompts[i] for i, _ in rows])
    lengths = np.asarray([len(prompts[i]) for i, _ in rows])
    width = max(lengths.tolist())
    owners = shared.cpu().numpy()
    if len(rows) != len(logits) or not np.array_equal(owners, np.arange(len(logits))):
        keep_rows(cache, shared)
        logits = logits.index_select(0, shared)
    mask_on = None if mask_on is None else mask_on.index_select(0, shared)
    ends = set(end)
    drawn: list[list[int]] = [[] for _ in rows]
    finished = [False] * len(rows)
    line_rows = np.arange(len(rows))  # row of each line of the cache
    ended = np.zeros(len(rows), dtype=bool)  # whether the row of each line has ended
    numbers = np.empty((len(rows), 0))

    def keep_ended() -> None:
        """Keeps the states of ended rows before they are dropped. Their last tokens were drawn but not computed."""
        if prefixes is None:
            return
        for line in np.flatnonzero(ended).tolist():
            row = int(line_rows[line])
            sequence = (*prompts[rows[row][0]], *drawn[row][:-1])
            start = width - int(lengths[row])
            columns = slice(start, start + len(sequence))
            if prefixes.wants(sequence):
                states = [(layer.keys[line, :, columns], layer.values[line, :, columns]) for layer in cache.layers]
                prefixes.keep(sequence, copied(states))

    for t in range(sampling.max_tokens):
        if t % UNIFORMS_AHEAD == 0:
            stop = min(t + UNIFORMS_AHEAD, sampling.max_tokens)
            numbers = uniforms([seeds[rows[r][0]][rows[r][1]] for r in line_rows.tolist()], t, stop)
        if choose is None:
            tokens = pick(logits, numbers[:, t % UNIFORMS_AHEAD], sampling)
        else:
            tokens = choose(logits, [rows[r] for r in line_rows.tolist()], t)
        for line in np.flatnonzero(~ended).tolist():
            row = int(line_rows[line])
            drawn[row].append(int(tokens[line]))
            if int(tokens[line]) in ends:
                finished[row] = ended[line] = True
        if ended.all() or t + 1 == sampling.max_tokens:
            break
        afresh = scorer.recomputes(width + t + 1)
        # Not at every step: dropping rows copies the cache.
        if ended.mean() >= 0.5 or ((afresh or t % 16 == 15) and ended.any()):
            keep_ended()
            keep = np.flatnonzero(~ended)
            kept = put(keep)
            keep_rows(cache, kept)
            mask_on = None if mask_on is None else mask_on.index_select(0, kept)
            line_rows, tokens, numbers, ended = line_rows[keep], tokens[keep], numbers[keep], ended[keep]
        mask_on = None if mask_on is None else torch.cat([mask_on, mask_on.new_ones(len(line_rows), 1)], dim=1)
        if afresh:  # the cached keys have other RoPE frequencies; all rows have one length here
            cache = new_cache(scorer.decoder, scorer.config)
            ids = np.asarray([[*prompts[rows[r][0]], *drawn[r]] for r in line_rows.tolist()], dtype=np.int64)
            positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
            logits = forward(put(ids), put(positions.copy()), mask=mask_on, cache=cache)
        else:
            logits = forward(put(tokens[:, None]), put((lengths[line_rows] + t)[:, None]), mask=mask_on, cache=cache)
    keep_ended()
    return [Response(tuple(text), done) for text, done in zip(drawn, finished, strict=True)]


def pick(logits: Tensor, numbers: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Calls `draw` with numbers, (R,) float64, and tokens, (R,) int64, on the host."""
    if logits.device.type == "mps":  # has no float64
        logits = logits.cpu()
    return draw(logits, torch.from_numpy(np.ascontiguousarray(numbers)).to(logits.device), sampling).cpu().numpy()


def draw(logits: Tensor, numbers: Tensor, sampling: Sampling) -> Tensor:
    """Draws one token per row, (R,) int64, by inverting the cumulative distribution in vocabulary order, in float64.

    Args:
      logits: (R, V) float.
      numbers: (R,) float64 in [0, 1), on the same device.
    """
    if sampling.temperature == 0:
        return logits.argmax(1)
    z = logits - logits.amax(1, keepdim=True).double()  # cast and subtracted in one pass
    if sampling.temperature != 1:
        z = z.div_(sampling.temperature)
    cumulative = truncate(z.exp_(), sampling).cumsum(1)
    total = cumulative[:, -1:].contiguous()
    chosen = torch.searchsorted(cumulative, numbers.unsqueeze(1) * total, right=True)
    # u * total may round to the total itself: then take the last token with any mass.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(chosen, last).squeeze(1)


def truncate(masses: Tensor, sampling: Sampling) -> Tensor:
    """Zeroes the (R, V) masses that top-k, min-p and top-p cut, in this order; ties at the border stay."""
    if sampling.top_k and sampling.top_k < masses.shape[1]:
        border = masses.topk(sampling.top_k, 1).values[:, -1:]
        masses = masses.masked_fill(masses < border, 0.0)
    if sampling.min_p > 0:
        masses = masses.masked_fill(masses < sampling.min_p * masses.amax(1, keepdim=True), 0.0)
    if sampling.top_p < 1:
        ordered = masses.sort(1, descending=True).values
        before = ordered.cumsum(1) - ordered
        kept = before < sampling.top_p * ordered.sum(1, keepdim=True)
        border = ordered.gather(1, kept.sum(1, keepdim=True) - 1)
        masses = masses.masked_fill(masses < border, 0.0)
    return masses

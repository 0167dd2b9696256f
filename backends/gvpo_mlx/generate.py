"""Sampling: one prefill per prompt, shared by the prompt's rows, then decoding step by step.

A row's t-th token is where the cumulative distribution first exceeds the t-th number of the row's own stream. So a
response does not depend on the batch in which it was drawn, up to float rounding. Rows that have ended make room for
waiting rows. The host waits for the device once per token. Before that it queues the next step with the tokens that the
device offers in float32. If the host chooses another token, it undoes that step. docs/mlx.md compares the speed with
mlx-lm's BatchGenerator.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import Response, Tokens
from gvpo_core.training.policy.prefixes import Part, Prefixes, parts_of
from gvpo_core.training.sampling import Sampling, uniforms
from gvpo_mlx.choice import offer, pick
from gvpo_mlx.corrections import window_of
from gvpo_mlx.model import Scorer
from gvpo_mlx.prefixes import copied, fill, unfit

UNIFORMS_AHEAD = 64  # random numbers generated at once for each row


@dataclass
class _Line:
    """A row that is being decoded."""

    prompt: int
    place: int
    seed: int
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    numbers: np.ndarray = field(default_factory=lambda: np.empty(0))

    def number(self, most: int) -> float:
        t = len(self.tokens)
        if t % UNIFORMS_AHEAD == 0:
            self.numbers = uniforms([self.seed], t, min(t + UNIFORMS_AHEAD, most))[0]
        return float(self.numbers[t % UNIFORMS_AHEAD])


def check(scorer: Scorer) -> bool:
    """Decodes two prompts of different lengths together and compares with the model's own forward pass.

    Returns: whether prompts of different lengths may be decoded together.
    Raises: ConfigError: the cache does not support batches, or logits differ even for prompts of one length.
    """
    if _padded_differs(scorer, ((1, 2, 3), (5, 6, 7))):
        raise ConfigError(
            f"{scorer.name} of mlx-lm decodes differently with its cache and without: it cannot be sampled"
        )
    return _takes_padding(scorer) and not _padded_differs(scorer, ((1, 2), (3, 4, 5, 6)))


def continues(scorer: Scorer) -> str:
    """Returns why turns cannot start from kept keys and values; empty: logits then agree with the model's own pass."""
    if reason := unfit(scorer, _cache(scorer, [0])):
        return reason
    worst = 2e-3 if scorer.dtype == mx.float32 else 1.0
    prompts: list[Tokens] = [(1, 2, 3), (5, 6, 7, 8)]
    prefixes = Prefixes(1 << 20)
    try:
        decoding = _Decoding(scorer, prompts, 2, 1 << 30, same_length=False)
        decoding.prefill([_Line(i, 0, 0) for i in range(2)])
        decoding.step(mx.array([8, 9]))
        for row, prompt in enumerate(prompts):
            prefixes.keep((*prompt, 8 + row), copied(decoding.cache or [], row, len(prompt) + 1))
        later: list[Tokens] = [(*prompts[0], 8, 4, 5), (*prompts[1], 9, 7)]
        prefixes.plan(later, [[0], [0]])
        decoding = _Decoding(scorer, later, 2, 1 << 30, same_length=False, prefixes=prefixes)
        logits = decoding.prefill([_Line(i, 0, 0) for i in range(2)])
        direct = [scorer.logits(scorer.decoder(mx.array([prompt]), cache=None)[0, -1]) for prompt in later]
        apart = max(float(mx.abs(a - b).max()) for a, b in zip(direct, logits, strict=True))
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "" if apart <= worst else f"logits then differ by up to {apart:.3g}"


def _padded_differs(scorer: Scorer, prompts: Sequence[Tokens]) -> bool:
    worst = 2e-3 if scorer.dtype == mx.float32 else 1.0
    try:
        decoding = _Decoding(scorer, prompts, 2, 1 << 30, same_length=False)
        both = [decoding.prefill([_Line(i, 0, 0) for i in range(len(prompts))])]
        if decoding.takes_back:
            decoding.step(mx.array([7, 7]))
            decoding.take_back()
        both.append(decoding.step(mx.array([8, 9])))
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{scorer.name} of mlx-lm takes no batch of rows: {type(error).__name__}: {error}") from error
    for t, logits in enumerate(both):
        for row, prompt in enumerate(prompts):
            ids = mx.array([(*prompt, 8 + row)[: len(prompt) + t]])
            direct = scorer.logits(scorer.decoder(ids, cache=None)[0, -1])
            if not float(mx.abs(direct - logits[row]).max()) <= worst:
                return True
    return False


def generate(
    scorer: Scorer,
    prompts: Sequence[Tokens],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    end: Sequence[int],
    cache_tokens: int,
    same_length: bool,
    prefixes: Prefixes | None = None,
) -> list[list[Response]]:
    """Returns len(seeds[i]) responses to prompts[i].

    Args:
      end: ids that end a response.
      cache_tokens: cache capacity in tokens; sets how many rows are decoded together.
      same_length: decode only prompts of one length together.
      prefixes: kept keys and values from which prompts start; ended responses are added. Counts in `cache_tokens`.
    """
    if prefixes is not None:
        prefixes.plan(prompts, seeds)
        cache_tokens = max(1, cache_tokens - prefixes.held)
    responses: list[list[Response | None]] = [[None] * len(row) for row in seeds]
    longest = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    waiting = deque(_Line(i, j, seed) for i in longest for j, seed in enumerate(seeds[i]))
    decoding = _Decoding(scorer, prompts, sampling.max_tokens, cache_tokens, same_length=same_length, prefixes=prefixes)
    for line in waiting:
        scorer.check_length(len(prompts[line.prompt]) + sampling.max_tokens)
    lines: list[_Line] = []
    logits = None
    while waiting or lines:
        fresh = decoding.admit(waiting)
        if fresh:
            new = decoding.prefill(fresh)
            logits = new if logits is None else mx.concatenate([logits, new])
            lines += fresh
        assert logits is not None
        numbers = np.asarray([line.number(sampling.max_tokens) for line in lines])
        live = [n for n, line in enumerate(lines) if not line.ended]
        more = any(len(lines[n].tokens) + 1 < sampling.max_tokens for n in live)
        offered = offer(logits, numbers, sampling)
        ahead = decoding.step(offered.tokens) if offered is not None and more and decoding.takes_back else None
        chosen = pick(logits, numbers, sampling, offered)
        if ahead is not None and offered is not None:
            guessed = offered.tokens.tolist()  # no wait: `pick` has evaluated them
            if any(guessed[n] != chosen[n] for n in live):
                decoding.take_back()
                ahead = None
        for line, token in zip(lines, chosen, strict=True):
            if line.ended:
                line.tokens.append(-1)  # placeholder: keeps the stream of numbers aligned until the row is dropped
                continue
            line.tokens.append(int(token))
            finished = int(token) in end
            if finished or len(line.tokens) == sampling.max_tokens:
                line.ended = True
                responses[line.prompt][line.place] = Response(tuple(line.tokens), finished)
        ended = sum(line.ended for line in lines)
        if ended == len(lines) or ended * 4 >= len(lines) or (ended and waiting):  # dropping copies the cache
            keep = [n for n, line in enumerate(lines) if not line.ended]
            decoding.keep_prefixes(lines, end)
            decoding.keep(keep)
            lines, chosen = [lines[n] for n in keep], chosen[keep]
            ahead = ahead[mx.array(keep)] if ahead is not None and keep else None
        logits = ahead if ahead is not None or not lines else decoding.step(mx.array(chosen))
    return responses  # type: ignore[return-value]


class _Decoding:
    """The cache of the rows that are being decoded, and forward passes through it."""

    def __init__(
        self,
        scorer: Scorer,
        prompts: Sequence[Tokens],
        most: int,
        budget: int,
        *,
        same_length: bool,
        prefixes: Prefixes | None = None,
    ) -> None:
        self.prefixes = prefixes
        self.scorer, self.prompts, self.most, self.budget = scorer, prompts, most, budget
        self.cache: list[Any] | None = None
        self.rows = self.width = 0
        self.same_length = same_length

    def admit(self, waiting: deque[_Line]) -> list[_Line]:
        """Takes waiting rows for which there is room; at least one if no row is being decoded."""
        fresh: list[_Line] = []
        if self.same_length and self.rows:
            return fresh
        while waiting:
            length = len(self.prompts[waiting[0].prompt])
            if self.same_length and fresh and length != len(self.prompts[fresh[0].prompt]):
                break
            rows = self.rows + len(fresh)
            width = max([self.width, *(len(self.prompts[line.prompt]) for line in fresh), length])
            if rows and (rows + 1) * (width + self.most) > self.budget:
                break
            fresh.append(waiting.popleft())
        return fresh

    def prefill(self, lines: Sequence[_Line]) -> mx.array:
        """Adds the prompts of new rows to the cache. Returns (R, V) logits after these prompts."""
        parts = parts_of([self.prompts[i] for i in sorted({line.prompt for line in lines})], self.prefixes)
        cache, logits = self._pass(parts[0])
        for part in parts[1:]:
            more, other_logits = self._pass(part)
            for c, other in zip(cache, more, strict=True):
                c.extend(other)
            logits = mx.concatenate([logits, other_logits])
        places = {prompt: n for n, prompt in enumerate(prompt for part in parts for prompt in part.prompts)}
        owners = mx.array([places[self.prompts[line.prompt]] for line in lines])
        if self.prefixes is not None:
            self.prefixes.started([self.prompts[line.prompt] for line in lines])
        for c in cache:
            c.filter(owners)
        logits = logits[owners]
        if self.cache is None:
            self.cache = cache
        else:
            for c, other in zip(self.cache, cache, strict=True):
                c.extend(other)
        mx.async_eval(logits, [c.state for c in self.cache])
        self.rows += len(lines)
        self.width = max(self.width, *(len(self.prompts[line.prompt]) for line in lines))
        return logits

    def _pass(self, part: Part) -> tuple[list[Any], mx.array]:
        """Returns the caches of U prompts and (U, V) logits after them. Computes only tokens without kept states."""
        width = max(map(len, part.prompts))
        padding = [width - len(prompt) for prompt in part.prompts]
        ids = np.zeros((len(part.prompts), width), dtype=np.int32)
        for b, prompt in enumerate(part.prompts):
            ids[b, padding[b] :] = prompt
        cache = _cache(self.scorer, padding)
        fill(cache, part)
        return cache, self.scorer.logits(
            self.scorer.decoder(mx.array(ids[:, width - part.fresh :]), cache=cache)[:, -1]
        )

    def keep_prefixes(self, lines: Sequence[_Line], end: Sequence[int]) -> None:
        """Keeps the states of rows that have ended, before those are dropped."""
        for row, line in enumerate(lines) if self.prefixes is not None else ():
            ids = [token for token in line.tokens if token >= 0]  # without placeholders after the end
            sequence = (*self.prompts[line.prompt], *ids[:-1])
            if line.ended and ids[-1] in end and self.prefixes is not None and self.prefixes.wants(sequence):
                self.prefixes.keep(sequence, copied(self.cache or [], row, len(sequence)))

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all other rows."""
        self.rows = len(rows)
        if not rows:
            self.cache, self.width = None, 0
            return
        assert self.cache is not None
        for c in self.cache:
            c.filter(mx.array([*rows]))

    @property
    def takes_back(self) -> bool:
        """Whether the last step can be undone: not if it overwrote a recurrent state or a window's oldest token."""
        return all(type(c).__name__ == "BatchKVCache" for c in self.cache or [])

    def take_back(self) -> None:
        """Undoes the last step."""
        self.width -= 1
        for c in self.cache or []:
            c.trim(1)

    def step(self, tokens: mx.array) -> mx.array:
        """Appends one token per row, (R,). Returns (R, V) logits after it."""
        hidden = self.scorer.decoder(tokens.astype(mx.int32)[:, None], cache=self.cache)
        self.width += 1
        logits = self.scorer.logits(hidden[:, -1])
        mx.async_eval(logits, [c.state for c in self.cache or []])  # `pick` waits for them
        return logits


def _cache(scorer: Scorer, padding: Sequence[int]) -> list[Any]:
    """Returns mlx-lm's caches for a batch of rows, padded on the left."""
    from mlx_lm.models.cache import (
        ArraysCache,
        BatchKVCache,
        BatchRotatingKVCache,
        KVCache,
        RotatingKVCache,
        make_prompt_cache,
    )

    caches: list[Any] = []
    for layer, c in zip(scorer.lm.layers, make_prompt_cache(scorer.lm), strict=False):
        window = window_of(layer)
        if window is not None:
            caches.append(BatchRotatingKVCache(window, list(padding)))
        elif type(c) is KVCache:
            caches.append(BatchKVCache(list(padding)))
        elif type(c) is RotatingKVCache and not c.keep:
            caches.append(BatchRotatingKVCache(c.max_size, list(padding)))
        elif isinstance(c, ArraysCache):
            caches.append(ArraysCache(len(c.cache)))
        else:
            raise ValueError(f"{scorer.name} decodes with a {type(c).__name__}, which takes no batch of rows")
    return caches


def _takes_padding(scorer: Scorer) -> bool:
    """Whether prompts of different lengths can be decoded together: a recurrent state would include the padding."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

    return all(type(c) in (KVCache, RotatingKVCache) for c in make_prompt_cache(scorer.lm))

"""Keys and values of conversations between their turns: a turn computes only the tokens that are new to it.

After a turn, the keys and values of its prompt and response are kept. The next prompt that begins with the same tokens
starts from them. This is exact where a token's keys and values depend on the tokens before it alone: layers that all
attend to everything, and RoPE that does not depend on the length. `check.continues` also compares it with scoring.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from gvpo_core.training.policy import Tokens
from gvpo_torch.fixed import is_plain
from gvpo_torch.model import Scorer

States = list[tuple[Tensor, Tensor]]  # of each layer, keys and values (heads, tokens, width)


class Start(NamedTuple):
    """What a prompt can start from."""

    tokens: Tokens  # of the kept conversation; empty: none
    length: int  # tokens that the prompt shares with it, at most all but its last


class Prefixes:
    """Kept keys and values, by the tokens that they are of."""

    def __init__(self, most: int) -> None:
        """`most`: tokens kept at most; conversations beyond it are computed again."""
        self.most, self.held = most, 0
        self.reused = self.computed = 0  # tokens of prompts since the start, without padding
        self._keys: list[Tokens] = []  # sorted
        self._states: dict[Tokens, States] = {}  # oldest first
        self._starts: dict[Tokens, Start] = {}  # of the prompts of the present call
        self._uses: Counter[Tokens] = Counter()  # rows of the present call that have yet to start from it

    def plan(self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]]) -> None:
        """Begins a call: finds what each prompt starts from."""
        self._starts = {prompt: self._longest(prompt) for prompt in prompts}
        self._uses = Counter()
        for prompt, own in zip(prompts, seeds, strict=True):
            self._uses[self._starts[prompt].tokens] += len(own)

    def _longest(self, prompt: Tokens) -> Start:
        """The kept conversation with the most tokens in common: a neighbour of the prompt in sorted order."""
        at, best = bisect_left(self._keys, prompt), Start((), 0)
        for tokens in self._keys[max(0, at - 1) : at + 1]:
            length = _common(tokens, prompt)
            best = max(best, Start(tokens, min(length, len(prompt) - 1)), key=lambda start: start.length)
        return best if best.length else Start((), 0)

    def start(self, prompt: Tokens) -> Start:
        """What a prompt of the present call starts from."""
        start = self._starts.get(prompt, Start((), 0))
        return start if start.tokens in self._states else Start((), 0)

    def fill(self, cache: Any, starts: Sequence[tuple[Start, int]]) -> None:
        """Fills an empty cache, padded on the left.

        Args:
          starts: of each row, and how many of its tokens to take; none where that is not positive.
        """
        width = max(count for _, count in starts)
        if width <= 0:
            return
        rows = [(b, self._states[start.tokens], count) for b, (start, count) in enumerate(starts) if count > 0]
        for number, of_layer in enumerate(rows[0][1]):
            made = []
            for part, like in enumerate(of_layer):
                states = like.new_zeros((len(starts), like.shape[0], width, like.shape[2]))
                for b, kept, count in rows:
                    states[b, :, width - count :] = kept[number][part][:, :count]
                made.append(states)
            cache.update(*made, number)

    def count(self, reused: int, computed: int) -> None:
        """Adds tokens of prompts, without padding."""
        self.reused += reused
        self.computed += computed

    def started(self, prompts: Sequence[Tokens]) -> None:
        """Rows of these prompts have their caches. What no other row of the call starts from is dropped."""
        for prompt in prompts:
            tokens = self._starts[prompt].tokens
            self._uses[tokens] -= 1
            if tokens and not self._uses[tokens]:
                self._drop(tokens)

    def keep(self, tokens: Tokens, states: States) -> None:
        """Keeps copies of a conversation's keys and values, where older ones that no row waits for leave room."""
        if tokens in self._states:
            return
        idle = [other for other in self._states if not self._uses[other]]
        while self.held + len(tokens) > self.most and idle:
            self._drop(idle.pop(0))
        if self.held + len(tokens) <= self.most:
            self._states[tokens] = [(keys.clone(), values.clone()) for keys, values in states]
            insort(self._keys, tokens)
            self.held += len(tokens)

    def _drop(self, tokens: Tokens) -> None:
        if self._states.pop(tokens, None) is not None:
            del self._keys[bisect_left(self._keys, tokens)]
            self.held -= len(tokens)


def _common(a: Tokens, b: Tokens) -> int:
    """Tokens with which both begin."""
    return next((n for n, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def unfit(scorer: Scorer, cache: Any) -> str:
    """Why a model's turns cannot start from what is kept, by its settings and a filled cache; empty: nothing found."""
    if scorer.rope is not None:
        return "RoPE depends on the length of the row"
    if is_plain(cache):
        return ""
    kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}))
    return f"its cache has {kinds}, which may not hold every token"

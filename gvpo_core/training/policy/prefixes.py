"""Keeps keys and values of conversations between the turns of episodes, and finds those that a prompt can start from.

After a turn, the keys and values of its prompt and response are kept. The next prompt that begins with the same tokens
starts from them. This is exact if a token's keys and values depend only on the tokens before it: all layers have full
attention, and RoPE does not depend on the length. The tensors are the backend's.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from gvpo_core.training.policy.protocol import Tokens


class Start(NamedTuple):
    """The kept conversation that a prompt can start from."""

    tokens: Tokens  # of the kept conversation; empty: none
    length: int  # tokens that the prompt shares with it, at most all of its own but the last


NOTHING = Start((), 0)


class Part(NamedTuple):
    """Prompts computed in one pass, padded on the left to equal lengths."""

    prompts: list[Tokens]
    states: list[Any]  # kept keys and values of each prompt; None: nothing is kept
    fresh: int  # number of last columns to compute; the columns before are filled from `states`

    @property
    def filled(self) -> list[int]:
        """For each prompt, the number of tokens that are not computed; 0 or less: none."""
        return [len(prompt) - self.fresh for prompt in self.prompts]


class Prefixes:
    """Kept keys and values, by the tokens that they belong to."""

    def __init__(self, most: int) -> None:
        """`most`: limit of kept tokens; conversations beyond it are computed again."""
        self.most, self.held = most, 0
        self.reused = self.computed = 0  # tokens of prompts since the start, without padding
        self._keys: list[Tokens] = []  # sorted
        self._states: dict[Tokens, Any] = {}  # oldest first
        self._starts: dict[Tokens, Start] = {}  # by prompt of the current call
        self._uses: Counter[Tokens] = Counter()  # rows of the current call that have not started from it yet

    def plan(self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]]) -> None:
        """Begins a call: finds the conversation that each prompt starts from."""
        self._starts = {prompt: self._longest(prompt) for prompt in prompts}
        self._uses = Counter()
        for prompt, row in zip(prompts, seeds, strict=True):
            self._uses[self._starts[prompt].tokens] += len(row)

    def _longest(self, prompt: Tokens) -> Start:
        """Returns the kept conversation with the most tokens in common: a neighbour of the prompt in sorted order."""
        at, best = bisect_left(self._keys, prompt), NOTHING
        for tokens in self._keys[max(0, at - 1) : at + 1]:
            length = common(tokens, prompt)
            best = max(best, Start(tokens, min(length, len(prompt) - 1)), key=lambda start: start.length)
        return best if best.length else NOTHING

    def start(self, prompt: Tokens) -> Start:
        """Returns the conversation that a prompt of the current call starts from."""
        start = self._starts.get(prompt, NOTHING)
        return start if start.tokens in self._states else NOTHING

    def started(self, prompts: Sequence[Tokens]) -> None:
        """Notes that rows of these prompts have their caches. Drops conversations that no other row needs."""
        for prompt in prompts:
            tokens = self._starts[prompt].tokens
            self._uses[tokens] -= 1
            if tokens and not self._uses[tokens]:
                self._drop(tokens)

    def wants(self, tokens: Tokens) -> bool:
        """Makes room for a conversation: drops older ones that no row needs. Returns whether to call `keep`."""
        if tokens in self._states or len(tokens) > self.most:
            return False
        if self.held + len(tokens) > self.most:
            for other in [other for other in self._states if not self._uses[other]]:
                self._drop(other)
                if self.held + len(tokens) <= self.most:
                    break
        return self.held + len(tokens) <= self.most

    def keep(self, tokens: Tokens, states: Any) -> None:
        """Keeps a conversation that `wants` accepted: keys and values of its tokens, copied from a cache."""
        self._states[tokens] = states
        insort(self._keys, tokens)
        self.held += len(tokens)

    def clear(self) -> None:
        """Drops everything that is kept. Keeps the counts."""
        for tokens in [*self._states]:
            self._drop(tokens)

    def _drop(self, tokens: Tokens) -> None:
        if self._states.pop(tokens, None) is not None:
            del self._keys[bisect_left(self._keys, tokens)]
            self.held -= len(tokens)


def parts_of(prompts: Sequence[Tokens], prefixes: Prefixes | None) -> list[Part]:
    """Splits prompts into passes: up to two that start from kept tokens, see `_alike`, and one for the others."""
    starts = [NOTHING if prefixes is None else prefixes.start(prompt) for prompt in prompts]
    new = [len(prompt) - start.length for prompt, start in zip(prompts, starts, strict=True)]
    continued = _alike([i for i, start in enumerate(starts) if start.length], new)
    others = [i for i, start in enumerate(starts) if not start.length]
    return [part_of([prompts[i] for i in chosen], prefixes) for chosen in (*continued, others) if chosen]


def part_of(prompts: list[Tokens], prefixes: Prefixes | None) -> Part:
    """Returns the pass for one or more prompts. Either all or none start from kept tokens. Counts their tokens."""
    starts = [NOTHING if prefixes is None else prefixes.start(prompt) for prompt in prompts]
    states = [prefixes._states.get(start.tokens) if prefixes else None for start in starts]
    part = Part(prompts, states, max(len(prompt) - start.length for prompt, start in zip(prompts, starts, strict=True)))
    if prefixes is not None:
        filled = sum(max(0, count) for count in part.filled)
        prefixes.reused += filled
        prefixes.computed += sum(map(len, prompts)) - filled
    return part


def _alike(rows: Sequence[int], new: Sequence[int]) -> list[list[int]]:
    """Splits rows into one part, or into two if two compute at most half as many tokens: turns differ in length.

    Args:
      new: tokens to compute for each row. For every row, a part computes as many as for the row with the most.
    """
    ordered, count = sorted(rows, key=lambda i: new[i]), len(rows)
    computed = [n * new[ordered[n - 1]] + (count - n) * new[ordered[-1]] for n in range(count)]  # by rows of the first
    n = min(range(count), key=lambda n: computed[n], default=0)
    return [ordered[:n], ordered[n:]] if n and 2 * computed[n] <= computed[0] else [list(rows)]


def common(a: Tokens, b: Tokens) -> int:
    """Returns the number of tokens with which both begin."""
    least, most = 0, min(len(a), len(b)) if a[:1] == b[:1] else 0
    while least < most:  # comparing slices is many times faster than comparing tokens
        middle = (least + most + 1) // 2
        least, most = (middle, most) if a[least:middle] == b[least:middle] else (least, middle - 1)
    return least

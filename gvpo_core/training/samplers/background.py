"""Samplers that draw in the background, while the caller continues."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, Protocol

from gvpo_core.training.policy import Policy
from gvpo_core.training.policy.protocol import Tokens
from gvpo_core.training.samplers.protocol import Responses, Sampler, refresh
from gvpo_core.training.samplers.workers import Workers
from gvpo_core.training.sampling import Sampling


class Asks(Sampler, Protocol):
    """A sampler that rollout.ahead can use."""

    def ask(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> Callable[[], Responses]:
        """Requests responses with the current weights. Returns: a function that waits for them and returns them."""

    def probe(self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling) -> Responses:
        """Draws before all requests that have not begun."""


class InBackground:
    """Runs a sampler that only has `generate` in a thread. Its weights change after all requests are answered."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self._workers: Workers[Responses] = Workers(1)
        self._pending: list[Future[Responses]] = []

    @property
    def stopping(self) -> Callable[[], bool]:
        """See `Sampler`."""
        stopping: Callable[[], bool] = self.sampler.stopping  # type: ignore[attr-defined]
        return stopping

    @stopping.setter
    def stopping(self, stopping: Callable[[], bool]) -> None:
        self.sampler.stopping = stopping  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)  # gap_tolerance, failures, version, describe

    def ask(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling, *, first: bool = False
    ) -> Callable[[], Responses]:
        """See `Asks`."""
        draw: Callable[[], Responses] = partial(self.sampler.generate, prompts, seeds, sampling) if prompts else list
        future = self._workers.submit(draw, first=first)
        self._pending = [*(f for f in self._pending if not f.done()), future]
        return future.result

    def probe(self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling) -> Responses:
        """See `Asks`."""
        return self.ask(prompts, seeds, sampling, first=True)()

    def generate(self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling) -> Responses:
        """See `Sampler`."""
        return self.ask(prompts, seeds, sampling)()

    def refresh(self, policy: Policy, version: int) -> None:
        """See `Sampler`."""
        wait(self._pending)
        refresh(self.sampler, policy, version)

    def close(self) -> None:
        """Ends the thread. The caller that opened the sampler closes it."""
        self._workers.close()

"""The `Sampler` protocol, the responses of a sampler, and the check of its log-probabilities against the policy's."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gvpo_core.training.policy import Policy, Prompt, Response, Tokens
from gvpo_core.training.sampling import Sampling


class SamplerError(RuntimeError):
    """A sampler that gave nothing usable, or whose weights are not the policy's; the message says which."""


class Stopped(SamplerError):
    """The run was asked to stop while its sampler waited for a server: the step is not taken."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


STOPPED = "asked to stop while the server is away"


AGAIN, OTHER_WEIGHTS, LOST_WEIGHTS = 1, 2, 3
"""Values of a sampler's `retry` after `generate`: a failure may pass; the responses were drawn with other weights than
they were asked for, and none is given; the same, and the server lacks the newest weights. 0: nothing of the kind."""


@dataclass(frozen=True)
class Drawn(Response):
    """A response with what its sampler knows about it. The step uses neither."""

    logprob: float = float("nan")  # nats, sum over the tokens, at temperature 1
    version: int | None = None  # steps that the weights had taken


@dataclass(frozen=True)
class Text:
    """A response as text. It is tokenized here, by the policy's tokenizer, and gets its end token if it is finished.

    Its tokens may be others than were sampled. They are still a response of the policy with a positive probability,
    which is all that Cor. 3.2 asks of a sampler.
    """

    text: str
    finished: bool  # False: cut at the token limit
    version: int | None = None  # steps that the weights had taken
    tokens: int | None = None  # as the sampler counts them


Given = Sequence[Sequence[Response | Text]]
"""Responses by prompt."""


class Sampler(Protocol):
    """Draws responses instead of the policy. A class may leave out `refresh` and `close`.

    Attribute `gap_tolerance`, where there is one: largest difference between `Drawn.logprob` and the policy's own
    log-probability, nats a token; a response beyond it stops the run. `gap_every`: steps between two comparisons.
    `dtype`: of the sampler's products, or auto: the policy's; see `GapCheck`. Attribute `messages`, where it is True:
    `generate` gets the prompts as the data has them, chat messages or text, instead of token ids. Attribute `stopping`,
    where there is one: the run sets it to a function that tells whether it was asked to stop; a `generate` or `refresh`
    that waits for a server then raises `Stopped`.
    """

    def generate(self, prompts: Sequence[Any], seeds: Sequence[Sequence[int]], sampling: Sampling) -> Given:
        """Draws a response for each seed of each prompt. A prompt may get fewer; the others are counted as lost.

        Args:
          prompts: token ids of each; see `messages`.
        """

    def refresh(self, policy: Policy, version: int) -> None:
        """Takes the policy's weights. Called on every rank before each `generate`, perhaps again with one version.

        Args:
          version: steps that the policy has taken in this run.
        """

    def close(self) -> None:
        """Ends what the sampler holds. Called when training ends, also by an error."""


def asked_with(sampler: object, prompts: Sequence[Prompt], tokens: Sequence[Tokens]) -> Sequence[Any]:
    """What the sampler's `generate` gets: token ids, or the prompts as the data has them."""
    return prompts if getattr(sampler, "messages", False) else tokens


def describe(sampler: object) -> str:
    """What the sampler is, for the header: what its `describe` gives, or the name of its class."""
    method = getattr(sampler, "describe", None)
    return str(method()) if callable(method) else type(sampler).__name__


def refresh(sampler: object, policy: Policy, version: int) -> None:
    """Calls the sampler's `refresh` where it has one."""
    if (method := getattr(sampler, "refresh", None)) is not None:
        method(policy, version)


def heed(sampler: object, stopping: Callable[[], bool]) -> None:
    """Tells a sampler that has `stopping` how to hear that the run was asked to stop."""
    if hasattr(sampler, "stopping"):
        sampler.stopping = stopping


@contextmanager
def closing(sampler: object) -> Iterator[None]:
    """Calls the sampler's `close` at the end."""
    try:
        yield
    finally:
        close(sampler)


def close(sampler: object) -> None:
    """Calls the sampler's `close` where it has one."""
    if (method := getattr(sampler, "close", None)) is not None:
        method()


def staleness(responses: Sequence[Response], version: int) -> np.ndarray:
    """(N,) float64: steps that a policy of `version` has taken since the weights of each response; NaN = unknown."""
    versions = [r.version if isinstance(r, Drawn) else None for r in responses]
    return np.asarray([np.nan if v is None else version - v for v in versions], np.float64)

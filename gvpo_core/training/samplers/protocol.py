"""The `Sampler` protocol, the responses of a sampler, and helpers that call a sampler's optional methods."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gvpo_core.training.policy import Policy, Prompt, Response, Tokens
from gvpo_core.training.sampling import Sampling


class SamplerError(RuntimeError):
    """A sampler returned nothing usable, or does not have the policy's weights; the message says which."""


class Stopped(SamplerError):
    """The run was asked to stop while its sampler waited for a server. The step is not taken."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


STOPPED = "asked to stop while the server is away"


AGAIN, OTHER_WEIGHTS, LOST_WEIGHTS = 1, 2, 3
"""Values of a sampler's `retry` after `generate`. AGAIN: a failure may be transient. OTHER_WEIGHTS: the responses were
drawn with other weights than requested, and none is returned. LOST_WEIGHTS: also, the server lacks the newest weights.
0: none of these."""


@dataclass(frozen=True)
class Drawn(Response):
    """A response with facts from its sampler. The step does not use them."""

    logprob: float = float("nan")  # nats, sum over the tokens, at temperature 1
    version: int | None = None  # steps taken by the weights that drew it


@dataclass(frozen=True)
class Text:
    """A response as text. The policy's tokenizer encodes it here, and adds the end token if it is finished.

    Its tokens may differ from the sampled ones. They are still a response of the policy with a positive probability,
    which is all that Cor. 3.2 requires of a sampler.
    """

    text: str
    finished: bool  # False: cut at the token limit
    version: int | None = None  # steps taken by the weights that drew it
    tokens: int | None = None  # number of tokens, as counted by the sampler


Responses = Sequence[Sequence[Response | Text]]
"""Responses by prompt."""


class Sampler(Protocol):
    """Draws responses instead of the policy. A class may leave out `refresh` and `close`.

    Optional attributes: `gap_tolerance` is the largest difference between `Drawn.logprob` and the policy's own
    log-probability, nats per token; a response beyond it stops the run. `gap_every`: steps between two comparisons.
    `dtype`: what the sampler computes in, or auto for the policy's dtype; see `GapCheck`. If `messages` is True,
    `generate` gets the prompts as the data has them, chat messages or text, instead of token ids. The run sets
    `stopping` to a function that tells whether the run was asked to stop. A `generate` or `refresh` that waits for a
    server must then raise `Stopped`.
    """

    def generate(self, prompts: Sequence[Any], seeds: Sequence[Sequence[int]], sampling: Sampling) -> Responses:
        """Draws a response for each seed of each prompt. It may return fewer; the missing ones count as lost.

        Args:
          prompts: token ids of each prompt; see `messages`.
        """

    def refresh(self, policy: Policy, version: int) -> None:
        """Loads the policy's weights. Called on every rank before each `generate`, perhaps again with one version.

        Args:
          version: steps that the policy has taken in this run.
        """

    def close(self) -> None:
        """Releases the sampler's resources. Called when training ends, also after an error."""


def prompts_for(sampler: object, prompts: Sequence[Prompt], tokens: Sequence[Tokens]) -> Sequence[Any]:
    """Returns the prompts for the sampler's `generate`: as token ids, or as the data has them."""
    return prompts if getattr(sampler, "messages", False) else tokens


def describe(sampler: object) -> str:
    """Describes the sampler for the header: result of its `describe`, or the name of its class."""
    method = getattr(sampler, "describe", None)
    return str(method()) if callable(method) else type(sampler).__name__


def refresh(sampler: object, policy: Policy, version: int) -> None:
    """Calls the sampler's `refresh` if it has one."""
    if (method := getattr(sampler, "refresh", None)) is not None:
        method(policy, version)


def heed(sampler: object, stopping: Callable[[], bool]) -> None:
    """Sets `stopping` of a sampler that has it."""
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
    """Calls the sampler's `close` if it has one."""
    if (method := getattr(sampler, "close", None)) is not None:
        method()


def staleness(responses: Sequence[Response], version: int) -> np.ndarray:
    """(N,) float64: steps between the weights of each response and a policy of `version`; NaN = unknown."""
    versions = [r.version if isinstance(r, Drawn) else None for r in responses]
    return np.asarray([np.nan if v is None else version - v for v in versions], np.float64)

"""The `Sampler` protocol, the responses of a sampler, and the check of its log-probabilities against the policy's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gvpo_core.training.policy import Policy, Prompt, Response, Tokens
from gvpo_core.training.sampling import Sampling


class SamplerError(RuntimeError):
    """A sampler that gave nothing usable, or whose weights are not the policy's; the message says which."""


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
    log-probability, nats a token; a response beyond it stops the run. Attribute `messages`, where it is True:
    `generate` gets the prompts as the data has them, chat messages or text, instead of token ids.
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


MEAN_GAP = 0.25
"""Nats a token between a sampler and the policy whose weights it has: ten times what 16 bits explain."""


def staleness(responses: Sequence[Response], version: int) -> np.ndarray:
    """(N,) float64: steps that a policy of `version` has taken since the weights of each response; NaN = unknown."""
    versions = [r.version if isinstance(r, Drawn) else None for r in responses]
    return np.asarray([np.nan if v is None else version - v for v in versions], np.float64)


def gaps(sampler_logprobs: np.ndarray, logprobs: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """|sampler - policy| of the log-probabilities, nats a token, of the responses that have both.

    Args:
      sampler_logprobs: (N,) nats, sum over the tokens; NaN = unknown.
      logprobs: (N,) nats, of the policy; NaN = not scored.
      lengths: (N,) tokens.
    Returns: (M,) with M <= N.
    """
    gap = np.abs(np.asarray(sampler_logprobs) - np.asarray(logprobs)) / np.asarray(lengths)
    known: np.ndarray = gap[~np.isnan(gap)]
    return known


def check_gap(
    sampler_logprobs: np.ndarray | None,
    logprobs: np.ndarray,
    lengths: np.ndarray,
    tolerance: float | None,
    stale: np.ndarray | None = None,
) -> None:
    """Raises: SamplerError: a tolerance, nats a token, and a gap beyond it, or no log-probability to compare.

    Without a tolerance, responses of the policy's present weights, by their `Drawn.version`, must have a mean gap of at
    most `MEAN_GAP`. For the other arguments see `gaps`; None: no response has a log-probability of its sampler.

    Args:
      stale: (N,) of `staleness`; None: not known, and nothing is compared without a tolerance.
    """
    if tolerance is None:
        if sampler_logprobs is not None and stale is not None:
            fresh = np.where(stale == 0, sampler_logprobs, np.nan)
            _check_mean(gaps(fresh, logprobs, lengths))
        return
    gap = np.zeros(0) if sampler_logprobs is None else gaps(sampler_logprobs, logprobs, lengths)
    if not gap.size:
        raise SamplerError(
            "gap_tolerance is set, but no response of the step has its sampler's log-probability (Drawn.logprob), so"
            " nothing was compared"
        )
    if gap.max() > tolerance:
        raise SamplerError(
            f"the sampler's log-probabilities differ from the policy's by up to {gap.max():.3g} nats a token; at most"
            f" {tolerance:g} is allowed (gap_tolerance): its weights are old or partly updated, its prefix cache is"
            " stale, or it computes in another precision"
        )


def _check_mean(gap: np.ndarray) -> None:
    if gap.size and gap.mean() > MEAN_GAP:
        raise SamplerError(
            f"the sampler says that it has the policy's weights, and their log-probabilities differ by {gap.mean():.3g}"
            f" nats a token on average; at most {MEAN_GAP:g} is allowed: its weights are old or partly updated, its"
            " prefix cache is stale, or it serves another model. Where one of the two computes in few bits, set"
            " gap_tolerance, which replaces this check"
        )

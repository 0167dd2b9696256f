"""Draws responses with a sampler instead of the policy: requests them, tokenizes text, and checks the result."""

import math
import time
from collections.abc import Sequence

import numpy as np

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import Policy, Prompt, Response, ResponseError, masks_of
from gvpo_core.training.policy.protocol import Tokens
from gvpo_core.training.policy.ranks import agree, attempt, highest
from gvpo_core.training.samplers.http import between_looks, sleep
from gvpo_core.training.samplers.protocol import (
    AGAIN,
    LOST_WEIGHTS,
    OTHER_WEIGHTS,
    Drawn,
    Sampler,
    SamplerError,
    Text,
    prompts_for,
)
from gvpo_core.training.sampling import Sampling


def draw_elsewhere(
    policy: Policy,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    tokens: Sequence[Tokens],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    all_lost: bool = False,
) -> tuple[list[list[Response]], dict[str, float]]:
    """Draws responses to this rank's prompts with the sampler. Every rank calls this.

    A sampler with `retry` (see `protocol.AGAIN`) is called again until its `deadline` if it returned nothing but may
    later, or if it had other weights.

    Args:
      prompts, tokens: each prompt as the data has it, and its token ids.
      all_lost: accept that no response arrives.
    Returns: responses of each prompt, and metrics.
    Raises: SamplerError: on every rank, if the sampler returns more responses than requested, returns nothing on all
      ranks, returns a response with an end that contradicts `finished`, or has other weights until the deadline.
      ConfigError: tokens that the policy does not have.
    """

    def work() -> Sequence[Sequence[Response | Text]]:
        drawn = sampler.generate(prompts_for(sampler, prompts, tokens), seeds, sampling) if tokens else []
        got, requested = [len(many) for many in drawn], [len(row) for row in seeds]
        if len(got) != len(requested) or any(g > w for g, w in zip(got, requested, strict=True)):
            raise SamplerError(f"the sampler gave {got} responses to the prompts; expected at most {requested}")
        return drawn

    total = int(policy.gather(np.asarray([sum(map(len, seeds))])).sum())
    again = _Again(policy, sampler)
    while True:
        sampled = attempt(policy, work, kind=SamplerError)
        assert sampled is not None  # every rank samples
        tokenizer = _Tokenizer(policy, sampling.max_tokens)
        drawn = [tokenizer.responses(prompt, many) for prompt, many in zip(prompts, sampled, strict=True)]
        attempt(policy, lambda drawn=drawn: _check(policy, [r for many in drawn for r in many]), kind=ConfigError)  # type: ignore[misc]
        counts = policy.gather(np.asarray([[sum(map(len, drawn)), tokenizer.texts, tokenizer.others]])).sum(axis=0)
        if not total or not again.needed(asked=bool(tokens), nothing=not counts[0]):
            break
    if again.other_weights or (not counts[0] and not all_lost):
        reasons = dict.fromkeys([*getattr(sampler, "failures", ()), *tokenizer.failures])
        of = " of the weights that were sent" if again.other_weights else ""
        agree(
            policy,
            SamplerError("; ".join([f"the sampler gave none of {total} responses{of}", *[*reasons][:3]])),
            SamplerError,
        )
    metrics = {"responses/lost": float(total - counts[0])}
    return drawn, metrics | ({"sampler/retokenized": int(counts[2])} if counts[1] else {})


class _Again:
    """Decides whether a sampler must draw again. Every rank calls its methods."""

    def __init__(self, policy: Policy, sampler: Sampler) -> None:
        self._policy, self._sampler = policy, sampler
        self._until, self._number = time.monotonic() + getattr(sampler, "deadline", 0.0), 0
        self.other_weights = False  # the responses have other weights than requested, and the time is over

    def needed(self, *, asked: bool, nothing: bool) -> bool:
        """Returns whether to draw again. First sends lost weights again, or waits if there was no response.

        Args:
          asked: whether this rank had prompts.
          nothing: whether no rank got a response.
        """
        policy, sampler = self._policy, self._sampler
        need = highest(policy, int(getattr(sampler, "retry", 0)) if asked else 0)
        if need < OTHER_WEIGHTS and not (nothing and need == AGAIN):
            return False
        if highest(policy, int(time.monotonic() > self._until)):
            self.other_weights = need >= OTHER_WEIGHTS
            return False
        self._number += 1
        if need == LOST_WEIGHTS:
            sampler.send_again(policy)  # type: ignore[attr-defined]
        else:
            seconds = between_looks(0.05 * 2.0**self._number)
            stopping = getattr(sampler, "stopping", bool)
            attempt(policy, lambda: sleep(seconds, stopping), kind=SamplerError)
        return True


class _Tokenizer:
    """Converts texts to responses."""

    def __init__(self, policy: Policy, max_tokens: int) -> None:
        self.policy, self.max_tokens = policy, max_tokens
        self.texts, self.others = 0, 0  # number of texts, and of texts with another token count than sampled
        self.failures: list[str] = []

    def responses(self, prompt: Prompt, drawn: Sequence[Response | Text]) -> list[Response]:
        """Returns the responses that are valid for the policy."""
        encoded = [self._response(prompt, item) if isinstance(item, Text) else item for item in drawn]
        return [response for response in encoded if response is not None]

    def _response(self, prompt: Prompt, text: Text) -> Response | None:
        try:
            (response,) = self.policy.encode_responses(prompt, [text.text], [text.finished])
        except ResponseError as error:
            self.failures.append(f"a text cannot be a response: {error}")
            return None
        ids, count = response.tokens, len(response.tokens)
        if count > self.max_tokens and text.finished:
            self.failures.append(f"a text has {count} tokens here, and rollout.max_tokens is {self.max_tokens}")
            return None
        self.texts += 1
        self.others += text.tokens is not None and text.tokens not in (count, count - text.finished)
        return Drawn(ids[: self.max_tokens], text.finished, math.nan, text.version)


def _check(policy: Policy, responses: Sequence[Response]) -> None:
    vocabulary = policy.describe().vocabulary or math.inf
    largest = max((max(r.tokens) for r in responses if r.tokens), default=-1)
    if largest >= vocabulary:
        raise ConfigError(
            f"the sampler drew the token id {largest}, and the policy's vocabulary ends at {vocabulary - 1}: use a"
            " sampler with the policy's tokenizer"
        )
    if hasattr(policy, "encode_responses"):
        try:
            masks = masks_of(responses)
            options = {} if masks is None else {"masks": masks}
            policy.encode_responses("", [r.tokens for r in responses], [r.finished for r in responses], **options)
        except ResponseError as error:
            ids = responses[error.number].tokens
            raise SamplerError(f"the sampler gave the tokens {_shown(ids)} as a response: {error}") from error


def _shown(ids: Tokens) -> str:
    return str(list(ids)) if len(ids) <= 8 else f"[{', '.join(map(str, ids[:3]))}, ..., {ids[-1]}] ({len(ids)})"

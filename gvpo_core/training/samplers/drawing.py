"""Responses from a sampler in the place of the policy, and what they must be."""

import math
from collections.abc import Sequence

import numpy as np

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import Policy, Response, ResponseError
from gvpo_core.training.policy.protocol import Tokens
from gvpo_core.training.policy.ranks import agree, attempt
from gvpo_core.training.samplers.protocol import Sampler, SamplerError
from gvpo_core.training.sampling import Sampling


def draw_elsewhere(
    policy: Policy,
    sampler: Sampler,
    prompts: Sequence[Tokens],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
) -> Sequence[Sequence[Response]]:
    """What the sampler gives to this rank's prompts; every rank calls.

    Raises: SamplerError: on every rank, where it gives more than was asked for, nothing on all ranks, or a response
      whose end contradicts `finished`. ConfigError: tokens that the policy does not have.
    """

    def work() -> Sequence[Sequence[Response]]:
        drawn = sampler.generate(prompts, seeds, sampling) if prompts else []
        got, wanted = [len(many) for many in drawn], [len(own) for own in seeds]
        if len(got) != len(wanted) or any(g > w for g, w in zip(got, wanted, strict=True)):
            raise SamplerError(f"the sampler gave {got} responses to the prompts; expected at most {wanted}")
        return drawn

    drawn = attempt(policy, work, kind=SamplerError)
    assert drawn is not None  # every rank samples
    attempt(policy, lambda: _check(policy, [r for many in drawn for r in many]), kind=ConfigError)
    if not policy.gather(np.asarray([sum(map(len, drawn))])).sum():
        agree(policy, _nothing(sampler, sum(map(len, seeds))), SamplerError)
    return drawn


def _nothing(sampler: Sampler, total: int) -> SamplerError:
    reasons = list(dict.fromkeys(getattr(sampler, "failures", ())))
    return SamplerError("; ".join([f"the sampler gave none of {total} responses", *reasons[:3]]))


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
            policy.encode_responses("", [r.tokens for r in responses], [r.finished for r in responses])
        except ResponseError as error:
            ids = responses[error.number].tokens
            raise SamplerError(f"the sampler gave the tokens {_shown(ids)} as a response: {error}") from error


def _shown(ids: Tokens) -> str:
    return str(list(ids)) if len(ids) <= 8 else f"[{', '.join(map(str, ids[:3]))}, ..., {ids[-1]}] ({len(ids)})"

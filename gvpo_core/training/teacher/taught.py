"""Sequence-level distillation: a teacher replaces pi_ref (GVPO++, arXiv 2609.21432).

The teacher scores the text of a response with its own tokenizer, which may differ from the student's. If all rewards
are 0, the unique minimum of the loss is the teacher, for any sampler. With rewards it is pi_T exp(R / beta) / Z.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from gvpo_core.training.config import ConfigError
from gvpo_core.training.data import Prompts
from gvpo_core.training.policy import Batch, Policy, PolicyFacts, Prompt, Response, ResponseError, Tokens
from gvpo_core.training.policy.ranks import attempt
from gvpo_core.training.rollout import Rollout
from gvpo_core.training.samplers import SamplerError


class Scorer(Protocol):
    """A model that encodes text and scores tokens: a policy that is not trained, or a server."""

    def encode(self, prompt: Prompt) -> Tokens:
        """See `Policy.encode`."""

    def encode_responses(
        self, prompt: Prompt, responses: Sequence[str], finished: Sequence[bool | None]
    ) -> list[Response]:
        """See `Policy.encode_responses`."""

    def logprobs(self, batch: Batch) -> np.ndarray:
        """(N,) float64 sums of log-probabilities at temperature 1, nats; NaN if a score is missing."""


class Teacher:
    """Scores responses and is never trained."""

    def __init__(self, scorer: Scorer, description: str, context: int | None, facts: PolicyFacts | None = None) -> None:
        """
        Args:
          description: for the header.
          context: most tokens of prompt and response together. None: not known.
          facts: facts of a model that this process has loaded, for the memory estimate.
        """
        self.scorer, self._description, self.context, self.facts = scorer, description, context, facts

    def describe(self) -> str:
        """Describes the teacher for the header."""
        return self._description

    def check(self, prompts: Prompts) -> None:
        """Raises ConfigError if the teacher cannot encode the first prompt: for example, it has no chat template."""
        self.scorer.encode(prompts.prompts[0])

    def taught(self, policy: Policy, rollout: Rollout) -> Rollout:
        """Returns the rollout with the teacher's log-probabilities as those of the reference. Every rank calls this.

        A response leaves its group if the teacher cannot encode it, if it is longer than the teacher's context, or if
        its score is missing.

        Args:
          policy: the student; the rollout has its tokens.
        Raises: ConfigError: responses have tokens that are not the policy's own. SamplerError: a server returns no
          score at all.
        """
        batch = rollout.batch
        if batch.masks is not None or batch.later is not None:
            raise ConfigError(
                "the responses have tokens of tools or users between the policy's own, which a teacher with another"
                " tokenizer cannot score: leave objective.reference = 'teacher' out"
            )
        finished = rollout.finished[rollout.start : rollout.start + len(batch)]
        stopped = np.zeros(len(batch), bool)
        if rollout.stopped is not None:
            stopped = rollout.stopped[rollout.start : rollout.start + len(batch)]
        scored = np.full(len(batch), np.nan)
        encoded: list[tuple[int, tuple[int, ...], tuple[int, ...], int]] = []
        for row, (tokens, group) in enumerate(zip(batch.responses, batch.groups, strict=True)):
            ended = bool(finished[row]) and not stopped[row]
            ids = self._read(rollout.prompts[group], policy.decode(tokens), ended)
            if ids is not None:
                encoded.append((row, *ids, group))
        rows = [row for row, *_ in encoded]
        as_taught = Batch([p for _, p, _, _ in encoded], [r for _, _, r, _ in encoded], [g for *_, g in encoded])
        scores = attempt(policy, lambda: np.asarray(self.scorer.logprobs(as_taught), np.float64), kind=SamplerError)
        assert scores is not None  # every rank scores
        scored[rows] = scores
        read = np.zeros(len(batch), bool)
        read[rows] = True
        reference, read = policy.gather(scored), policy.gather(read)
        missing = np.isnan(reference)
        details = rollout.details | {"teacher/unread": int((~read).sum()), "teacher/lost": int((missing & read).sum())}
        left_out = missing if rollout.left_out is None else missing | rollout.left_out
        left = left_out if left_out.any() else None
        return replace(rollout, ref_logprobs=reference, left_out=left, details=details, taught=True)

    def _read(self, prompt: Prompt, text: str, finished: bool) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Encodes prompt and response with the teacher's tokenizer; None if they cannot be encoded or are too long."""
        try:
            prompt_ids = tuple(self.scorer.encode(prompt))
            response = self.scorer.encode_responses(prompt, [text], [finished])[0]
        except ResponseError:
            return None
        fits = not self.context or len(prompt_ids) + len(response.tokens) <= self.context
        return (prompt_ids, response.tokens) if fits else None

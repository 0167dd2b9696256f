"""A teacher in the place of pi_ref: distillation at the level of sequences (GVPO++, arXiv 2609.21432).

The teacher scores the text of a response with its own tokenizer, so that it need not share the student's. With rewards
0 the unique minimum of the loss is the teacher, whoever draws the responses; with rewards it is pi_T exp(R / beta) / Z.
"""

from dataclasses import replace

import numpy as np

from gvpo_core.training.config import Config, ConfigError
from gvpo_core.training.data import Prompts
from gvpo_core.training.policy import Batch, Policy, Prompt, Response, ResponseError
from gvpo_core.training.policy.load import load_policy
from gvpo_core.training.rollout import Rollout


class Teacher:
    """A policy that scores responses and is never trained."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def said(self) -> str:
        """What it is, for the header."""
        facts, model = self.policy.describe(), self.policy.settings.model
        return f"{model.path if model else 'given in Python'}, {facts.parameters:,} parameters, {facts.dtype}"

    def check(self, prompts: Prompts) -> None:
        """Raises ConfigError: the teacher cannot read the first prompt, as where it has no chat template for a chat."""
        self.policy.encode(prompts.prompts[0])

    def taught(self, policy: Policy, rollout: Rollout) -> Rollout:
        """The rollout with the teacher's log-probabilities as those of the reference; every rank calls.

        A response that the teacher cannot read, or that is longer than its context, leaves its group.

        Args:
          policy: the student, whose tokens the rollout has.
        Raises: ConfigError: responses with tokens that are not the policy's own.
        """
        batch = rollout.batch
        if batch.own is not None:
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
            read = self._read(rollout.prompts[group], policy.decode(tokens), ended)
            if read is not None:
                encoded.append((row, *read, group))
        rows = [row for row, *_ in encoded]
        own = Batch([p for _, p, _, _ in encoded], [r for _, _, r, _ in encoded], [g for *_, g in encoded])
        scored[rows] = np.asarray(self.policy.logprobs(own), np.float64)
        reference = policy.gather(scored)
        unread = np.isnan(reference)
        details = rollout.details | {"teacher/unread": int(unread.sum())}
        left_out = unread if rollout.left_out is None else unread | rollout.left_out
        left = left_out if left_out.any() else None
        return replace(rollout, ref_logprobs=reference, left_out=left, details=details, taught=True)

    def _read(self, prompt: Prompt, text: str, finished: bool) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Prompt and response as the teacher's tokens; None: it cannot read them."""
        context = self.policy.describe().context
        try:
            asked = tuple(self.policy.encode(prompt))
            response: Response = self.policy.encode_responses(prompt, [text], [finished])[0]
        except ResponseError:
            return None
        return None if context and len(asked) + len(response.tokens) > context else (asked, response.tokens)


def load_teacher(config: Config, policy: Policy) -> Teacher:
    """The model of [teacher], by its backend or the student's.

    Raises: ConfigError: a model that cannot be used; a teacher whose ranks are not the student's.
    """
    given, backend = config.teacher, config.teacher.backend
    if backend == "auto":
        backend = policy.describe().backend  # type: ignore[assignment]
    model = replace(
        config.model,
        path=given.path,
        revision=given.revision,
        dtype=given.dtype,
        device=given.device or config.model.device,
        lora_rank=0,
        gradient_checkpointing=False,
        template=given.template,
    )
    run, objective = replace(config.run, backend=backend), replace(config.objective, reference="rollout")
    try:
        loaded = load_policy(replace(config, run=run, model=model, objective=objective))
    except ConfigError as error:
        raise ConfigError(f"teacher.path = {given.path!r}: {error}") from error
    if (loaded.rank, loaded.world_size) != (policy.rank, policy.world_size):
        raise ConfigError(
            f"the teacher has {loaded.world_size} ranks and the policy {policy.world_size}; use one backend for both"
        )
    if not hasattr(loaded, "encode_responses"):
        raise ConfigError(f"teacher.backend = {backend!r} has no encode_responses, which scoring texts needs")
    return Teacher(loaded)

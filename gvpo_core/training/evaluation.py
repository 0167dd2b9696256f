"""Held-out evaluation: rewards of fresh responses to prompts that are not trained on, and the loss of recorded ones."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from gvpo_core.training.config import Config, ConfigError
from gvpo_core.training.data import Prompts, Row
from gvpo_core.training.inputs import HeldOut, open_inputs
from gvpo_core.training.metrics import evaluation_metrics, teacher_metrics
from gvpo_core.training.policy import Policy
from gvpo_core.training.recorded import Groups, ReferenceScores
from gvpo_core.training.recorded.loss import loss_metrics
from gvpo_core.training.rewards import Reward, RewardFunction
from gvpo_core.training.rollout import Rollout, collect
from gvpo_core.training.samplers import Sampler
from gvpo_core.training.samplers.load import opened_for_evaluation
from gvpo_core.training.samplers.protocol import refresh
from gvpo_core.training.sampling import EVALUATE, Sampling
from gvpo_core.training.sources import recorded_rollout
from gvpo_core.training.teacher import Teacher


def evaluate(
    config: Config,
    policy: Policy,
    *,
    evaluation_rows: Iterable[Row] | None = None,
    rewards: Mapping[str, RewardFunction] | None = None,
) -> dict[str, float]:
    """Evaluates a policy on the held-out rows.

    Args:
      evaluation_rows: held-out rows, instead of data.evaluation.
      rewards: functions by name, added to the configured ones or used instead of their import paths.
    Returns: metrics by their names in metrics.jsonl, such as `eval/reward`.
    Raises: ConfigError, DataError, RewardError: settings, rows or rewards that cannot be used.
    """
    with open_inputs(config, evaluation_rows=evaluation_rows, rewards=rewards, training=False) as inputs:
        held_out = inputs.held_out(policy)
        if held_out is None:
            raise ConfigError("data.evaluation is empty: name a file of held-out prompts, or give evaluation_rows")
        with opened_for_evaluation(inputs.config, policy) as sampler:
            return evaluated(inputs.config, policy, held_out, inputs.rewards, sampler=sampler)[0]


def evaluation_steps(config: Config) -> list[int]:
    """Returns the steps that an evaluation follows: step 0, the last, and every n-th with evaluation.every = n."""
    every, last = config.evaluation.every, config.run.steps
    return sorted({*range(0, last, every or last), last})


def evaluated(
    config: Config,
    policy: Policy,
    held_out: HeldOut,
    rewards: Sequence[Reward],
    *,
    sampler: Sampler | None = None,
    version: int = 0,
) -> tuple[dict[str, float], Rollout | None]:
    """Returns the metrics of the held-out data, and the fresh responses behind them.

    Prompts are answered and scored. Recorded groups give the loss. The data and the settings may have both.

    Args:
      sampler: the sampler of the rollouts; it answers the prompts if evaluation.sampler is 'rollout'.
      version: steps that the policy has taken.
    """
    answering = sampler if config.evaluation.sampler == "rollout" else None
    refresh(answering, policy, version)
    clock, metrics, rollout = time.perf_counter(), {}, None
    if held_out.groups is not None:
        metrics = _losses(config, policy, held_out.groups, held_out.reference, held_out.teacher)
    if held_out.prompts is not None:
        rollout = _answers(config, policy, held_out.prompts, rewards, answering)
        metrics |= evaluation_metrics(
            rollout.rewards,
            [int(g) for g in rollout.group_ids],
            rollout.lengths,
            rollout.finished,
            seconds=time.perf_counter() - clock,
            reward_parts=rollout.parts,
            rewarded=config.scores_responses,
            episodes=rollout.episodes,
        )
        if held_out.teacher is not None and config.evaluation.temperature == 1:
            metrics |= _teacher_kl(policy, held_out.teacher.taught(policy, rollout))
        if answering is not None:
            metrics["eval/lost"] = rollout.details["responses/lost"]
    return metrics | {"seconds/evaluate": time.perf_counter() - clock}, rollout


def _answers(
    config: Config, policy: Policy, prompts: Prompts, rewards: Sequence[Reward], sampler: Sampler | None
) -> Rollout:
    return collect(
        policy,
        prompts,
        range(len(prompts)),
        config.evaluation.responses,
        Sampling(config.rollout.max_tokens, config.evaluation.temperature, stop=config.rollout.stop),
        rewards,
        (config.run.seed, EVALUATE),  # the same random numbers each time, for a paired comparison
        sampler=sampler,
    )


def _teacher_kl(policy: Policy, rollout: Rollout) -> dict[str, float]:
    """Returns KL(pi || pi_T) per response, estimated from responses that the policy drew at temperature 1."""
    assert rollout.ref_logprobs is not None  # the teacher's
    logprobs = policy.gather(np.asarray(policy.logprobs(rollout.batch), np.float64))
    return teacher_metrics(logprobs - rollout.ref_logprobs, [int(g) for g in rollout.group_ids])


def _losses(
    config: Config, policy: Policy, groups: Groups, reference: ReferenceScores | None, teacher: Teacher | None
) -> dict[str, float]:
    rollout = recorded_rollout(policy, groups, range(len(groups)), reference, keep=False)
    if teacher is not None:
        rollout = teacher.taught(policy, rollout)
        rollout = replace(rollout, rewards=rollout.trained_rewards)  # without responses that it cannot score
    local_rows = slice(rollout.start, rollout.start + len(rollout.batch))
    scored = np.flatnonzero(~np.isnan(rollout.rewards[local_rows]))
    batch = rollout.batch.take([int(i) for i in scored])

    def scores(*, of_reference: bool) -> np.ndarray:
        scores_of_rows = np.full(len(rollout.rewards), np.nan)
        local = policy.logprobs(batch, reference=True) if of_reference else policy.logprobs(batch)
        scores_of_rows[~np.isnan(rollout.rewards)] = policy.gather(np.asarray(local, np.float64))
        return scores_of_rows

    logprobs = scores(of_reference=False)
    if config.objective.reference_every:
        rollout = replace(rollout, ref_logprobs=scores(of_reference=True))
    return loss_metrics(rollout, logprobs, config.objective)

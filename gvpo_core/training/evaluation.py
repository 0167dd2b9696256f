"""Held-out evaluation: the rewards of fresh responses to prompts that are not trained on."""

import time
from collections.abc import Iterable, Mapping, Sequence

from gvpo_core.training.config import Config, ConfigError
from gvpo_core.training.data import Prompts, Row
from gvpo_core.training.inputs import open_inputs
from gvpo_core.training.metrics import evaluation_metrics
from gvpo_core.training.policy import Policy
from gvpo_core.training.rewards import Reward, RewardFunction
from gvpo_core.training.rollout import Rollout, collect
from gvpo_core.training.sampling import EVALUATE, Sampling


def evaluate(
    config: Config,
    policy: Policy,
    *,
    evaluation_rows: Iterable[Row] | None = None,
    rewards: Mapping[str, RewardFunction] | None = None,
) -> dict[str, float]:
    """The metrics of one evaluation, by the names of metrics.jsonl. Args and Raises: as loop.train."""
    with open_inputs(config, evaluation_rows=evaluation_rows, rewards=rewards, training=False) as inputs:
        prompts = inputs.held_out(policy)
        if prompts is None:
            raise ConfigError("data.evaluation is empty: name a file of held-out prompts, or give evaluation_rows")
        return evaluated(inputs.config, policy, prompts, inputs.rewards)[0]


def evaluation_steps(config: Config) -> list[int]:
    """The steps after which the held-out prompts are answered: both ends and, where asked, every n-th."""
    every, last = config.evaluation.every, config.run.steps
    return sorted({*range(0, last, every or last), last})


def evaluated(
    config: Config, policy: Policy, prompts: Prompts, rewards: Sequence[Reward]
) -> tuple[dict[str, float], Rollout]:
    """Samples and scores all of `prompts`: the metrics, and the responses behind them."""
    clock = time.perf_counter()
    rollout = collect(
        policy,
        prompts,
        range(len(prompts)),
        config.evaluation.responses,
        Sampling(config.rollout.max_tokens, config.evaluation.temperature),
        rewards,
        (config.run.seed, EVALUATE),  # the same numbers each time: a paired comparison
    )
    metrics = evaluation_metrics(
        rollout.rewards,
        [int(g) for g in rollout.group_ids],
        rollout.lengths,
        rollout.finished,
        seconds=time.perf_counter() - clock,
        reward_parts=rollout.parts,
    )
    return metrics, rollout

"""Held-out evaluation: the rewards of fresh responses to prompts that are not trained on."""

import time
from collections.abc import Iterable, Mapping, Sequence

from gvpo_core.training.config import Config
from gvpo_core.training.config.check import check_config
from gvpo_core.training.data import Prompts, Row, held_out, held_out_rows, load_rows, with_given
from gvpo_core.training.metrics import evaluation_metrics
from gvpo_core.training.policy import Policy
from gvpo_core.training.rewards import Reward, RewardFunction, close_rewards, load_rewards
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
    config = with_given(config, evaluation_rows, rewards)
    check_config(config)
    rows = held_out_rows(config, evaluation_rows) or load_rows(config.data.evaluation, "data.evaluation")
    prompts = held_out(config, policy, rows)
    loaded = load_rewards(config.rewards, rewards)
    try:
        return evaluated(config, policy, prompts, loaded)[0]
    finally:
        close_rewards(loaded)


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

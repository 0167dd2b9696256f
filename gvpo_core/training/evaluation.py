"""Held-out evaluation: the rewards of fresh responses to prompts that are not trained on."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from gvpo_core.training.config import Config, RewardConfig
from gvpo_core.training.config_check import check_config
from gvpo_core.training.data import Prompts, Row, encode_prompts, load_rows
from gvpo_core.training.metrics import evaluation_metrics
from gvpo_core.training.policy import Policy
from gvpo_core.training.rewards import Reward, RewardFunction, close_rewards, load_rewards
from gvpo_core.training.rollout import Rollout, collect
from gvpo_core.training.sampling import Sampling

TRAIN, EVALUATE, ORDER = 0, 1, 2  # second keys of the seeds, so that no two uses share a stream
_GIVEN = "given in Python"


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


def training_rows(config: Config, given: Iterable[Row] | None) -> list[Row]:
    """The rows handed over as `train_rows`, else those of the configured file. Raises: DataError: there are none."""
    if given is None:
        return load_rows(config.data.train, "data.train")
    return load_rows(given, "train_rows")


def held_out_rows(config: Config, given: Iterable[Row] | None) -> list[Row]:
    """All rows handed over as `evaluation_rows`, else those of the configured file; none where there is neither.

    Raises: DataError: one of them is named and has no rows.
    """
    if given is None:
        return load_rows(config.data.evaluation, "data.evaluation") if config.data.evaluation else []
    return load_rows(given, "evaluation_rows")


def held_out(config: Config, policy: Policy, rows: Sequence[Row]) -> Prompts:
    """The held-out prompts that an evaluation uses of these rows, encoded."""
    chosen, limit = rows[: config.evaluation.prompts or None], config.rollout.max_tokens
    return encode_prompts(policy, chosen, config.data, "data.evaluation", max_tokens=limit)


def with_given(config: Config, rows: Iterable[Row] | None, rewards: Mapping[str, RewardFunction] | None) -> Config:
    """Says in the settings, which the run folder keeps, what was handed over as Python objects."""
    if rows is not None and not config.data.train:
        config = replace(config, data=replace(config.data, train=_GIVEN))
    named = {name: RewardConfig(function=_GIVEN) for name in rewards or {}}
    return replace(config, rewards=named | config.rewards)

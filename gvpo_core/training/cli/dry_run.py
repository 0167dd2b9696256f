"""`gvpo train --dry-run`: does all that a run does before its first update, for two prompts, and writes no file."""

import time
from collections.abc import Iterable, Mapping

from gvpo_core.training.config import Config
from gvpo_core.training.data import Row
from gvpo_core.training.inputs import Inputs, open_inputs
from gvpo_core.training.policy import Policy
from gvpo_core.training.rewards import RewardFunction
from gvpo_core.training.rollout import Rollout
from gvpo_core.training.samplers import Sampler
from gvpo_core.training.samplers.load import opened_sampler
from gvpo_core.training.terminal.text import duration
from gvpo_core.training.watch.console import Console
from gvpo_core.training.watch.header import header

_PROMPTS = 2


def preview(
    config: Config,
    policy: Policy,
    *,
    train_rows: Iterable[Row] | None = None,
    evaluation_rows: Iterable[Row] | None = None,
    rewards: Mapping[str, RewardFunction] | None = None,
    console: Console | None = None,
) -> Rollout:
    """Samples and scores the first two groups of the run's first step, and prints what to expect of the run.

    No parameter changes, and no file is written.

    Args:
      train_rows: rows to train on, instead of data.train.
      evaluation_rows: held-out rows, instead of data.evaluation.
      rewards: functions by name, added to the configured ones or used instead of their import paths.
      console: shows the facts. Default: standard output.
    Returns: the responses to the two prompts with their rewards.
    Raises: ConfigError, DataError, RewardError: settings, rows or rewards that cannot be used.
    """
    with open_inputs(config, train_rows=train_rows, evaluation_rows=evaluation_rows, rewards=rewards) as inputs:
        return preview_inputs(inputs, policy, console=console)


def preview_inputs(
    inputs: Inputs, policy: Policy, *, console: Console | None = None, command: str = "gvpo train CONFIG"
) -> Rollout:
    """Does the same as `preview`, with inputs that are already open.

    Args:
      command: the command that starts the run, for the last line.
    """
    config = inputs.config
    with opened_sampler(config, policy) as sampler:
        return _preview(inputs, policy, sampler, console, command)


def _preview(inputs: Inputs, policy: Policy, sampler: Sampler | None, console: Console | None, command: str) -> Rollout:
    config = inputs.config
    source, held_out = inputs.source(policy, sampler, cached=False, trained=False), inputs.held_out(policy)
    if policy.rank == 0:
        console = console or Console(config.run.steps)
        console.header(header(config, policy.describe(), source, held_out, inputs.rewards))
        console.phase("generate")
    rollout = source.groups(policy, 1, size=min(_PROMPTS, config.rollout.prompts))
    clock = time.perf_counter()
    policy.logprobs(rollout.batch)
    score_seconds = time.perf_counter() - clock
    if policy.rank == 0 and console is not None:
        for group in range(rollout.num_groups):
            console.sample([c for c in rollout.completions if c["group"] == group])
        facts = _expected(config, len(source.prompts), rollout, score_seconds)
        console.close(facts | {"nothing was written": f"run it: {command}; run folder {config.run.folder}"})
    return rollout


def _expected(config: Config, prompts: int, rollout: Rollout, score_seconds: float) -> dict[str, str]:
    """Estimates the time of the whole run from the two prompts.

    Args:
      score_seconds: time of one forward pass over them. An update takes about three such passes, the reference one.
    """
    steps, a_step = config.run.steps, config.rollout.prompts
    share = a_step / rollout.num_groups
    sampling = rollout.seconds.get("generate", 0.0) * share
    scoring = rollout.seconds.get("reward", 0.0) * share
    passed = f"{steps:,} of {a_step} prompts: {steps * a_step / prompts:.3g} passes over {prompts:,} prompts"
    facts = {"steps": passed}
    if rollout.drawn.any():
        facts = {
            "steps": f"{passed}, {steps * a_step * config.rollout.responses:,} responses",
            "sampling": f"at most {duration(sampling)} a step, {duration(steps * sampling)} in all, at this pace",
            "rewards": f"at most {duration(scoring)} a step, {duration(steps * scoring)} in all",
        }
    passes = 3 * config.objective.epochs + (config.objective.reference == "initial")
    updating = passes * score_seconds * share
    step = sampling + scoring + updating
    facts["updates"] = f"about {duration(updating)} a step: the time of {passes} forward passes"
    facts["together"] = f"about {duration(step)} a step, {duration(steps * step)} in all, without evaluations"
    return facts

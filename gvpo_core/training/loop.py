"""The training loop, written once for every backend.

    for each step: groups of scored responses from a source -> updates along the objective's weights -> a record
                   evaluate and save when due

It does not depart from the paper: the objective is `gvpo_core.objective`, and a step sums over groups as in Eq. 16. All
randomness is a function of (seed, step, prompt, response), so a resumed run repeats an uninterrupted one.
"""

from collections.abc import Iterable, Mapping

from gvpo_core.training.config import Config
from gvpo_core.training.data import Row
from gvpo_core.training.evaluation import evaluated, evaluation_steps
from gvpo_core.training.improve import improve, renew_reference, with_signal
from gvpo_core.training.inputs import Inputs, open_inputs
from gvpo_core.training.policy import Policy
from gvpo_core.training.policy.load import check_policy
from gvpo_core.training.policy.ranks import highest
from gvpo_core.training.report.result import Result
from gvpo_core.training.rewards import RewardFunction
from gvpo_core.training.run.journal import Journal
from gvpo_core.training.run.leaving import leaving
from gvpo_core.training.run.signals import StopRequest
from gvpo_core.training.samplers import Sampler
from gvpo_core.training.samplers.load import opened_sampler
from gvpo_core.training.samplers.protocol import closing
from gvpo_core.training.sampling import ORDER
from gvpo_core.training.terminal.output import forgiving_stderr
from gvpo_core.training.watch.console import Console


def train(
    config: Config,
    policy: Policy,
    *,
    train_rows: Iterable[Row] | None = None,
    evaluation_rows: Iterable[Row] | None = None,
    rewards: Mapping[str, RewardFunction] | None = None,
    sampler: Sampler | None = None,
    console: Console | None = None,
    from_step: int | None = None,
) -> Result:
    """Runs or resumes the run in `config.run.folder`.

    Args:
      policy: from `load_policy`; on several ranks, one for each rank.
      train_rows: rows to train on, instead of data.train.
      evaluation_rows: held-out rows, instead of data.evaluation.
      rewards: functions by name, added to the configured ones or used instead of their import paths.
      sampler: draws the responses instead of the policy (an older copy, a teacher, an engine); closed at the end.
      console: shows the progress. Default: on standard output.
      from_step: go back to the checkpoint of this step and delete everything later; 0: the beginning.
    Returns: how the run ended.
    Raises: ConfigError, DataError, RewardError, NoSignalError, CheckpointError, RunFolderError, SamplerError.
    """
    with closing(sampler), forgiving_stderr():
        opened_inputs = open_inputs(config, train_rows=train_rows, evaluation_rows=evaluation_rows, rewards=rewards)
        with opened_inputs as inputs:
            return run(inputs, policy, sampler=sampler, console=console, from_step=from_step)


def run(
    inputs: Inputs,
    policy: Policy,
    *,
    sampler: Sampler | None = None,
    console: Console | None = None,
    from_step: int | None = None,
) -> Result:
    """Runs `train` on opened inputs."""
    check_policy(policy, inputs.config)
    with opened_sampler(inputs.config, policy, sampler) as opened:
        return _run(inputs, policy, opened, console, from_step)


def _run(
    inputs: Inputs, policy: Policy, sampler: Sampler | None, console: Console | None, from_step: int | None
) -> Result:
    config, last = inputs.config, inputs.config.run.steps
    source, held_out = inputs.source(policy, sampler), inputs.held_out(policy, folder=config.run.folder)
    evaluations = evaluation_steps(config) if held_out else []

    def evaluate() -> None:
        if held_out and step in evaluations:
            journal.phase("evaluate")
            with journal.keeping(step), leaving(policy, stop):
                journal.evaluation(*evaluated(config, policy, held_out, inputs.rewards, sampler=sampler, version=step))

    with StopRequest() as stop, Journal(inputs, policy, evaluations, console) as journal:
        inputs.heed(sampler, lambda: bool(stop.signal))
        step = journal.start(source, held_out, from_step)
        if highest(policy, not journal.evaluated(step)):  # also if the evaluation after the last step failed
            evaluate()
        stopping, early = highest(policy, stop.signal), journal.out_of_patience()
        while step < last and not stopping and not early:
            step += 1
            journal.begin(step)
            rollout = None
            with journal.keeping(step - 1), leaving(policy, stop):
                rollout = with_signal(source.groups(policy, step), config.objective)
            if rollout is None:  # a stop was requested while the server was away or rewards failed
                step, stopping = step - 1, highest(policy, stop.signal)
                journal.not_taken(step)
                break
            journal.settle()
            journal.phase("update")
            renew_reference(policy, config.objective, step)
            improvement = improve(policy, rollout, config.objective, seed=(config.run.seed, ORDER, step))
            rollout.check_gaps(improvement.logprobs, moved=config.objective.minibatches > 1)
            journal.step(rollout, improvement)
            evaluate()
            stopping, early = highest(policy, stop.signal), journal.out_of_patience()
            if stopping or early or journal.save_due():
                journal.save()
        journal.settle()
        journal.ended(stopping, early)
        return Result(step, journal.folder.path, 128 + stopping if stopping else 0)

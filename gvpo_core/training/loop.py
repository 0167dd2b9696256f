"""The training loop, written once for every backend.

    for each step: sample k responses a prompt -> rewards -> update(s) along the objective's weights -> metrics
                   evaluate and checkpoint where due

All randomness is a function of (seed, step, prompt, response), so a resumed run repeats an unbroken one.
"""

import json
import logging
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_core import __version__
from gvpo_core.training.config import Config
from gvpo_core.training.config.check import check_config
from gvpo_core.training.config.file import as_table
from gvpo_core.training.config.secrets import hide, hide_command, hide_settings, secrets_of
from gvpo_core.training.data import Prompts, Row, encode_prompts, held_out, held_out_rows, training_rows, with_given
from gvpo_core.training.evaluation import evaluated
from gvpo_core.training.improve import improve
from gvpo_core.training.metrics import StepFacts, read_records, step_metrics
from gvpo_core.training.policy import Policy
from gvpo_core.training.policy.ranks import agree
from gvpo_core.training.rewards import Reward, RewardFunction, close_rewards, load_rewards
from gvpo_core.training.rollout import collect
from gvpo_core.training.run.checkpoint import (
    CheckpointError,
    begin_checkpoint,
    checkpoint_at,
    commit_checkpoint,
    newest_checkpoint,
    partial_checkpoint,
    save_failed,
)
from gvpo_core.training.run.fingerprint import fingerprint
from gvpo_core.training.run.folder import RunFolder
from gvpo_core.training.run.resume import resume_command
from gvpo_core.training.run.signals import StopRequest
from gvpo_core.training.sampling import ORDER, TRAIN
from gvpo_core.training.watch.alerts import Alerts, failed
from gvpo_core.training.watch.console import Console
from gvpo_core.training.watch.header import header
from gvpo_core.training.watch.trackers import Tracker, open_trackers

_log = logging.getLogger("gvpo")


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int  # steps done
    folder: Path
    exit_status: int  # 0: all steps done; 130, 143: stopped by a signal, state saved


def train(
    config: Config,
    policy: Policy,
    *,
    train_rows: Iterable[Row] | None = None,
    evaluation_rows: Iterable[Row] | None = None,
    rewards: Mapping[str, RewardFunction] | None = None,
    sampler: Policy | None = None,
    console: Console | None = None,
) -> Result:
    """Runs or resumes the run in `config.run.folder`.

    Args:
      policy: what a backend's `load` gave; on several ranks, each rank's own.
      train_rows, evaluation_rows: rows in the place of the configured files.
      rewards: functions by name, beside the configured ones or in the place of their import paths.
      sampler: draws the training responses in the policy's stead (an older copy, a teacher: Cor. 3.2).
    Raises: ConfigError, DataError, RewardError, NoSignalError, CheckpointError, RunFolderError: what is wrong.
    """
    config = with_given(config, train_rows, rewards)
    check_config(config)
    rows, unseen_rows = training_rows(config, train_rows), held_out_rows(config, evaluation_rows)
    prompts = encode_prompts(policy, rows, config.data, max_tokens=config.rollout.max_tokens)
    unseen = held_out(config, policy, unseen_rows) if unseen_rows else None
    data = {"train": fingerprint(rows)} | ({"evaluation": fingerprint(unseen_rows)} if unseen_rows else {})
    folder = RunFolder(Path(config.run.folder))
    loaded: list[Reward] = []
    try:
        error = None
        try:
            if policy.rank == 0:
                folder.open(config, data)
        except (OSError, ValueError, RuntimeError) as e:
            error = e
        agree(policy, error)
        loaded = load_rewards(config.rewards, rewards)
        return _Run(config, policy, prompts, unseen, loaded, sampler, folder, console, data).go()
    finally:
        close_rewards(loaded)
        folder.close()


class _Run:
    """One process's part in a run."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        prompts: Prompts,
        held_out: Prompts | None,
        rewards: Sequence[Reward],
        sampler: Policy | None,
        folder: RunFolder,
        console: Console | None,
        data: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.config, self.policy, self.sampler, self.folder = config, policy, sampler, folder
        self.prompts, self.held_out, self.rewards = prompts, held_out, rewards
        self.main = policy.rank == 0
        self.console, self.data = console, data
        self.tracker: Tracker | None = None
        self.reward_range: tuple[float, float] | None = None
        self.alerts = Alerts()
        self.shown: list[dict[str, Any]] = []  # the step's responses, where they are due on the console

    def go(self) -> Result:
        config, last = self.config, self.config.run.steps
        start, evaluations = self._resume(), self._evaluations()
        self._open(start)
        step = start
        with StopRequest() as stop:
            try:
                if start == 0 and 0 in evaluations:
                    self._evaluate(0)
                if stopping := self._anyone(stop.signal):
                    done = "before the first step, nothing to save" if start == 0 else f"after step {start}"
                    return self._stopped(start, stopping, done)
                while step < last:
                    step += 1
                    self._record("train", step, self._step(step))
                    if self.console and self.shown:
                        self.console.sample(self.shown)
                    if step in evaluations:
                        self._evaluate(step)
                    stopping = self._anyone(stop.signal)
                    every = config.run.checkpoint_every
                    if step == last or stopping or (every and step % every == 0):
                        self._save(step)
                    if stopping:
                        return self._stopped(step, stopping, f"after step {step}")
                return Result(last, self.folder.path, 0)
            except Exception as e:
                self._failed(step, e)
                raise
            finally:
                self._close()

    def _resume(self) -> int:
        """Restores the newest good checkpoint and drops the records of later steps. Returns the steps done."""
        found = np.asarray([-1])
        error = None
        try:
            if self.main:
                checkpoint = newest_checkpoint(self.folder.checkpoints)
                found = np.asarray([checkpoint.step if checkpoint else -1])
                self.folder.cut(checkpoint.step if checkpoint else None)
        except (OSError, RuntimeError) as e:
            error = e
        agree(self.policy, error)
        step = int(self.policy.gather(found).max())
        if step < 0:
            return 0
        self.policy.restore(checkpoint_at(self.folder.checkpoints, step).policy)
        self.reward_range = _reward_range(self.folder.metrics)
        if self.main:
            self.alerts = Alerts.replay(read_records(self.folder.metrics))
        return step

    def _open(self, start: int) -> None:
        config, facts = self.config, dict(self.policy.describe())
        if not self.main:
            return
        self.folder.write_environment(
            {
                "gvpo": __version__,
                "python": platform.python_version(),
                "platform": platform.platform(),
                "ranks": self.policy.world_size,
                "command": hide_command(sys.argv, secrets_of(as_table(config))),
                "data": self.data,
                "policy": facts,
            }
        )
        self.tracker = open_trackers(
            config.run.trackers, self.folder.path, hide_settings(as_table(config)), warn=_log.warning
        )
        self.console = self.console or Console(config.run.steps, first_step=start, evaluations=self._evaluations())
        self.console.header(header(config, facts, self.prompts, self.held_out, self.rewards))
        if start:
            self._event(start, "resume", f"resumed after step {start} of {config.run.steps}")

    def _stopped(self, step: int, number: int, done: str) -> Result:
        command = resume_command(self.policy.world_size, secrets_of(as_table(self.config)))
        self._event(step, "stop", f"stopped by signal {number} {done}; go on with: {command}")
        return Result(step, self.folder.path, 128 + number)

    def _evaluations(self) -> list[int]:
        """The steps after which the held-out prompts are answered: none, every n-th, and both ends."""
        every, last = self.config.evaluation.every, self.config.run.steps
        return sorted({*range(0, last, every or last), last}) if self.held_out else []

    def _failed(self, step: int, error: Exception) -> None:
        """Leaves a BAD event of the error that ends the run, for who reads the folder and not the log."""
        alert = failed(step, error)
        alert = alert._replace(seen=hide(alert.seen, secrets_of(as_table(self.config))))
        try:
            told = {"verdict": alert.level, "alerts": [alert._asdict()]}
            self._event(step, "failed", f"{alert.level}: {alert.seen}; {alert.advice}", **told)
        except Exception as e:  # a full disk, say: the error itself is what is raised
            _log.warning("the error that ended the run stands in no event: %s", e)

    def _step(self, step: int) -> dict[str, float]:
        config, policy, begin = self.config, self.policy, time.perf_counter()
        run, place = config.run, step - 1
        rows = self.prompts.batch(place, config.rollout.prompts, seed=run.seed, shuffle=config.data.shuffle)
        self._phase("generate")
        rollout = collect(
            policy,
            self.prompts,
            rows,
            config.rollout.responses,
            config.rollout.sampling,
            self.rewards,
            (run.seed, TRAIN, step),
            sampler=self.sampler,
        )

        def order(epoch: int) -> np.ndarray:
            if epoch == 0:  # the prompts come in a random order already
                return np.arange(rollout.num_groups)
            key = np.random.SeedSequence((run.seed, ORDER, step, epoch))
            return np.random.default_rng(key).permutation(rollout.num_groups)

        self._phase("update")
        clock = time.perf_counter()
        done = improve(policy, rollout, config.objective, order)
        update_seconds = time.perf_counter() - clock - done.score_seconds
        if self.main:
            self.folder.append(
                self.folder.completions, [{"kind": "train", "step": step} | c for c in rollout.completions]
            )
            self.shown = rollout.completions if run.show_every and step % run.show_every == 0 else []
        facts = StepFacts(
            logprobs=done.logprobs,
            ref_logprobs=done.ref_logprobs,
            rewards=rollout.rewards,
            group_ids=rollout.group_ids,
            num_groups=rollout.num_groups,
            lengths=rollout.lengths,
            finished=rollout.finished,
            beta=config.objective.beta,
            gradient_norms=[u.gradient_norm for u in done.updates],
            learning_rate=done.updates[-1].learning_rate,
            seconds=rollout.seconds
            | {"score": done.score_seconds, "update": update_seconds, "step": time.perf_counter() - begin},
            tokens_sampled=int(rollout.lengths.sum()),
            tokens_computed=int(policy.gather(np.asarray([sum(u.tokens for u in done.updates)])).sum()),
            peak_memory=int(policy.gather(np.asarray([max(u.peak_memory for u in done.updates)])).max()),
            reward_parts=rollout.parts,
            reward_errors=rollout.errors,
            reward_seconds=rollout.reward_seconds,
            policy_details=done.updates[-1].details,
            reward_range=self.reward_range,
        )
        metrics = step_metrics(facts)
        seen = (*(self.reward_range or ()), metrics["reward/min"], metrics["reward/max"])
        self.reward_range = (min(seen), max(seen))
        return metrics

    def _evaluate(self, step: int) -> None:
        assert self.held_out is not None
        self._phase("evaluate")
        metrics, rollout = evaluated(self.config, self.policy, self.held_out, self.rewards)
        if self.main:
            self.folder.append(
                self.folder.completions, [{"kind": "eval", "step": step} | c for c in rollout.completions]
            )
        self._record("eval", step, metrics)

    def _save(self, step: int) -> None:
        """Every rank calls Policy.save; the main rank opens the folder before and commits it after."""
        folder, partial = self.folder.checkpoints, partial_checkpoint(self.folder.checkpoints, step)
        self._phase("checkpoint")
        self._saving(step, lambda: begin_checkpoint(folder, step), main_only=True)
        self._saving(step, lambda: self.policy.save(partial.policy))
        self._saving(step, lambda: commit_checkpoint(folder, step, self.config.run.keep_checkpoints), main_only=True)

    def _saving(self, step: int, work: Callable[[], object], *, main_only: bool = False) -> None:
        error = None
        try:
            if self.main or not main_only:
                work()
        except Exception as e:  # each framework's writer has its own error for a full disk
            error = save_failed(self.folder.checkpoints, step, e)
        agree(self.policy, error, CheckpointError)

    def _record(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        if not self.main:
            return
        record = {"kind": kind, "step": step, "time": time.time()} | dict(metrics)
        if kind == "train":
            record |= self.alerts.annotate(record)
        self.folder.append(self.folder.metrics, [record])
        if self.tracker:
            self.tracker.log(record)
        if self.console:
            (self.console.step if kind == "train" else self.console.evaluation)(record)

    def _event(self, step: int, event: str, message: str, **more: Any) -> None:
        if self.main:
            record = {"kind": "event", "step": step, "time": time.time(), "event": event, "message": message}
            self.folder.append(self.folder.metrics, [record | more])
            if self.console:
                self.console.event(message)

    def _phase(self, name: str) -> None:
        if self.console:
            self.console.phase(name)

    def _anyone(self, value: int) -> int:
        return int(self.policy.gather(np.asarray([value])).max())

    def _close(self) -> None:
        if not self.main:
            return
        if self.tracker:
            self.tracker.close()
        report = None
        try:
            from gvpo_core.training.report import write_report

            report = write_report(self.folder.path)
        except Exception as e:  # a report never costs a run
            _log.warning(
                "the report could not be written: %s: %s", type(e).__name__, e, exc_info=not isinstance(e, OSError)
            )
        if self.console:
            self.console.close({"metrics": self.folder.metrics, "report": report or "not written"})


def _reward_range(metrics: Path) -> tuple[float, float] | None:
    seen: list[float] = []
    if metrics.exists():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["kind"] == "train" and record.get("reward/min") is not None:
                seen += [record["reward/min"], record["reward/max"]]
    return (min(seen), max(seen)) if seen else None

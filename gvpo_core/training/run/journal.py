"""Records a run: its folder, metrics, checkpoints, alerts, trackers and console. The main rank writes them."""

import contextlib
import logging
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from gvpo_core import __version__
from gvpo_core.training.config.file import as_table
from gvpo_core.training.config.secrets import hide, hide_command, hide_settings, secrets_of
from gvpo_core.training.improve import Improvement
from gvpo_core.training.inputs import HeldOut, Inputs
from gvpo_core.training.metrics import step_metrics
from gvpo_core.training.policy import Policy
from gvpo_core.training.policy.ranks import attempt, highest
from gvpo_core.training.rollout import Rollout
from gvpo_core.training.run.best import Best
from gvpo_core.training.run.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoint_at,
    go_back,
    newest_checkpoint,
    read_state,
    steps_saved,
    unreadable,
)
from gvpo_core.training.run.data_columns import with_columns
from gvpo_core.training.run.folder import RunFolder, RunFolderError
from gvpo_core.training.run.leaving import SHARED
from gvpo_core.training.run.resume import resume_command
from gvpo_core.training.run.saving import Saving
from gvpo_core.training.sources import Source
from gvpo_core.training.terminal.text import Command, fit, interval
from gvpo_core.training.watch.alerts import LEVELS, Alerts, failed
from gvpo_core.training.watch.columns import verdict
from gvpo_core.training.watch.console import Console
from gvpo_core.training.watch.header import header
from gvpo_core.training.watch.trackers import Tracker, open_trackers

_log = logging.getLogger("gvpo")


class Journal:
    """Records a run. Every rank has one and must call every method.

    Inside `with`, the folder is locked. An error that ends the block is recorded as the event `failed`.
    """

    def __init__(self, inputs: Inputs, policy: Policy, evaluations: Sequence[int], console: Console | None) -> None:
        """
        Args:
          evaluations: steps after which the run evaluates.
        """
        self.config, self.policy, self.inputs = inputs.config, policy, inputs
        self.folder = RunFolder(Path(self.config.run.folder))
        self.evaluations, self.console = evaluations, console
        self._main = policy.rank == 0
        self._secrets = secrets_of(as_table(self.config))
        self._tracker: Tracker | None = None
        self._alerts = Alerts()
        self._reward_range: tuple[float, float] | None = None  # lowest and highest reward of the steps so far
        self._verdicts: Counter[str] = Counter()
        self._evaluated: list[Mapping[str, Any]] = []  # the first and the last evaluation
        self._started = False
        self._best, self._better = Best(), False  # better: the current step's evaluation is the best so far
        self._fingerprints: dict[str, Mapping[str, Any]] = {}
        self._step, self._step_began = 0, time.perf_counter()
        self._saved = 0  # the step of the newest checkpoint
        self._state: Callable[[], dict[str, Any]] = dict  # returns the state of the source of groups
        self._saving = Saving(policy, self.folder, self.config.run.keep_checkpoints)

    def __enter__(self) -> "Journal":
        try:
            attempt(self.policy, self._take_folder, main_only=True)
        except BaseException:
            self.folder.close()
            raise
        self.inputs.reward_log.open(self.folder.path)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if isinstance(error, Exception):
                self._saving.abandon()
            if self._started and self._main:
                if isinstance(error, Exception):
                    self._failed(error)
                self._finish()
        finally:
            self.folder.close()

    def _take_folder(self) -> None:
        self._fingerprints = self.inputs.fingerprints(self.policy)
        self.folder.open(self.config, self._fingerprints)

    def start(self, source: Source, held_out: HeldOut | None, from_step: int | None = None) -> int:
        """Restores the newest good checkpoint and drops the records of later steps. Returns the steps done.

        Without a checkpoint, a policy that was already trained in another run is reset to its initial state.

        Args:
          from_step: restore the checkpoint of this step instead (0: the initial policy), and drop later checkpoints.
        """
        folder = self.folder.checkpoints
        self._state = source.state
        self._alerts = Alerts(self._price_of_kl(source), self.config.rollout.ahead)
        checkpoint = attempt(self.policy, lambda: self._checkpoint(from_step), main_only=True)
        step = highest(self.policy, checkpoint.step if checkpoint else -1)
        earlier_updates = highest(self.policy, self.policy.steps_taken)
        if step >= 0:
            restore = lambda: self.policy.restore(checkpoint_at(folder, step).policy)
            attempt(self.policy, restore, explain=lambda e: unreadable(folder, e) if isinstance(e, OSError) else e)
            attempt(self.policy, lambda: source.restore(read_state(checkpoint_at(folder, step))), kind=CheckpointError)
        elif earlier_updates:
            self.policy.reset()
        self._step = self._saved = max(step, 0)
        last = attempt(self.policy, lambda: self._drop_later_steps(step, from_step), main_only=True)
        self._best.share(self.policy)
        if self._main:
            self._open(source, held_out)
        self._started = True
        if from_step is not None:
            self.event(
                "back", f"went back from step {last} to step {from_step}: all later records and checkpoints dropped"
            )
        if self._step:
            self.event("resume", f"resumed after step {step} of {self.config.run.steps}")
        elif earlier_updates:
            self.event(
                "reset", f"the policy had taken {earlier_updates} optimizer steps before: reset to its initial state"
            )
        return self._step

    def _price_of_kl(self, source: Source) -> float | None:
        """Returns beta if the metric `kl` estimates the KL to the reference, which costs beta a nat; else None."""
        objective = self.config.objective
        return objective.beta if source.on_policy and objective.length_exponent == 0 else None

    def _checkpoint(self, from_step: int | None) -> Checkpoint | None:
        return None if from_step == 0 else newest_checkpoint(self.folder.checkpoints, from_step)

    def _drop_later_steps(self, step: int, from_step: int | None) -> int:
        """Drops later records and checkpoints; returns the last step that had one."""
        later = [] if from_step is None else go_back(self.folder.checkpoints, from_step)
        last = self.folder.cut(step)
        for record in self.folder.records() if step >= 0 else ():
            if record["kind"] == "train":
                self._alerts.update(record)
            elif record["kind"] == "eval":
                self._best.see(record["step"], record)
            self._remember(record)
        return max(last, *later, 0)

    def _open(self, source: Source, held_out: HeldOut | None) -> None:
        config, facts = self.config, self.policy.describe()
        environment = {
            "gvpo": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "ranks": self.policy.world_size,
            "command": hide_command(sys.argv, self._secrets),
            **self._fingerprints,
            "policy": facts.as_dict(),
        }
        for changed in self.folder.begin(config, environment, self._step):
            _log.warning("changed since the last start: %s", changed)
        settings = hide_settings(as_table(config))
        self._tracker = open_trackers(config.run.trackers, self.folder.path, settings, warn=_log.warning)
        self.console = self.console or Console(config.run.steps, first_step=self._step, evaluations=self.evaluations)
        self.console.header(header(config, facts, source, held_out, self.inputs.rewards))

    def begin(self, step: int) -> None:
        """Marks the start of step `step`, which begins with sampling."""
        self._step, self._step_began, self._better = step, time.perf_counter(), False
        self.phase("generate")

    def not_taken(self, step: int) -> None:
        """Returns from an unfinished step to `step`, and saves `step` if it was not saved."""
        self._step = step
        if step > self._saved:
            self.save()

    @contextlib.contextmanager
    def keeping(self, step: int) -> Iterator[None]:
        """Saves the policy of `step` if an error ends the block.

        With several processes, only for errors that all of them raise.
        """
        try:
            yield
        except Exception as error:
            on_all_ranks = self.policy.world_size == 1 or isinstance(error, SHARED)
            if on_all_ranks and not isinstance(error, RunFolderError | CheckpointError | FloatingPointError):
                unfinished_step = self._step
                try:
                    self.not_taken(step)
                    self.settle()
                except Exception as save_error:  # raise the first error
                    _log.warning("%s", save_error)
                self._step = unfinished_step
            raise

    def evaluated(self, step: int) -> bool:
        """Whether the newest evaluation is that of `step`. Only the main rank knows; the others return True."""
        return not self._main or (bool(self._evaluated) and self._evaluated[-1]["step"] == step)

    def phase(self, name: str) -> None:
        """Shows the current phase of the run on the console."""
        if self.console:
            self.console.phase(name)

    def step(self, rollout: Rollout, improvement: Improvement) -> None:
        """Records a training step: its responses, its metrics and the verdict on them."""
        if not self._main:
            return
        run = self.config.run
        self._responses("train", rollout)
        metrics = step_metrics(
            rollout,
            improvement,
            beta=self.config.objective.beta,
            length_exponent=self.config.objective.length_exponent,
            seconds=time.perf_counter() - self._step_began,
            reward_range=self._reward_range,
        )
        record = self._record("train", metrics)
        record |= self._alerts.annotate(record)
        self._remember(record)
        self._write(record)
        if self.console:
            self.console.step(record)
            if run.show_every and self._step % run.show_every == 0 and rollout.completions:
                self.console.sample(rollout.completions)

    def evaluation(self, metrics: Mapping[str, float], rollout: Rollout | None) -> None:
        """Records an evaluation after the current step."""
        self._better = self._best.see(self._step, metrics)
        if not self._main:
            return
        if rollout is not None:
            self._responses("eval", rollout)
        record = self._record("eval", metrics)
        self._remember(record)
        self._write(record)
        if self.console:
            self.console.evaluation(record)

    def event(self, name: str, message: str, *, command: str = "", **more: Any) -> None:
        """Records something that happened to the run, and the command that resumes it."""
        if self._main:
            text = f"{message}; resume with: {command}" if command else message
            self.folder.append(self.folder.metrics, [self._record("event", {"event": name, "message": text} | more)])
            if self.console:
                self.console.event(message, command)

    def out_of_patience(self) -> bool:
        """Whether the last `evaluation.patience` evaluations were no better than the best one before them."""
        patience = self.config.evaluation.patience
        return bool(patience) and self._best.since >= patience

    def ended(self, signal: int, early: bool) -> None:
        """Records why the run ended before its last step; after a signal, also the command that resumes it.

        Args:
          signal: number of the signal that asked the run to stop; 0: none.
          early: whether the run is out of patience.
        """
        if signal:
            done = f"after step {self._step}" if self._step else "before the first step, nothing to save"
            command = resume_command(self.policy.world_size, self._secrets)
            self.event("stop", f"stopped by signal {signal} {done}", command=command)
        elif early and self._step < self.config.run.steps:
            self.event(
                "early",
                f"stopped early after step {self._step}: {self._best.since} evaluations without {self._best.describe()}"
                f" (evaluation.patience = {self.config.evaluation.patience})",
            )

    def save_due(self) -> bool:
        """Whether the settings ask for a checkpoint of the current step."""
        run = self.config.run
        periodic = run.checkpoint_every and self._step % run.checkpoint_every == 0
        return self._step == run.steps or bool(periodic) or (self._better and run.keep_best)

    def save(self) -> None:
        """Saves a checkpoint of the current step. It is complete only after `settle` returns."""
        self.phase("checkpoint")
        best = (self._best.step,) if self.config.run.keep_best else ()
        self._saving.save(self._step, self._state(), best)
        self._saved = self._step

    def settle(self) -> None:
        """Commits the checkpoint that is being written, if any. The policy must not change before this call."""
        self._saving.settle()

    def _record(self, kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
        return {"kind": kind, "step": self._step, "time": time.time()} | dict(values)

    def _write(self, record: Mapping[str, Any]) -> None:
        self.folder.append(self.folder.metrics, [record])
        if self._tracker:
            self._tracker.log(record)

    def _responses(self, kind: str, rollout: Rollout) -> None:
        completions: Iterable[dict[str, Any]] = rollout.completions
        if rollout.columns:
            reward_columns = {name for reward in self.inputs.rewards for name in reward.call.signature.names}
            completions = with_columns(completions, rollout.columns, self._secrets, reward_columns)
        head = {"kind": kind, "step": self._step}
        self.folder.append(self.folder.completions, [head | completion for completion in completions])

    def _remember(self, record: Mapping[str, Any]) -> None:
        """Keeps the values of a record that later steps and the final summary need."""
        if record.get("kind") == "eval":
            self._evaluated = [*self._evaluated[:1], record]
        if record.get("kind") != "train":
            return
        self._verdicts[verdict(record)] += 1
        if record.get("reward/min") is not None:
            seen = (*(self._reward_range or ()), record["reward/min"], record["reward/max"])
            self._reward_range = (min(seen), max(seen))

    def _failed(self, error: Exception) -> None:
        """Records the error that ends the run as a BAD event, so that it is in the run folder."""
        alert = failed(self._step, error)
        alert = alert._replace(seen=hide(alert.seen, self._secrets))
        try:
            verdict: dict[str, Any] = {"verdict": alert.level, "alerts": [alert._asdict()]}
            self.event("failed", f"{alert.level}: {alert.seen}; {alert.advice}", **verdict)
        except Exception as e:  # for example a full disk; the original error is raised
            _log.warning("the error that ended the run could not be recorded: %s", e)

    def _finish(self) -> None:
        if self._tracker:
            self._tracker.close()
        report = None
        try:
            from gvpo_core.training.report import write_report

            self.folder.confirm()
            report = write_report(self.folder.path)
        except Exception as e:  # a failed report must not end the run with an error
            expected_error = isinstance(e, OSError | RunFolderError)
            _log.warning("the report could not be written: %s: %s", type(e).__name__, e, exc_info=not expected_error)
        if self.console:
            self.console.close(self._summary(report))

    def _summary(self, report: Path | None) -> dict[str, Any]:
        """The results of the run, and the commands to run next."""
        facts: dict[str, Any] = {}
        if self._evaluated:
            if "eval/reward" in self._evaluated[0]:
                facts["held-out reward"] = " -> ".join(
                    interval(record.get("eval/reward"), record.get("eval/half_width")) for record in self._evaluated
                )
            if "eval/loss" in self._evaluated[0]:
                facts["held-out loss"] = " -> ".join(fit(record.get("eval/loss"), 8) for record in self._evaluated)
            if "eval/teacher_kl" in self._evaluated[0]:
                facts["KL to the teacher"] = " -> ".join(
                    interval(record.get("eval/teacher_kl"), record.get("eval/teacher_kl_half_width"))
                    for record in self._evaluated
                )
        if self._verdicts:
            facts["verdicts"] = ", ".join(
                f"{self._verdicts[level]} {level}" for level in LEVELS if self._verdicts[level]
            )
        shown = self.folder.shown
        folder = shlex.quote(str(shown))
        facts |= {"metrics": shown / self.folder.metrics.name}
        facts |= {"report page": shown / report.name if report else "not written"}
        facts |= {"report": Command(f"gvpo report {folder}")}
        with contextlib.suppress(OSError):  # listing the commands must not hide the error that ended the run
            if steps_saved(self.folder.checkpoints):
                facts |= {"evaluate": Command(f"gvpo eval {folder}")}
                facts |= {"export": Command(f"gvpo export {folder} NEW_FOLDER")}
        return facts

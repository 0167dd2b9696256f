"""The inputs of a run: settings, rows and reward functions, opened once for training, evaluation and the dry run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, cast

from gvpo_core.training.config import Config, ConfigError, RewardConfig
from gvpo_core.training.config.check import check_config
from gvpo_core.training.data import (
    Prompts,
    Row,
    check_prompt_columns,
    column_names,
    encode_prompts,
    held_out_rows,
    training_rows,
    with_given,
)
from gvpo_core.training.episodes import Environments, environment_reward, episode_prompts
from gvpo_core.training.fingerprint import run_inputs
from gvpo_core.training.objective import check_objective, find_objective
from gvpo_core.training.policy import Policy
from gvpo_core.training.policy.load import missing_package
from gvpo_core.training.recorded import (
    Groups,
    Recorded,
    ReferenceScores,
    Stream,
    StreamedGroups,
    encode_groups,
    recorded_beside,
    recorded_evaluation,
    recorded_training,
    reference_file,
    stream_of,
)
from gvpo_core.training.recorded.shapes import WHOLE
from gvpo_core.training.rewards import Reward, RewardFunction, RewardLog, check_columns, close_rewards, load_rewards
from gvpo_core.training.rows import DataError, load_rows, unbounded
from gvpo_core.training.samplers import Sampler
from gvpo_core.training.samplers.background import Asks
from gvpo_core.training.samplers.gaps import GapCheck
from gvpo_core.training.samplers.load import check_sampler
from gvpo_core.training.samplers.protocol import heed
from gvpo_core.training.sources import Ahead, Buffer, Mixed, Sampled, Source, Streamed, Taught
from gvpo_core.training.sources import Recorded as RecordedSource
from gvpo_core.training.teacher import Teacher, load_teacher
from gvpo_core.training.teacher.sampler import TeacherSampler
from gvpo_core.training.terminal.output import open_standard_descriptors


@dataclass(frozen=True)
class HeldOut:
    """The data of an evaluation."""

    prompts: Prompts | None  # to be answered and scored by the rewards
    groups: Groups | None  # recorded responses, for the loss
    reference: ReferenceScores | None = None  # scores of the groups
    teacher: Teacher | None = None  # replaces the reference

    def describe(self) -> str:
        """Describes the data, for the header."""
        parts = (
            f"{len(self.prompts)} held out" if self.prompts else "",
            f"{len(self.groups)} recorded groups held out" if self.groups else "",
        )
        return ", ".join(part for part in parts if part)


class Inputs:
    """The inputs of one run. The end of `with` ends the reward processes."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.rows: list[Row] = []  # of data.train
        self.held_out_rows: list[Row] = []  # of data.evaluation
        self.recorded: Recorded | None = None  # the training rows, if they hold responses to train on
        self.held_out_recorded: Recorded | None = None
        self.beside_rows: list[Row] = []  # of data.recorded
        self.beside: Recorded | None = None
        self.stream: Stream | None = None  # the training rows, if they are too many to hold; `rows` has the first
        self.rewards: list[Reward] = []
        self.environments: Environments | None = None
        environment = {"environment": RewardConfig(options=config.environment.options)}
        self.reward_log = RewardLog(config.rewards | environment)  # hides the secrets of both
        self.errors: list[ValueError] = []  # failures of `open`, in order
        self._functions: Mapping[str, RewardFunction] = {}  # rewards passed from Python
        self._teacher: Teacher | None = None

    def open(
        self,
        *,
        train_rows: Iterable[Row] | None = None,
        evaluation_rows: Iterable[Row] | None = None,
        rewards: Mapping[str, RewardFunction] | None = None,
        training: bool = True,
        scoring: bool = True,
    ) -> "Inputs":
        """Reads the rows and starts the rewards; failures are collected in `errors` and reported together.

        Args:
          train_rows: rows to train on, instead of data.train.
          evaluation_rows: held-out rows, instead of data.evaluation.
          rewards: functions by name, added to the configured ones or used instead of their import paths.
          training: whether the training rows are needed; an evaluation does not need them.
          scoring: whether the rewards are needed.
        """
        self._functions = rewards or {}
        open_standard_descriptors()  # before the rewards open pipes
        if scoring:
            self._attempt("rewards", lambda: load_rewards(self.config.rewards, rewards, log=self.reward_log))
            if self.config.environment.used:
                self._attempt("environments", lambda: Environments(self.config.environment, self.reward_log))
            if self.config.environment.path:
                self.rewards.append(environment_reward(self.config.environment.weight, self.reward_log))
        if training:
            self.errors += map(ConfigError, missing_package("tomli_w", "train"))  # imported when the run folder is made
            self.stream = stream_of(train_rows, "train_rows", self.config.data.buffer)
            head = self.stream.head if self.stream else None
            self._attempt("rows", lambda: head or training_rows(self.config, train_rows))
            self._check(lambda: check_objective(self.config))
            self._check(lambda: check_sampler(self.config))
            if beside := self.config.data.recorded:
                self._attempt("beside_rows", lambda: load_rows(beside, "data.recorded"))
        self._attempt("held_out_rows", lambda: held_out_rows(self.config, evaluation_rows))
        if self.rows:
            name = "data.train" if train_rows is None else "train_rows"
            self._attempt("recorded", lambda: recorded_training(self.config, self.rows, name))
        if self.beside_rows:
            self._attempt("beside", lambda: recorded_beside(self.config, self.beside_rows, "data.recorded"))
        if self.held_out_rows:
            name = "data.evaluation" if evaluation_rows is None else "evaluation_rows"
            self._attempt("held_out_recorded", lambda: recorded_evaluation(self.config, self.held_out_rows, name))
        if self.stream is not None and (self.recorded is None or self.recorded.shape in WHOLE):
            source = f"{self.stream.name} is a stream, perhaps endless, and not of whole recorded groups"
            self.errors.append(DataError(unbounded(source, self.config.data.buffer)))
        if self.rows and (not self.recorded or self.config.rollout.source == "mixed"):
            self._check_columns(self.rows, "the training data")
        if self.rows and not self.recorded:
            self._check_prompts(self.rows, "data.train" if train_rows is None else "train_rows")
        if self.held_out_rows:
            self._check_columns(self.held_out_rows, "the held-out data")
            if not self.held_out_recorded:
                self._check_prompts(
                    self.held_out_rows, "data.evaluation" if evaluation_rows is None else "evaluation_rows"
                )
        return self

    def _check_columns(self, rows: Sequence[Row], name: str) -> None:
        columns = {*column_names(rows)} - {self.config.data.prompt}
        self._check(lambda: check_columns(self.rewards, columns, name))

    def _check_prompts(self, rows: Sequence[Row], name: str) -> None:
        if not self.config.environment.path:  # an environment makes its own prompts
            self._check(lambda: check_prompt_columns(rows, self.config.data, name))

    def _attempt(self, name: str, work: Callable[[], Any]) -> None:
        try:
            setattr(self, name, work())
        except ValueError as e:
            self.errors.append(e)

    def _check(self, work: Callable[[], None]) -> None:
        try:
            work()
        except ValueError as e:
            self.errors.append(e)

    def source(
        self, policy: Policy, sampler: Sampler | None = None, *, cached: bool = True, trained: bool = True
    ) -> Source:
        """Returns the source of the groups of the training steps.

        Args:
          sampler: draws the responses instead of the policy.
          cached: keep reference scores on disk.
          trained: whether the policy moves between the steps.
        Raises: DataError: see `encode_prompts` and `encode_groups`. ConfigError: a sampler or a mixture is set, and the
          data has recorded responses.
        """
        source = self._source(policy, sampler, trained, cached)
        if isinstance(sampler, TeacherSampler):
            self._teacher = sampler.teacher
            self._teacher.check(source.prompts)
        if self.config.objective.reference != "teacher":
            return source
        return Taught(source, self._taught_by(policy, source.prompts))

    def _taught_by(self, policy: Policy, prompts: Prompts) -> Teacher:
        """Returns the teacher, loaded once. Raises: ConfigError: it cannot be used, or cannot read these prompts."""
        self._teacher = self._teacher or load_teacher(self.config, policy)
        self._teacher.check(prompts)
        return self._teacher

    def heed(self, sampler: Sampler | None, stopping: Callable[[], bool]) -> None:
        """Tells the sampler, and a teacher on a server, how to learn that the run must stop; see `Sampler.stopping`."""
        heed(sampler, stopping)
        if self._teacher is not None:
            heed(self._teacher.scorer, stopping)

    def _source(self, policy: Policy, sampler: Sampler | None, trained: bool, cached: bool) -> Source:
        config = self.config
        if self.recorded is None or config.rollout.source == "mixed":
            return self._sampled(policy, sampler, trained, cached)
        if sampler is not None:
            raise ConfigError(
                "a sampler is given, and the training data holds recorded responses: leave the sampler"
                " (rollout.sampler) out, or set rollout.source = 'sampled'"
            )
        if config.replay.groups or self.beside is not None:
            name = "replay.groups" if config.replay.groups else "data.recorded"
            raise ConfigError(
                f"{name} is set, and the training data holds recorded responses, so nothing is sampled to mix it"
                " with: leave it out, or set rollout.source = 'sampled' or 'mixed'"
            )
        smallest = find_objective(config.objective).smallest
        groups = encode_groups(policy, self.recorded, config, smallest=smallest)
        reference = self._reference(policy, config.run.folder if cached else None)
        if self.stream is not None:
            return Streamed(config, groups, reference, StreamedGroups(self.stream, self.recorded, config, smallest))
        return RecordedSource(config, groups, reference)

    def _sampled(self, policy: Policy, sampler: Sampler | None, trained: bool, cached: bool) -> Source:
        """Returns the source of sampled groups, mixed with others as the settings say."""
        config, ahead = self.config, None
        if sampler is not None and trained and config.rollout.ahead:
            ahead = Ahead(cast(Asks, sampler), config.rollout.ahead, config.run.steps)
        gap_check = None if sampler is None else GapCheck.of(policy, sampler, probed=config.rollout.ahead > 0)
        if self.recorded is None:
            prompts = self._prompts(policy, self.rows)
            sampled = Sampled(config, prompts, self.rewards, sampler, trained, ahead, gaps=gap_check)
        else:
            groups = encode_groups(policy, self.recorded, config, smallest=0)
            reference = self._reference(policy, config.run.folder if cached else None)
            sampled = Sampled(
                config, groups.prompts, self.rewards, sampler, trained, ahead, groups, reference, gaps=gap_check
            )
        if self.beside is None and not config.replay.groups:
            return sampled
        recorded = None
        if self.beside is not None:
            smallest = find_objective(config.objective).smallest
            beside = encode_groups(policy, self.beside, config, "data.recorded", smallest=smallest)
            recorded = RecordedSource(config, beside, self._reference(policy, config.run.folder if cached else None))
        buffer = Buffer(config.replay, config.run.seed) if config.replay.groups else None
        return Mixed(config, sampled, recorded, buffer)

    def held_out(self, policy: Policy, *, folder: str | None = None) -> HeldOut | None:
        """Returns the encoded data of an evaluation; None without held-out rows.

        Args:
          folder: folder of the reference scores if data.reference_cache names none.
        """
        config, rows, recorded = self.config, self.held_out_rows, self.held_out_recorded
        if not rows:
            return None
        limit, name = config.evaluation.prompts or None, "data.evaluation"
        taught = config.objective.reference == "teacher"
        if recorded is None:
            prompts = self._prompts(policy, rows[:limit], name)
            measures_kl = taught and config.evaluation.temperature == 1  # a KL needs the policy's own distribution
            return HeldOut(prompts, None, teacher=self._taught_by(policy, prompts) if measures_kl else None)
        chosen = replace(recorded, rows=recorded.rows[:limit])
        smallest = find_objective(config.objective).smallest
        groups = encode_groups(policy, chosen, config, name, smallest=smallest)
        reference = self._reference(policy, folder)
        teacher = self._taught_by(policy, groups.prompts) if taught else None
        return HeldOut(groups.prompts if self.rewards else None, groups, reference, teacher)

    def _prompts(self, policy: Policy, rows: Sequence[Row], name: str = "data.train") -> Prompts:
        if self.environments is not None:
            return episode_prompts(policy, self.environments, rows, self.config, name)
        return encode_prompts(policy, rows, self.config.data, name, max_tokens=self.config.rollout.max_tokens)

    def _reference(self, policy: Policy, folder: str | None) -> ReferenceScores | None:
        objective = self.config.objective
        if objective.reference != "initial" or objective.reference_every:  # a renewed reference has other scores
            return None
        return ReferenceScores(self.config, policy, reference_file(self.config, folder))

    def fingerprints(self, policy: Policy) -> dict[str, Mapping[str, Any]]:
        """Returns name of INPUTS -> name -> fingerprint; see fingerprint.py. A teacher counts once it is loaded."""
        facts = {"model": policy.describe(), "teacher": self._teacher.facts if self._teacher else None}
        dtypes = {name: fact.dtype for name, fact in facts.items() if fact is not None and fact.dtype}
        made_from = run_inputs(self.config, self.rows, self.held_out_rows, self._functions, self.beside_rows)
        return made_from | {"dtype": dtypes}

    def close(self) -> None:
        """Ends the processes of rewards and environments."""
        close_rewards(self.rewards)
        if self.environments is not None:
            self.environments.close()

    def __enter__(self) -> "Inputs":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
        self.reward_log.close()


def open_inputs(
    config: Config,
    *,
    train_rows: Iterable[Row] | None = None,
    evaluation_rows: Iterable[Row] | None = None,
    rewards: Mapping[str, RewardFunction] | None = None,
    training: bool = True,
) -> Inputs:
    """Opens the inputs that `config` names or that are passed from Python; use it in `with`.

    Raises: ConfigError, DataError: the first mistake in the settings, the rows or the rewards.
    """
    config = with_given(config, train_rows if training else evaluation_rows, rewards)
    check_config(config)
    inputs = Inputs(config).open(
        train_rows=train_rows, evaluation_rows=evaluation_rows, rewards=rewards, training=training
    )
    if inputs.errors:
        inputs.close()
        raise inputs.errors[0]
    return inputs

"""What a run is fed: settings, rows and reward functions, opened once for training, evaluation and the dry run."""

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from gvpo_core.training.config import Config
from gvpo_core.training.config.check import check_config
from gvpo_core.training.data import (
    Prompts,
    Row,
    column_names,
    encode_prompts,
    held_out,
    held_out_rows,
    training_rows,
    with_given,
)
from gvpo_core.training.objective import check_objective
from gvpo_core.training.policy import Policy
from gvpo_core.training.rewards import Reward, RewardFunction, RewardLog, check_columns, close_rewards, load_rewards
from gvpo_core.training.run.fingerprint import run_inputs
from gvpo_core.training.watch.output import open_standard_descriptors


class Inputs:
    """The inputs of one run. `with` ends the reward processes."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.rows: list[Row] = []  # of data.train
        self.held_out_rows: list[Row] = []  # of data.evaluation
        self.rewards: list[Reward] = []
        self.reward_log = RewardLog(config.rewards)
        self.errors: list[ValueError] = []  # what could not be opened, in order
        self._functions: Mapping[str, RewardFunction] = {}  # rewards given in Python

    def open(
        self,
        *,
        train_rows: Iterable[Row] | None = None,
        evaluation_rows: Iterable[Row] | None = None,
        rewards: Mapping[str, RewardFunction] | None = None,
        training: bool = True,
        scoring: bool = True,
    ) -> "Inputs":
        """Reads the rows and starts the rewards; what fails goes into `errors`, so that all of it is reported at once.

        Args:
          train_rows, evaluation_rows, rewards: as in `loop.train`.
          training: whether the training rows are needed; an evaluation does without.
          scoring: whether the rewards are needed.
        """
        self._functions = rewards or {}
        open_standard_descriptors()  # before the rewards' pipes
        if scoring:
            self._attempt("rewards", lambda: load_rewards(self.config.rewards, rewards, log=self.reward_log))
        if training:
            self._attempt("rows", lambda: training_rows(self.config, train_rows))
            self._check(lambda: check_objective(self.config))
        self._attempt("held_out_rows", lambda: held_out_rows(self.config, evaluation_rows))
        for name, rows in (("the training data", self.rows), ("the held-out data", self.held_out_rows)):
            if rows:
                columns = {*column_names(rows)} - {self.config.data.prompt}
                self._check(lambda columns=columns, name=name: check_columns(self.rewards, columns, name))  # type: ignore[misc]
        return self

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

    def prompts(self, policy: Policy) -> Prompts:
        """The training prompts, encoded. Raises: DataError: see `encode_prompts`."""
        return encode_prompts(policy, self.rows, self.config.data, max_tokens=self.config.rollout.max_tokens)

    def held_out(self, policy: Policy) -> Prompts | None:
        """The held-out prompts that an evaluation uses, encoded; None without held-out rows."""
        return held_out(self.config, policy, self.held_out_rows) if self.held_out_rows else None

    def fingerprints(self) -> dict[str, Mapping[str, Any]]:
        """ "data", "model" and "rewards" -> name -> fingerprint; see run/fingerprint.py."""
        return run_inputs(self.config, self.rows, self.held_out_rows, self._functions)

    def __enter__(self) -> "Inputs":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        close_rewards(self.rewards)
        self.reward_log.close()


def open_inputs(
    config: Config,
    *,
    train_rows: Iterable[Row] | None = None,
    evaluation_rows: Iterable[Row] | None = None,
    rewards: Mapping[str, RewardFunction] | None = None,
    training: bool = True,
) -> Inputs:
    """The inputs that `config` names, or that are given in Python; use it in `with`.

    Raises: ConfigError, DataError: the first thing that is wrong with the settings, the rows or the rewards.
    """
    config = with_given(config, train_rows if training else evaluation_rows, rewards)
    check_config(config)
    inputs = Inputs(config).open(
        train_rows=train_rows, evaluation_rows=evaluation_rows, rewards=rewards, training=training
    )
    if inputs.errors:
        close_rewards(inputs.rewards)
        raise inputs.errors[0]
    return inputs

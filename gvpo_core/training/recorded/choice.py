"""Decides whether a run trains on recorded responses, and which objectives allow it."""

from collections.abc import Sequence

from gvpo_core.objectives import TABLE
from gvpo_core.training.config import Config, ConfigError
from gvpo_core.training.config.check import NO_REWARD
from gvpo_core.training.data import column_names
from gvpo_core.training.recorded.rows import Recorded, recorded_rows
from gvpo_core.training.recorded.shapes import GROUPS, RUN, SHAPES, UNSCORED, Shape, shape_of
from gvpo_core.training.rows import DataError, Row


def recorded_training(config: Config, rows: Sequence[Row], name: str) -> Recorded | None:
    """Returns the training rows as recorded responses; None if the rows are prompts to sample from.

    Raises: DataError: a row cannot be used. ConfigError: the settings allow both readings, or the objective does not
      support recorded responses.
    """
    shape, columns = shape_of(column_names(rows)), column_names(rows)
    source = config.rollout.source
    if source in ("recorded", "mixed") and shape is None:
        known = "; ".join(" and ".join(shape.needs) for shape in SHAPES if shape is not RUN)
        raise DataError(
            f"{name} has no recorded responses, which rollout.source = {source!r} needs: its columns are"
            f" {', '.join(columns)}; expected one of: {known}"
        )
    if source == "auto" and shape is not None and shape not in (RUN, GROUPS) and config.rewards:
        if shape in UNSCORED:  # no scores: the rewards score these responses
            return None
        raise ConfigError(
            f"{name} holds {shape.description}, and rewards are configured: set rollout.source = 'recorded' to train on"
            " these responses and use the rewards in evaluations only, or 'sampled' to draw and score new ones"
        )
    taught = config.objective.reference == "teacher" and not (source == "mixed" and shape not in UNSCORED)
    if not config.scores_responses and not taught and (source in ("sampled", "mixed") or shape is None):
        raise ConfigError(NO_REWARD)
    if source == "sampled" or shape is None:
        return None
    _check_objective(config, shape, name)
    return recorded_rows(rows, shape, name, prompt=config.data.prompt)


def recorded_evaluation(config: Config, rows: Sequence[Row], name: str) -> Recorded | None:
    """Returns the held-out rows as recorded responses; None if the rows are prompts only.

    Raises: DataError: a row cannot be used. ConfigError: the rows are prompts only, and there is no reward.
    """
    shape, source = shape_of(column_names(rows)), config.rollout.source
    if source != "sampled" and shape in UNSCORED and config.objective.name != "sft":
        shape = None
    if shape is not None and (
        source == "recorded" or (source == "auto" and (shape in (RUN, GROUPS) or not config.scores_responses))
    ):
        return recorded_rows(rows, shape, name, prompt=config.data.prompt)
    if not config.scores_responses and (config.objective.reference, config.evaluation.temperature) != ("teacher", 1):
        measured = ", or evaluation.temperature = 1.0 to measure the KL to the teacher"
        taught = measured if config.objective.reference == "teacher" else ""
        raise ConfigError(f"{name} holds prompts without scored responses, and there is {NO_REWARD}{taught}")
    return None


def recorded_beside(config: Config, rows: Sequence[Row], name: str) -> Recorded:
    """Returns recorded groups that a step uses in addition to sampled ones.

    Raises: DataError: the rows have no recorded responses, or a row cannot be used. ConfigError: the objective does not
      support recorded responses.
    """
    shape = shape_of(column_names(rows))
    if shape is None:
        raise DataError(f"{name} has no recorded responses; its columns are {', '.join(column_names(rows))}")
    _check_objective(config, shape, name)
    return recorded_rows(rows, shape, name, prompt=config.data.prompt)


def _check_objective(config: Config, shape: Shape, name: str) -> None:
    objective = config.objective.name
    if objective in TABLE and TABLE[objective].needs_old:
        raise ConfigError(
            f"objective.name = {objective!r} compares a response's probability now with that when the policy drew"
            f" it, and {name} holds responses of other policies ({shape.description}); use gvpo, which needs no such"
            " ratio, or dpo, reject_sampling or sft"
        )
    if objective == "sft" and shape.compares:
        raise ConfigError(
            f"objective.name = 'sft' imitates every scored response, also the rejected ones, and {name} holds"
            f" {shape.description}; use reject_sampling, which imitates the best of each group, or gvpo or dpo"
        )
    compares = objective != "sft" and config.rollout.source != "mixed" and config.objective.reference != "teacher"
    if compares and shape in UNSCORED:
        raise ConfigError(
            f"{name} holds {shape.description}, and objective.name = {objective!r} compares rewards: give rewards, a"
            " column beside 'responses', or set objective.name = 'sft'"
        )

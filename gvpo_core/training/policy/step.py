"""What every backend's optimizer step shares: which rows are scored first, coefficients checked, the learning rate."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gvpo_core.training.config import OptimizerConfig
from gvpo_core.training.policy import Batch, Coefficients
from gvpo_core.training.policy.layout import Row, Splitting

HELD_MICRO_BATCHES = 4  # times micro_batch_tokens: tokens whose layer inputs a deferred backward pass holds at most


class StepPlan(NamedTuple):
    """How a step goes over its N responses: whole groups in one pass, the rest scored before it is stepped along."""

    grouped: list[list[Row]]  # micro-batches of whole groups: one forward pass serves coefficients and gradient
    rest: list[int]  # all other responses
    logprobs: np.ndarray  # (N,) float64, nats: of the rest, 0 elsewhere
    factors: np.ndarray  # (N,) float64: coefficients of the rest, 0 elsewhere
    tokens: int  # computed to score the rest
    deferred: Sequence[list[list[Row]]] = ()  # groups in several micro-batches: all go forward before one goes back
    settle: Callable[[], None] = lambda: None  # raises what another rank must refuse; called before the step is taken


def plan_step(
    batch: Batch,
    splitting: Splitting,
    coefficients: Coefficients,
    *,
    together: bool,
    scored: np.ndarray | None,
    score: Callable[[Batch], tuple[np.ndarray, int]],
    held: int = 0,
    meets: bool = False,
) -> StepPlan:
    """Scores what does not go through the step as whole groups, and gives it its coefficients.

    Args:
      together: whole groups may go in one pass: strategy "group", and no group is on two ranks.
      scored: (N,) the log-probabilities of all rows, where they are known; then no pass is needed for them.
      score: gives a batch's log-probabilities (n,), nats, and the tokens computed.
      held: tokens of a group in several micro-batches that the backend can hold between forward and backward pass.
      meets: several ranks call `score` together, with or without rows.
    Raises: FloatingPointError, ValueError: see `factors_of`.
    """
    count = len(batch)
    grouped, rest = splitting.groups(batch) if together and scored is None else ([], list(range(count)))
    deferred: list[list[list[Row]]] = []
    if together and scored is None and held:
        deferred, rest = _deferred(batch, splitting, rest, held)
    logprobs, factors, tokens = np.zeros(count), np.zeros(count), 0
    if rest or meets or not (grouped or deferred):  # a rank without rows calls too: there ranks meet
        chosen = np.asarray(rest, dtype=np.int64)
        if scored is None:
            logprobs[chosen], tokens = score(batch.take(rest))
        else:
            logprobs = np.asarray(scored, dtype=np.float64)
            if logprobs.shape != (count,):
                raise ValueError(f"scored has shape {logprobs.shape}; expected ({count},)")
        factors[chosen] = factors_of(coefficients, logprobs[chosen], chosen)
    return StepPlan(grouped, rest, logprobs, factors, tokens, deferred)


def _deferred(
    batch: Batch, splitting: Splitting, rest: list[int], held: int
) -> tuple[list[list[list[Row]]], list[int]]:
    """Rounds of micro-batches of whole groups, each as near to `held` tokens as it can be; the rows of larger groups.

    Full rounds are alike on all ranks, which go through them together.
    """
    members: dict[int, list[int]] = {}
    for i in rest:
        members.setdefault(batch.groups[i], []).append(i)
    micro_of = {label: splitting.rows(batch, group) for label, group in members.items()}
    sizes = {label: _computed(micro) for label, micro in micro_of.items()}
    rounds: list[list[Row]] = []
    for label in sorted((label for label in members if sizes[label] <= held), key=lambda label: -sizes[label]):
        rows = [row for of_micro in micro_of[label] for row in of_micro]
        for of_round in rounds:
            if _computed(splitting.micro_batches([*of_round, *rows])) <= held:
                of_round += rows
                break
        else:
            rounds.append(rows)
    others = [i for i in rest if sizes[batch.groups[i]] > held]
    return sorted(map(splitting.micro_batches, rounds), key=_computed, reverse=True), others


def _computed(micro: list[list[Row]]) -> int:
    """Tokens of micro-batches, padding included."""
    return sum(len(rows) * rows[0].length for rows in micro)


class ByGroup:
    """The callback of a complete batch: an error on one rank waits until all ranks raise it."""

    def __init__(self, coefficients: Coefficients, agree: Callable[[Exception | None], None]) -> None:
        self.coefficients, self.agree = coefficients, agree
        self.error: Exception | None = None

    def __call__(self, logprobs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The factors of whole groups; zeros after an error."""
        try:
            return np.zeros(len(rows)) if self.error else factors_of(self.coefficients, logprobs, rows)
        except Exception as error:  # raised by `settle`
            self.error = error
            return np.zeros(len(rows))

    def settle(self) -> None:
        """Raises the error of any rank on every rank; each calls it once, before it steps."""
        self.agree(self.error)


def learning_rate(config: OptimizerConfig, step: int, updates: int) -> float:
    """Of update number `step` (from 0) out of `updates`: linear warm-up, then the schedule, 0 after the last."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - config.warmup) / max(1, updates - config.warmup))
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - progress)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def factors_of(coefficients: Coefficients, logprobs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The coefficients of rows, checked.

    Raises: FloatingPointError: log-probs or coefficients that are not finite, with their rows.
      ValueError: a result of the wrong shape.
    """
    if isinstance(coefficients, ByGroup):
        return coefficients(logprobs, rows)
    factors = np.asarray(coefficients(logprobs, rows), dtype=np.float64)  # before any check: here ranks meet
    if factors.shape != logprobs.shape:
        raise ValueError(f"coefficients returned shape {factors.shape}; expected {logprobs.shape}")
    check_finite("log-probabilities", logprobs, rows)
    check_finite("coefficients", factors, rows)
    return factors


def check_finite(name: str, values: np.ndarray, rows: np.ndarray) -> None:
    """Raises: FloatingPointError: how many values are not finite, and the row of the first."""
    bad = rows[~np.isfinite(values)]
    if len(bad):
        raise FloatingPointError(
            f"{name} of {len(bad)} of {len(rows)} responses are not finite, the first at batch row {bad[0]}: "
            "no step was taken"
        )

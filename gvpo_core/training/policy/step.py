"""What every backend's optimizer step shares: which rows are scored first, coefficients checked, the learning rate."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gvpo_core.training.config import ConfigError, OptimizerConfig
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
    known: Sequence[int] = ()  # responses in `deferred` that were scored first: `factors` has their coefficients
    settle: Callable[[], None] = lambda: None  # raises what another rank must refuse; called before the step is taken
    # The callback of `deferred` where that holds a part of a group; it sets the `factors` of the part that `rest` has.
    partly: "PartlyScored | None" = None


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
    lockstep: bool = False,
) -> StepPlan:
    """Scores what does not go through the step as whole groups, and gives it its coefficients.

    Args:
      together: whole groups may go in one pass: strategy "group", and no group is on two ranks.
      scored: (N,) the log-probabilities of all rows, where they are known; then no pass is needed for them.
      score: gives a batch's log-probabilities (n,), nats, and the tokens computed.
      held: tokens of a group in several micro-batches that the backend can hold between forward and backward pass.
      meets: several ranks call `score` together, with or without rows.
      lockstep: ranks meet at every pass, and compute layers again in each: all groups go in rounds alike on all ranks.
    Raises: FloatingPointError, ValueError: see `factors_of`.
    """
    count = len(batch)
    once = together and scored is None
    grouped, rest = splitting.groups(batch) if once and not (lockstep and held) else ([], list(range(count)))
    deferred: list[list[list[Row]]] = []
    waiting: list[int] = []
    if once and held:
        deferred, rest, waiting = _deferred(batch, splitting, rest, held, lockstep)
    logprobs, factors, tokens = np.zeros(count), np.zeros(count), 0
    if rest or meets or not (grouped or deferred):  # a rank without rows calls too: there ranks meet
        chosen = np.asarray(rest, dtype=np.int64)
        if scored is None:
            logprobs[chosen], tokens = score(batch.take(rest))
        else:
            logprobs = np.asarray(scored, dtype=np.float64)
            if logprobs.shape != (count,):
                raise ValueError(f"scored has shape {logprobs.shape}; expected ({count},)")
        asked = chosen[~np.isin(chosen, waiting)]
        if len(asked) or not waiting:
            factors[asked] = factors_of(coefficients, logprobs[asked], asked)
    in_rounds = lockstep and bool(deferred)
    plan = StepPlan(grouped, [] if in_rounds else rest, logprobs, factors, tokens, deferred, rest if in_rounds else ())
    if not waiting:
        return plan
    return plan._replace(partly=PartlyScored(coefficients, batch.groups, waiting, logprobs, factors))


def _deferred(
    batch: Batch, splitting: Splitting, rest: list[int], held: int, lockstep: bool
) -> tuple[list[list[list[Row]]], list[int], list[int]]:
    """Rounds of micro-batches of groups, each as near to `held` tokens as it can be; the rows that are scored first;
    those of them whose groups have their other rows in rounds.

    Of a larger group a round holds what it can. Rounds are alike on all ranks, which go through them together; with
    `lockstep` they hold all rows of larger groups, which were scored first.
    """
    members: dict[int, list[int]] = {}
    for i in rest:
        members.setdefault(batch.groups[i], []).append(i)
    micro_of = {label: splitting.rows(batch, group) for label, group in members.items()}
    sizes = {label: _computed(micro) for label, micro in micro_of.items()}
    others = [i for i in rest if sizes[batch.groups[i]] > held]
    waiting: list[int] = []
    if not lockstep:
        micro_of = {label: held_part(micro, held) for label, micro in micro_of.items()}
        sizes = {label: _computed(micro) for label, micro in micro_of.items() if micro}
        taken = {i for micro in micro_of.values() for rows in micro for row in rows for i in row.responses}
        others = [i for i in rest if i not in taken]
        waiting = [i for i in others if batch.groups[i] in sizes]
    units = [(size, [row for rows in micro_of[label] for row in rows]) for label, size in sizes.items() if size <= held]
    if lockstep and others:
        units += [(row.length, [row]) for rows in splitting.rows(batch, others) for row in rows]
    rounds: list[list[Row]] = []
    for _, rows in sorted(units, key=lambda unit: -unit[0]):
        for of_round in rounds:
            if _computed(splitting.micro_batches([*of_round, *rows])) <= held:
                of_round += rows
                break
        else:
            rounds.append(rows)
    # In each round the fullest pass first, and rounds by their number of passes and the emptiest one.
    passes = [sorted(splitting.micro_batches(of_round), key=_tokens, reverse=True) for of_round in rounds]
    return sorted(passes, key=lambda micro: (len(micro), _tokens(micro[-1])), reverse=True), others, waiting


def held_part(micro: Sequence[list[Row]], held: int) -> list[list[Row]]:
    """The first micro-batches of a group, as many as have `held` tokens."""
    totals = itertools.accumulate(map(_tokens, micro))
    return [rows for rows, total in zip(micro, totals, strict=True) if total <= held]


def _tokens(rows: Sequence[Row]) -> int:
    """Of a micro-batch, padding included."""
    return len(rows) * rows[0].length


def _computed(micro: list[list[Row]]) -> int:
    """Tokens of micro-batches, padding included."""
    return sum(map(_tokens, micro))


class ByGroup:
    """The callback of a complete batch: an error on one rank waits until all ranks raise it."""

    def __init__(self, coefficients: Coefficients, agree: Callable[[Exception | None], None]) -> None:
        self.coefficients, self.agree = coefficients, agree
        self.error: Exception | None = None
        self.known: dict[int, float] = {}  # factors of rows that are not asked for

    def __call__(self, logprobs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The factors of whole groups, and of rows whose factors are known; zeros after an error."""
        factors = np.asarray([self.known.get(int(row), np.nan) for row in rows])
        asked = np.isnan(factors)
        try:
            if self.error:
                return np.zeros(len(rows))
            if asked.any() or not len(rows):
                factors[asked] = factors_of(self.coefficients, logprobs[asked], rows[asked])
            return factors
        except Exception as error:  # raised by `settle`
            self.error = error
            return np.zeros(len(rows))

    def settle(self) -> None:
        """Raises the error of any rank on every rank; each calls it once, before it steps."""
        self.agree(self.error)


class PartlyScored:
    """The callback of groups of which a part was scored first: it completes them, and sets the factors of that part."""

    def __init__(
        self,
        coefficients: Coefficients,
        groups: Sequence[int],
        scored: Sequence[int],
        logprobs: np.ndarray,
        factors: np.ndarray,
    ) -> None:
        """`scored`: rows of the batch with their `logprobs`, and `factors` to be set, (N,) both."""
        self.coefficients, self.groups = coefficients, groups
        self.scored, self.logprobs, self.factors = scored, logprobs, factors

    def __call__(self, logprobs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The factors of `rows`."""
        labels = {self.groups[i] for i in rows.tolist()}
        mates = np.asarray([i for i in self.scored if self.groups[i] in labels], np.int64)
        whole = np.concatenate([rows, mates])
        found = factors_of(self.coefficients, np.concatenate([logprobs, self.logprobs[mates]]), whole)
        self.factors[mates] = found[len(rows) :]
        return found[: len(rows)]


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
    if isinstance(coefficients, (ByGroup, PartlyScored)):
        return coefficients(logprobs, rows)
    factors = np.asarray(coefficients(logprobs, rows), dtype=np.float64)  # before any check: here ranks meet
    if factors.shape != logprobs.shape:
        raise ValueError(f"coefficients returned shape {factors.shape}; expected {logprobs.shape}")
    check_finite("log-probabilities", logprobs, rows)
    check_finite("coefficients", factors, rows)
    return factors


def refuse_not_finite(values: Sequence[np.ndarray], name: str) -> None:
    """Raises ConfigError where log-probs of a model that was just loaded are not finite.

    Args:
      values: of short texts, (tokens,) each.
      name: of the model, for the message.
    """
    if not all(np.isfinite(value).all() for value in values):
        raise ConfigError(
            f"log-probs of {name} are not finite: its weights hold NaN or infinity, or it overflows in model.dtype"
        )


def check_finite(name: str, values: np.ndarray, rows: np.ndarray) -> None:
    """Raises: FloatingPointError: how many values are not finite, and the row of the first."""
    bad = rows[~np.isfinite(values)]
    if len(bad):
        raise FloatingPointError(
            f"{name} of {len(bad)} of {len(rows)} responses are not finite, the first at batch row {bad[0]}: "
            "no step was taken"
        )

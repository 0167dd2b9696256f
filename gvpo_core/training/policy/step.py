"""Parts of the optimizer step that all backends share: plan of the passes, checked coefficients, learning rate."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gvpo_core.training.config import ConfigError, OptimizerConfig
from gvpo_core.training.policy import Batch, Coefficients
from gvpo_core.training.policy.layout import Row, Splitting

# Times micro_batch_tokens: the most tokens for which a deferred backward pass holds layer inputs.
HELD_MICRO_BATCHES = 4


class StepPlan(NamedTuple):
    """How a step goes through its N responses: whole groups in one pass, the rest scored first."""

    grouped: list[list[Row]]  # micro-batches of whole groups: one forward pass serves coefficients and gradient
    rest: list[int]  # all other responses
    logprobs: np.ndarray  # (N,) float64, nats: of the responses scored first, 0 elsewhere
    factors: np.ndarray  # (N,) float64: coefficients of the responses scored first, 0 elsewhere
    tokens: int  # computed to score responses first
    deferred: Sequence[list[list[Row]]] = ()  # rounds of micro-batches: all go forward before the first goes backward
    known: Sequence[int] = ()  # responses in `deferred` that were scored first; their coefficients are in `factors`
    settle: Callable[[], None] = lambda: None  # raises errors of all ranks; called before the step is taken
    # Replaces `coefficients` if `deferred` holds only a part of a group. It sets the `factors` of the part in `rest`.
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
    """Plans a step. Scores the responses that cannot go through it as whole groups, and computes their coefficients.

    Args:
      together: whole groups may go in one pass: the strategy is "group", and no group is on two ranks.
      scored: (N,) log-probabilities of all rows, if known; then no scoring pass is needed.
      score: returns the log-probabilities (n,) of a batch, nats, and the tokens computed.
      held: tokens that the backend can hold between the forward and the backward pass of several micro-batches.
      meets: several ranks call `score` together, with or without rows.
      lockstep: ranks synchronise at every pass, and recompute layers in each. All groups then go through rounds, and
        every rank has the same rounds.
    Raises: FloatingPointError, ValueError: see `factors_of`.
    """
    count = len(batch)
    single_pass = together and scored is None
    grouped, rest = splitting.groups(batch) if single_pass and not (lockstep and held) else ([], list(range(count)))
    deferred: list[list[list[Row]]] = []
    split_rows: list[int] = []  # scored first, while the other rows of their groups are deferred
    if single_pass and held:
        deferred, rest, split_rows = _deferred(batch, splitting, rest, held, lockstep)
    logprobs, factors, tokens = np.zeros(count), np.zeros(count), 0
    if rest or meets or not (grouped or deferred):  # a rank without rows calls too: ranks synchronise here
        scored_rows = np.asarray(rest, dtype=np.int64)
        if scored is None:
            logprobs[scored_rows], tokens = score(batch.take(rest))
        else:
            logprobs = np.asarray(scored, dtype=np.float64)
            if logprobs.shape != (count,):
                raise ValueError(f"scored has shape {logprobs.shape}; expected ({count},)")
        whole_rows = scored_rows[~np.isin(scored_rows, split_rows)]
        if len(whole_rows) or not split_rows:
            factors[whole_rows] = factors_of(coefficients, logprobs[whole_rows], whole_rows)
    in_rounds = lockstep and bool(deferred)
    plan = StepPlan(grouped, [] if in_rounds else rest, logprobs, factors, tokens, deferred, rest if in_rounds else ())
    if not split_rows:
        return plan
    return plan._replace(partly=PartlyScored(coefficients, batch.groups, split_rows, logprobs, factors))


def _deferred(
    batch: Batch, splitting: Splitting, rest: list[int], held: int, lockstep: bool
) -> tuple[list[list[list[Row]]], list[int], list[int]]:
    """Fills rounds of micro-batches with groups, each round up to `held` tokens.

    If a group is larger, a round holds the part of it that fits. Ranks go through their rounds together. With
    `lockstep`, rounds also hold all rows of larger groups, which are scored first.

    Returns: the rounds; the rows to score first; the subset of these rows whose groups have other rows in rounds.
    """
    members: dict[int, list[int]] = {}
    for i in rest:
        members.setdefault(batch.groups[i], []).append(i)
    micro_of = {label: splitting.rows(batch, group) for label, group in members.items()}
    sizes = {label: _computed(micro) for label, micro in micro_of.items()}
    scored_rows = [i for i in rest if sizes[batch.groups[i]] > held]
    split_rows: list[int] = []
    if not lockstep:
        micro_of = {label: held_part(micro, held) for label, micro in micro_of.items()}
        sizes = {label: _computed(micro) for label, micro in micro_of.items() if micro}
        deferred_rows = {i for micro in micro_of.values() for rows in micro for row in rows for i in row.responses}
        scored_rows = [i for i in rest if i not in deferred_rows]
        split_rows = [i for i in scored_rows if batch.groups[i] in sizes]
    units = [(size, [row for rows in micro_of[label] for row in rows]) for label, size in sizes.items() if size <= held]
    if lockstep and scored_rows:
        units += [(row.length, [row]) for rows in splitting.rows(batch, scored_rows) for row in rows]
    rounds: list[list[Row]] = []
    for _, rows in sorted(units, key=lambda unit: -unit[0]):
        for round_rows in rounds:
            if _computed(splitting.micro_batches([*round_rows, *rows])) <= held:
                round_rows += rows
                break
        else:
            rounds.append(rows)
    # Largest first: the passes of a round by tokens; rounds by their number of passes, then by their smallest pass.
    passes = [sorted(splitting.micro_batches(round_rows), key=_tokens, reverse=True) for round_rows in rounds]
    return sorted(passes, key=lambda micro: (len(micro), _tokens(micro[-1])), reverse=True), scored_rows, split_rows


def held_part(micro: Sequence[list[Row]], held: int) -> list[list[Row]]:
    """The first micro-batches of a group, as many as fit into `held` tokens."""
    totals = itertools.accumulate(map(_tokens, micro))
    return [rows for rows, total in zip(micro, totals, strict=True) if total <= held]


def _tokens(rows: Sequence[Row]) -> int:
    """Tokens of a micro-batch, including padding."""
    return len(rows) * rows[0].length


def _computed(micro: list[list[Row]]) -> int:
    """Tokens of several micro-batches, including padding."""
    return sum(map(_tokens, micro))


class ByGroup:
    """The callback of a complete batch. It keeps an error of one rank until all ranks raise it together."""

    def __init__(self, coefficients: Coefficients, agree: Callable[[Exception | None], None]) -> None:
        self.coefficients, self.agree = coefficients, agree
        self.error: Exception | None = None
        self.known: dict[int, float] = {}  # factors of rows that were computed before

    def __call__(self, logprobs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Returns the factors of whole groups, and of rows with known factors; zeros after an error."""
        factors = np.asarray([self.known.get(int(row), np.nan) for row in rows])
        unknown = np.isnan(factors)
        try:
            if self.error:
                return np.zeros(len(rows))
            if unknown.any() or not len(rows):
                factors[unknown] = factors_of(self.coefficients, logprobs[unknown], rows[unknown])
            return factors
        except Exception as error:  # raised by `settle`
            self.error = error
            return np.zeros(len(rows))

    def settle(self) -> None:
        """Raises the error of any rank on every rank. Every rank calls this once, before the step."""
        self.agree(self.error)


class PartlyScored:
    """The callback of groups that were partly scored first. It also sets the factors of the part scored first."""

    def __init__(
        self,
        coefficients: Coefficients,
        groups: Sequence[int],
        scored: Sequence[int],
        logprobs: np.ndarray,
        factors: np.ndarray,
    ) -> None:
        """
        Args:
          scored: rows of the batch that were scored first.
          logprobs: (N,) nats; set for these rows.
          factors: (N,) to be set for these rows.
        """
        self.coefficients, self.groups = coefficients, groups
        self.scored, self.logprobs, self.factors = scored, logprobs, factors

    def __call__(self, logprobs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Returns the factors of `rows`."""
        labels = {self.groups[i] for i in rows.tolist()}
        mates = np.asarray([i for i in self.scored if self.groups[i] in labels], np.int64)
        group_rows = np.concatenate([rows, mates])
        factors = factors_of(self.coefficients, np.concatenate([logprobs, self.logprobs[mates]]), group_rows)
        self.factors[mates] = factors[len(rows) :]
        return factors[: len(rows)]


def learning_rate(config: OptimizerConfig, step: int, updates: int) -> float:
    """Learning rate of update `step` (from 0) of `updates`: linear warm-up, then the schedule, 0 after the last."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - config.warmup) / max(1, updates - config.warmup))
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - progress)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def factors_of(coefficients: Coefficients, logprobs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Computes the coefficients of rows, and checks them.

    Raises: FloatingPointError: log-probs or coefficients that are not finite, with their rows.
      ValueError: a result of the wrong shape.
    """
    if isinstance(coefficients, (ByGroup, PartlyScored)):
        return coefficients(logprobs, rows)
    factors = np.asarray(coefficients(logprobs, rows), dtype=np.float64)  # before any check: ranks synchronise here
    if factors.shape != logprobs.shape:
        raise ValueError(f"coefficients returned shape {factors.shape}; expected {logprobs.shape}")
    check_finite("log-probabilities", logprobs, rows)
    check_finite("coefficients", factors, rows)
    return factors


def refuse_not_finite(values: Sequence[np.ndarray], name: str) -> None:
    """Raises ConfigError if log-probs of a newly loaded model are not finite.

    Args:
      values: log-probs of short texts, (tokens,) each.
      name: name of the model, for the message.
    """
    if not all(np.isfinite(value).all() for value in values):
        raise ConfigError(
            f"log-probs of {name} are not finite: its weights hold NaN or infinity, or it overflows in model.dtype"
        )


def check_finite(name: str, values: np.ndarray, rows: np.ndarray) -> None:
    """Raises FloatingPointError if values are not finite. The message has their number and the first row."""
    bad = rows[~np.isfinite(values)]
    if len(bad):
        raise FloatingPointError(
            f"{name} of {len(bad)} of {len(rows)} responses are not finite, the first at batch row {bad[0]}: "
            "no step was taken"
        )

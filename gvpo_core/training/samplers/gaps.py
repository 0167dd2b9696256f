"""Checks that a sampler has the policy's weights: compares its log-probabilities with the policy's at each step."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from gvpo_core.training.policy import Policy
from gvpo_core.training.samplers.protocol import Sampler, SamplerError

MOST = 0.25
"""Mean gap of a step, nats a token, that no 16-bit precision explains: ten times the usual gap in 16 bits."""
SMALL, SMALL_IN_16_BITS = 1e-3, 1e-2
"""Mean gap of a step, nats a token, that is no sign of other weights: for float32, and for fewer bits."""
TIMES, ERRORS = 4.0, 5.0
"""A later step differs if its mean is above TIMES the first one's, and more than ERRORS standard errors above it."""
FEWEST = 4  # responses needed to compare two means
PROBE_EVERY = 20
"""Steps between comparisons that draw responses, unless `gap_tolerance` or `gap_every` is set."""
_FULL = ("float32", "float64")


@dataclass(frozen=True)
class Usual:
    """Mean and variance over the responses of the first comparison: the gap between the two precisions."""

    count: int
    means: tuple[float, float]  # of |sampler - policy| / tokens, and of |sampler - policy| / sqrt(tokens)
    variances: tuple[float, float]


@dataclass
class GapCheck:
    """Compares the log-probabilities of drawn responses with the policy's, and stops the run beyond a limit.

    With `tolerance`, no response may differ by more. Without it, the responses drawn with the policy's current weights
    are compared as a whole. Let d_i = |sampler - policy| of response i, in nats, and T_i its tokens. A step differs if

        mean(d / T) > max(SMALL, TIMES usual)   and   mean - usual > ERRORS sqrt(var / n + usual var / usual n),

    both for d / T and, without SMALL, for d / sqrt(T). If lengths change, independent rounding of the tokens keeps the
    latter constant, and common rounding the former. `usual` is the run's first comparison; the checkpoint keeps it. If
    both compute in float32, the mean must be at most SMALL from the first step on. It must never exceed MOST.
    """

    tolerance: float | None
    every: int  # steps between two comparisons
    dtype: str  # that the policy computes in
    sampler_dtype: str = ""  # that the sampler computes in; empty: not known
    usual: Usual | None = field(default=None)

    @classmethod
    def of(cls, policy: Policy, sampler: Sampler, *, probed: bool) -> "GapCheck":
        """Returns the check that the sampler's attributes ask for.

        Args:
          probed: whether responses are drawn only for the comparison, as with rollout.ahead.
        """
        tolerance = getattr(sampler, "gap_tolerance", None)
        every = getattr(sampler, "gap_every", 0) or (PROBE_EVERY if probed and tolerance is None else 1)
        ours, theirs = policy.describe().dtype, getattr(sampler, "dtype", "")
        return cls(tolerance, every, ours, ours if theirs == "auto" else theirs)

    def due(self, step: int) -> bool:
        """Whether step `step` (from 1) is compared: the first step, then every `every` steps."""
        return (step - 1) % self.every == 0

    def check(
        self, sampler_logprobs: np.ndarray | None, logprobs: np.ndarray, lengths: np.ndarray, stale: np.ndarray | None
    ) -> None:
        """Compares the responses of a step. Every rank calls this with the responses of all ranks.

        Args:
          sampler_logprobs: (N,) nats, sum over the tokens; NaN = unknown. None: unknown for all responses.
          logprobs: (N,) nats, of the policy; NaN = not scored.
          lengths: (N,) tokens.
          stale: (N,) steps that the policy has taken since the sampler's weights. None: not known; then nothing is
            compared without a tolerance.
        Raises: SamplerError: the sampler has other weights; or there is a tolerance, but nothing to compare.
        """
        if self.tolerance is not None:
            self._check_each(sampler_logprobs, logprobs, lengths)
        elif sampler_logprobs is not None and stale is not None:
            gap = np.abs(np.where(stale == 0, sampler_logprobs, np.nan) - logprobs)
            known = ~np.isnan(gap)
            if known.any():
                self._check_mean(gap[known], np.asarray(lengths, np.float64)[known])

    def _check_each(self, sampler_logprobs: np.ndarray | None, logprobs: np.ndarray, lengths: np.ndarray) -> None:
        gap = np.zeros(0) if sampler_logprobs is None else gaps(sampler_logprobs, logprobs, lengths)
        if not gap.size:
            raise SamplerError(
                "gap_tolerance is set, but no response of the step has its sampler's log-probability (Drawn.logprob),"
                " so nothing was compared"
            )
        assert self.tolerance is not None
        if gap.max() > self.tolerance:
            raise SamplerError(
                f"the sampler's log-probabilities differ from the policy's by up to {gap.max():.3g} nats a token; at"
                f" most {self.tolerance:g} is allowed (gap_tolerance): {_CAUSES}, or it computes in another precision"
            )

    def _check_mean(self, gap: np.ndarray, lengths: np.ndarray) -> None:
        measures = (gap / lengths, gap / np.sqrt(lengths))
        current = Usual(
            len(gap),
            (float(measures[0].mean()), float(measures[1].mean())),
            (float(measures[0].var()), float(measures[1].var())),
        )
        mean = current.means[0]
        limit, why = MOST, "no precision explains more"
        if self.dtype in _FULL and self.sampler_dtype in _FULL:
            limit, why = SMALL, f"both compute in {self.dtype}; else set engine.dtype"
        if mean > limit:
            raise SamplerError(self._message(mean, limit, why))
        if self.usual is None:
            self.usual = current
        elif mean > self._limit(0) and all(self._differs(current, i) for i in (0, 1)):
            raise SamplerError(
                self._message(mean, self._limit(0), f"{self.usual.means[0]:.3g} in the first step compared")
            )

    def _limit(self, measure: int) -> float:
        """Means up to this limit do not differ."""
        assert self.usual is not None
        small = (SMALL if self.dtype in _FULL else SMALL_IN_16_BITS) if measure == 0 else 0.0
        return max(small, TIMES * self.usual.means[measure])

    def _differs(self, current: Usual, i: int) -> bool:
        assert self.usual is not None
        error = math.sqrt(current.variances[i] / current.count + self.usual.variances[i] / self.usual.count)
        if min(current.count, self.usual.count) < FEWEST:
            return False
        return current.means[i] > self._limit(i) and current.means[i] - self.usual.means[i] > ERRORS * error

    @staticmethod
    def _message(mean: float, limit: float, why: str) -> str:
        return (
            f"the sampler says that it has the policy's weights, and their log-probabilities differ by {mean:.3g} nats"
            f" a token on average; at most {limit:.3g} is expected ({why}): {_CAUSES}, or it serves another model."
            " If one of the two computes in few bits, set gap_tolerance, which replaces this check"
        )

    def state(self) -> dict[str, Any]:
        """State for the checkpoint."""
        return {} if self.usual is None else {"gap": asdict(self.usual)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned."""
        usual = state.get("gap")
        self.usual = usual and Usual(int(usual["count"]), tuple(usual["means"]), tuple(usual["variances"]))


_CAUSES = "its weights are old or partly updated, its prefix cache is stale"


def gaps(sampler_logprobs: np.ndarray, logprobs: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns |sampler - policy| of the log-probabilities, nats a token, for the responses that have both.

    Args:
      sampler_logprobs: (N,) nats, sum over the tokens; NaN = unknown.
      logprobs: (N,) nats, of the policy; NaN = not scored.
      lengths: (N,) tokens.
    Returns: (M,) with M <= N.
    """
    gap = np.abs(np.asarray(sampler_logprobs) - np.asarray(logprobs)) / np.asarray(lengths)
    known: np.ndarray = gap[~np.isnan(gap)]
    return known

"""Whether a sampler has the policy's weights: its log-probabilities against the policy's, step after step."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from gvpo_core.training.policy import Policy
from gvpo_core.training.samplers.protocol import Sampler, SamplerError

MOST = 0.25
"""Mean gap of a step, nats a token, that no precision of 16 bits explains: ten times what is usual there."""
SMALL, SMALL_IN_16_BITS = 1e-3, 1e-2
"""Mean gap of a step, nats a token, that is no sign of other weights: of a policy that computes in float32, or less."""
TIMES, ERRORS = 4.0, 5.0
"""A later step is apart where its mean is so many times the first one's, and so many standard errors above it."""
FEWEST = 4  # responses of a mean that is compared with another
PROBE_EVERY = 20
"""Steps between two comparisons for which responses are drawn, without `gap_tolerance` and `gap_every`."""
_FULL = ("float32", "float64")


@dataclass(frozen=True)
class Usual:
    """Mean and variance over the responses of the first comparison: what the two precisions explain."""

    count: int
    means: tuple[float, float]  # of |sampler - policy| by tokens, and by the square root of tokens
    variances: tuple[float, float]


@dataclass
class GapCheck:
    """Compares the log-probabilities of drawn responses with the policy's, and stops the run beyond a limit.

    With `tolerance` no response may be further apart. Without it, the responses of the policy's present weights are
    compared as a whole. With d_i = |sampler - policy| of response i, in nats, and T_i its tokens, a step is apart where

        mean(d / T) > max(SMALL, TIMES usual)   and   mean - usual > ERRORS sqrt(var / n + usual var / usual n),

    both for d / T and, without SMALL, for d / sqrt(T): independent rounding of the tokens keeps the latter constant
    when lengths change, a common one the former. `usual` is the run's first comparison, which the checkpoint keeps.
    Where both compute in float32, the mean may be at most SMALL from the first step on, and in no case more than MOST.
    """

    tolerance: float | None
    every: int  # steps between two comparisons
    dtype: str  # of the policy's products
    sampler_dtype: str = ""  # of the sampler's; empty: not known
    usual: Usual | None = field(default=None)

    @classmethod
    def of(cls, policy: Policy, sampler: Sampler, *, probed: bool) -> "GapCheck":
        """As the sampler's attributes ask for.

        Args:
          probed: whether responses are drawn for the comparison alone, as with rollout.ahead.
        """
        tolerance = getattr(sampler, "gap_tolerance", None)
        every = getattr(sampler, "gap_every", 0) or (PROBE_EVERY if probed and tolerance is None else 1)
        ours, theirs = policy.describe().dtype, getattr(sampler, "dtype", "")
        return cls(tolerance, every, ours, ours if theirs == "auto" else theirs)

    def due(self, step: int) -> bool:
        """Whether step `step` (from 1) is compared: the first one, and every `every` steps."""
        return (step - 1) % self.every == 0

    def check(
        self, sampler_logprobs: np.ndarray | None, logprobs: np.ndarray, lengths: np.ndarray, stale: np.ndarray | None
    ) -> None:
        """Compares the responses of a step; every rank calls, with those of all ranks.

        Args:
          sampler_logprobs: (N,) nats, sum over the tokens; NaN = unknown. None: no response has any.
          logprobs: (N,) nats, of the policy; NaN = not scored.
          lengths: (N,) tokens.
          stale: (N,) steps that the policy took since the sampler's weights. None: not known, and nothing is compared
            without a tolerance.
        Raises: SamplerError: the sampler has other weights, or there is a tolerance and nothing to compare.
        """
        if self.tolerance is not None:
            self._check_each(sampler_logprobs, logprobs, lengths)
        elif sampler_logprobs is not None and stale is not None:
            apart = np.abs(np.where(stale == 0, sampler_logprobs, np.nan) - logprobs)
            known = ~np.isnan(apart)
            if known.any():
                self._check_mean(apart[known], np.asarray(lengths, np.float64)[known])

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

    def _check_mean(self, apart: np.ndarray, lengths: np.ndarray) -> None:
        measures = (apart / lengths, apart / np.sqrt(lengths))
        seen = Usual(
            len(apart),
            (float(measures[0].mean()), float(measures[1].mean())),
            (float(measures[0].var()), float(measures[1].var())),
        )
        mean = seen.means[0]
        limit, why = MOST, "no precision explains more"
        if self.dtype in _FULL and self.sampler_dtype in _FULL:
            limit, why = SMALL, f"both compute in {self.dtype}; else set engine.dtype"
        if mean > limit:
            raise SamplerError(self._apart(mean, limit, why))
        if self.usual is None:
            self.usual = seen
        elif mean > self._least(0) and all(self._is_apart(seen, i) for i in (0, 1)):
            raise SamplerError(
                self._apart(mean, self._least(0), f"{self.usual.means[0]:.3g} in the first step compared")
            )

    def _least(self, measure: int) -> float:
        """Means of at most this are not apart."""
        assert self.usual is not None
        small = (SMALL if self.dtype in _FULL else SMALL_IN_16_BITS) if measure == 0 else 0.0
        return max(small, TIMES * self.usual.means[measure])

    def _is_apart(self, seen: Usual, i: int) -> bool:
        assert self.usual is not None
        error = math.sqrt(seen.variances[i] / seen.count + self.usual.variances[i] / self.usual.count)
        if min(seen.count, self.usual.count) < FEWEST:
            return False
        return seen.means[i] > self._least(i) and seen.means[i] - self.usual.means[i] > ERRORS * error

    @staticmethod
    def _apart(mean: float, limit: float, why: str) -> str:
        return (
            f"the sampler says that it has the policy's weights, and their log-probabilities differ by {mean:.3g} nats"
            f" a token on average; at most {limit:.3g} is expected ({why}): {_CAUSES}, or it serves another model."
            " Where one of the two computes in few bits, set gap_tolerance, which replaces this check"
        )

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {} if self.usual is None else {"gap": asdict(self.usual)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned."""
        known = state.get("gap")
        self.usual = known and Usual(int(known["count"]), tuple(known["means"]), tuple(known["variances"]))


_CAUSES = "its weights are old or partly updated, its prefix cache is stale"


def gaps(sampler_logprobs: np.ndarray, logprobs: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """|sampler - policy| of the log-probabilities, nats a token, of the responses that have both.

    Args:
      sampler_logprobs: (N,) nats, sum over the tokens; NaN = unknown.
      logprobs: (N,) nats, of the policy; NaN = not scored.
      lengths: (N,) tokens.
    Returns: (M,) with M <= N.
    """
    gap = np.abs(np.asarray(sampler_logprobs) - np.asarray(logprobs)) / np.asarray(lengths)
    known: np.ndarray = gap[~np.isnan(gap)]
    return known
